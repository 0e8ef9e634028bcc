#pragma once

// Products of row-scale.cpp with one row of activations, along n stored rows of weights. The next rows are prefetched, because short rows end
// before the hardware prefetcher adapts.

#include "row-scale-panel.h"
#include "row-scale-simd.h"

namespace {

constexpr int LINES = 4; // rows of weights that are multiplied at once

template <typename B, int n>
void multiply_lines(const uint8_t * w, size_t stride, const panel & y, int64_t k, float * dst) {
    using line = row_scale_line;
    constexpr bool wide = is_wide<B>;

    line::acc sum[n];
    for (int r = 0; r < n; ++r) {
        sum[r] = line::zero();
    }
    for (int64_t first = 0; first < k/QK; first += 8) {
        line::acc part[n];
        for (int r = 0; r < n; ++r) {
            part[r] = line::zero();
            const char * ahead = (const char *) ((const B *) (w + (r + n)*stride) + first);
            for (size_t at = 0; at < 8*sizeof(B); at += 64) {
                __builtin_prefetch(ahead + at);
            }
        }
        for (int64_t b = first; b < std::min<int64_t>(first + 8, k/QK); ++b) {
            const auto q = line::activations(y.q + b*QK);
            for (int r = 0; r < n; ++r) {
                part[r] = line::template add<wide>(part[r], (const uint8_t *) ((const B *) (w + r*stride))[b].qs, q);
            }
        }
        for (int r = 0; r < n; ++r) {
            sum[r] = line::template fold<wide>(sum[r], part[r]);
        }
    }
    for (int r = 0; r < n; ++r) {
        const int32_t acc = line::total(sum[r]) - line::zero_point(wide)*y.sum[0];
        dst[r] = (float) acc*scale_of((const B *) (w + r*stride))*y.s[0];
    }
}

} // namespace
