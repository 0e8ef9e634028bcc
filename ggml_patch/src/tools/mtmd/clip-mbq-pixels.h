#pragma once

// The pixels of a preprocessed picture: copies share them (a picture is copied on its way from the prompt to the tower, its megabytes are
// not), and from bytes they are made by a table. Included by clip-impl.h.

#include "clip-mbq-graphs.h" // what they go through
#include "clip-mbq-rows.h"   // and where that ends

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

// as std::vector<float>, but a copy is made only when somebody writes
struct clip_mbq_pixels {
    clip_mbq_pixels & operator=(std::vector<float> values) {
        shared = std::make_shared<std::vector<float>>(std::move(values));
        return *this;
    }

    operator const std::vector<float> & () const {
        static const std::vector<float> none;
        return shared ? *shared : none;
    }

    bool empty() const {
        return !shared || shared->empty();
    }

    void clear() {
        shared.reset();
    }

    void resize(size_t n) {
        own().resize(n);
    }

    float & operator[](size_t i) {
        return own()[i];
    }

private:
    std::shared_ptr<std::vector<float>> shared;

    std::vector<float> & own() {
        if (!shared) {
            shared = std::make_shared<std::vector<float>>();
        } else if (shared.use_count() > 1) {
            shared = std::make_shared<std::vector<float>>(*shared);
        }
        return *shared;
    }
};

// what clip_image_f32::from_u8() and normalize() make of RGB, bit for bit: there are 256 values a channel
static inline std::vector<float> clip_mbq_normalised(const std::vector<uint8_t> & bytes, const float * mean, const float * std) {
    float table[3][256];
    for (int c = 0; c < 3; c++) {
        for (int i = 0; i < 256; i++) {
            const float value = (float) i / 255.0f;
            table[c][i] = (value - mean[c]) / std[c];
        }
    }
    std::vector<float> res(bytes.size());
    for (size_t i = 0; i + 3 <= bytes.size(); i += 3) {
        res[i    ] = table[0][bytes[i    ]];
        res[i + 1] = table[1][bytes[i + 1]];
        res[i + 2] = table[2][bytes[i + 2]];
    }
    return res;
}
