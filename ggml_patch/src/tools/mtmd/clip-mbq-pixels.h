#pragma once

// The pixels of a preprocessed picture. Copies of a picture share them, since pictures are copied between prompt and tower. They stay bytes,
// with a lookup table of their float values, until floats are requested; the tower's input is written directly from the bytes.
// Included by clip-impl.h.

#include "clip-mbq-bytes.h"
#include "clip-mbq-graphs.h"
#include "clip-mbq-resample.h"
#include "clip-mbq-rows.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

// like std::vector<float>, but copied on write
struct clip_mbq_pixels {
    clip_mbq_pixels() = default;

    // the results of clip_image_f32::from_u8() and normalize() for RGB, bit for bit: 256 values per channel
    clip_mbq_pixels(const std::vector<uint8_t> & bytes, const float * mean, const float * std) : shared(std::make_shared<picture>()) {
        shared->bytes.copy(bytes);
        for (int c = 0; c < 3; c++) {
            for (int i = 0; i < 256; i++) {
                const float value = (float) i / 255.0f;
                shared->table[c][i] = (value - mean[c]) / std[c];
            }
        }
    }

    clip_mbq_pixels & operator=(std::vector<float> values) {
        shared = std::make_shared<picture>();
        shared->values = std::move(values);
        return *this;
    }

    operator const std::vector<float> & () const {
        static const std::vector<float> none;
        return shared ? shared->floats() : none;
    }

    // whether the bytes are in page-locked memory, which a GPU copies from without staging
    bool is_page_locked() const {
        return shared && shared->bytes.is_page_locked();
    }

    // interleaved RGB; nullptr if there are only float values, or nothing
    const uint8_t * bytes() const {
        return shared && !shared->bytes.empty() ? shared->bytes.data() : nullptr;
    }

    bool empty() const {
        return !shared || (shared->bytes.empty() && shared->values.empty());
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

    // writes pixels [begin, end) of RGB, each channel to a plane of n
    void to_planes(float * planes, size_t n, size_t begin, size_t end) const {
        if (!shared || shared->bytes.empty()) {
            const float * from = static_cast<const std::vector<float> &>(*this).data();
            for (size_t i = begin; i < end; i++) {
                planes[      i] = from[3*i    ];
                planes[  n + i] = from[3*i + 1];
                planes[2*n + i] = from[3*i + 2];
            }
            return;
        }
        const uint8_t * from = shared->bytes.data();
        const auto & table = shared->table;
        for (size_t i = begin; i < end; i++) {
            planes[      i] = table[0][from[3*i    ]];
            planes[  n + i] = table[1][from[3*i + 1]];
            planes[2*n + i] = table[2][from[3*i + 2]];
        }
    }

private:
    struct picture {
        clip_mbq_bytes       bytes; // empty if there are only float values
        float                table[3][256];
        std::vector<float>   values;
        std::once_flag       made;

        // pictures are read by several threads
        const std::vector<float> & floats() {
            if (!bytes.empty()) {
                std::call_once(made, [&] {
                    values.resize(bytes.size());
                    const uint8_t * from = bytes.data();
                    for (size_t i = 0; i < bytes.size(); i++) {
                        values[i] = table[i%3][from[i]];
                    }
                });
            }
            return values;
        }
    };
    std::shared_ptr<picture> shared;

    std::vector<float> & own() {
        if (!shared || !shared->bytes.empty() || shared.use_count() > 1) {
            *this = std::vector<float>(static_cast<const std::vector<float> &>(*this));
        }
        return shared->values;
    }
};
