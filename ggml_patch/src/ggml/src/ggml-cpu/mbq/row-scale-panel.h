#pragma once

// Quantises rows of activations for the products of row-scale.cpp, as specified in ggml-row-scale.h.

#include "row-scale.h"

#include "ggml-cpu-impl.h"
#include "ggml-quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int    QK        = 32; // weights per block of either type
constexpr size_t ALIGNMENT = 64;

template <typename B> constexpr bool is_wide = std::is_same_v<B, block_q8_0>;

template <typename B> float scale_of(const B * row) { return GGML_CPU_FP16_TO_FP32(row->d); }

// ---- panels of activations: steps of columns, within a step row by row, so that the kernel reads one stream; then for each row its scale and
// the sum of its quantised activations

struct panel_shape {
    int     cols;    // rows of activations per panel, except the last of a matrix
    int     step;    // columns per step; with tiles the last step is padded with zeros,
    int     multiple; // and the last panel with unused rows

    int64_t rows(int64_t n) const { return GGML_PAD(n, multiple); }
    int64_t k(int64_t k)    const { return GGML_PAD(k, step); }
    size_t  row_bytes(int64_t k) const { return this->k(k) + sizeof(float) + sizeof(int32_t); }
};

struct panel {
    int8_t  * q;   // [k/step][cols][step]
    float   * s;   // [cols]
    int32_t * sum; // [cols]
    int       cols;
    int       step;

    int8_t * block(int64_t b, int col) const { return q + b*QK/step*cols*step + col*step + b*QK % step; }
};

panel panel_at(uint8_t * base, int64_t k, int cols, const panel_shape & shape) {
    float * s = (float *) (base + shape.k(k)*cols);
    return { (int8_t *) base, s, (int32_t *) (s + cols), cols, shape.step };
}

float largest(const float * x, int64_t k) {
    uint32_t most = 0; // floats without sign are ordered like integers
    for (int64_t i = 0; i < k; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        most = std::max(most, bits & 0x7FFFFFFF);
    }
    float amax;
    memcpy(&amax, &most, sizeof(amax));
    return amax;
}

// QK activations times inverse, clamped to 127, rounded half to even; no addition follows a product, which compilers would fuse
void quantize_block(const float * x, float inverse, int8_t * q) {
#if defined(__AVX2__)
    __m256i v[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x + 8*i), _mm256_set1_ps(inverse));
        v[i] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(y, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f)));
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256((__m256i *) q, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const auto code = [inverse](const float * y) {
        return vcvtnq_s32_f32(vmaxq_f32(vminq_f32(vmulq_n_f32(vld1q_f32(y), inverse), vdupq_n_f32(127.0f)), vdupq_n_f32(-127.0f)));
    };
    for (int i = 0; i < QK; i += 8) {
        const int32x4_t a = code(x + i);
        const int32x4_t b = code(x + i + 4);
        vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
    }
#else
    for (int i = 0; i < QK; ++i) {
        q[i] = (int8_t) (int) fmaxf(-127.0f, fminf(127.0f, rintf(x[i]*inverse))); // in range even if x is not finite
    }
#endif
}

// range: the row's static one, or 0
void quantize_row(const float * x, int64_t k, float range, const panel & to, int col) {
    const float amax    = range > 0.0f ? range : largest(x, k);
    const float inverse = amax < GGML_ROW_SCALE_AMAX_MIN ? 0.0f : 127.0f/amax;

    int32_t sum = 0;
    for (int64_t b = 0; b < k/QK; ++b) {
        int8_t * q = to.block(b, col);
        quantize_block(x + b*QK, inverse, q);
        for (int i = 0; i < QK; ++i) {
            sum += q[i];
        }
    }
    for (int64_t b = k/QK; b*QK % to.step != 0; ++b) {
        memset(to.block(b, col), 0, QK);
    }
    to.s[col]   = amax < GGML_ROW_SCALE_AMAX_MIN ? 0.0f : amax/127.0f;
    to.sum[col] = sum;
}

} // namespace
