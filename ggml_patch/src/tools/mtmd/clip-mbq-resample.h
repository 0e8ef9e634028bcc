#pragma once

// Resizes a picture with the same sums as upstream's two passes (img_tool::resize_pillow), with rows distributed over threads. Included by clip-impl.h (clip-mbq-pixels.h).

#include "ggml-at-once.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

// one direction: the first input and the number of inputs of each output (pairs in bounds), and their weights with 22 fractional bits
struct clip_mbq_filter {
    int n_max; // maximum number of inputs of one output
    const std::vector<int>     & bounds;
    const std::vector<int32_t> & weights;

    int begin(int i) const { return bounds[2*i]; }
    int end  (int i) const { return bounds[2*i] + bounds[2*i + 1]; }
    const int32_t * of(int i) const { return weights.data() + (size_t) i*n_max; }
};

static constexpr int     CLIP_MBQ_POINT = 22;
static constexpr int32_t CLIP_MBQ_HALF  = 1 << (CLIP_MBQ_POINT - 1);

static inline uint8_t clip_mbq_byte(int32_t sum) {
    return (uint8_t) std::min(std::max(sum >> CLIP_MBQ_POINT, 0), 255);
}

static inline void clip_mbq_resample_row(const uint8_t * from, uint8_t * to, int width, const clip_mbq_filter & across) {
    for (int x = 0; x < width; x++) {
        const uint8_t * rgb    = from + 3*across.begin(x);
        const int32_t * weight = across.of(x);
        const int       n      = across.end(x) - across.begin(x);
        int32_t r = CLIP_MBQ_HALF, g = CLIP_MBQ_HALF, b = CLIP_MBQ_HALF;
        for (int i = 0; i < n; i++) {
            r += rgb[3*i    ]*weight[i];
            g += rgb[3*i + 1]*weight[i];
            b += rgb[3*i + 2]*weight[i];
        }
        to[3*x    ] = clip_mbq_byte(r);
        to[3*x + 1] = clip_mbq_byte(g);
        to[3*x + 2] = clip_mbq_byte(b);
    }
}

// computes rows [first, last) of the output, written to `to`
static inline void clip_mbq_resample_rows(const uint8_t * from, int from_width, uint8_t * to, int width, int first, int last,
        const clip_mbq_filter & across, const clip_mbq_filter & down) {
    const size_t n = (size_t) width*3;
    const int begin = down.begin(first), end = down.end(last - 1); // rows of the input that are needed
    std::vector<uint8_t> narrowed(n*(end - begin));
    for (int y = begin; y < end; y++) {
        clip_mbq_resample_row(from + (size_t) y*from_width*3, narrowed.data() + n*(y - begin), width, across);
    }
    std::vector<int32_t> sums(n);
    for (int y = first; y < last; y++) {
        std::fill(sums.begin(), sums.end(), CLIP_MBQ_HALF);
        for (int k = down.begin(y); k < down.end(y); k++) {
            const uint8_t * row    = narrowed.data() + n*(k - begin);
            const int32_t   weight = down.of(y)[k - down.begin(y)];
            for (size_t i = 0; i < n; i++) {
                sums[i] += row[i]*weight;
            }
        }
        for (size_t i = 0; i < n; i++) {
            to[n*(y - first) + i] = clip_mbq_byte(sums[i]);
        }
    }
}

// resizes RGB; one thread per 65536 pixels, at most four, and at least 64 rows each: input rows near a boundary are processed by both neighbouring threads
static inline std::vector<uint8_t> clip_mbq_resampled(const std::vector<uint8_t> & from, int from_width, int width, int height,
        const clip_mbq_filter & across, const clip_mbq_filter & down) {
    std::vector<uint8_t> res((size_t) width*height*3);
    const size_t n = std::max(from.size(), res.size())/3;
    const size_t parts = std::max<size_t>(std::min<size_t>({ n >> 16, (size_t) height/64, 4 }), 1);
    ggml_at_once(parts, [&](size_t k) {
        const int first = height*k/parts, last = height*(k + 1)/parts;
        clip_mbq_resample_rows(from.data(), from_width, res.data() + (size_t) first*width*3, width, first, last, across, down);
    });
    return res;
}
