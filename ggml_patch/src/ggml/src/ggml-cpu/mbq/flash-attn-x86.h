#pragma once

// Parts of flash-attn-rows.cpp for AVX2: transposes cells of the cache in registers, eight at a time, and multiplies them with a few rows of
// queries. Each result is one chain of fused multiply-adds in the order of simd_gemm(), so the bits are the same.

#include "ggml-impl.h"

#include <immintrin.h>

#include <cstdint>

// dimensions 0 to 7 of n <= 8 cells, stride bytes apart: t[d] has one lane per cell
static inline void load_transposed(const char * x, size_t stride, int64_t n, __m256 t[8]) {
    __m256 r[8], s[8];
    for (int j = 0; j < 8; ++j) {
        r[j] = j < n ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x + j*stride))) : _mm256_setzero_ps();
    }
    for (int j = 0; j < 8; j += 2) {
        s[j]     = _mm256_unpacklo_ps(r[j], r[j + 1]);
        s[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
    }
    for (int j = 0; j < 8; j += 4) {
        r[j]     = _mm256_shuffle_ps(s[j],     s[j + 2], 0x44);
        r[j + 1] = _mm256_shuffle_ps(s[j],     s[j + 2], 0xee);
        r[j + 2] = _mm256_shuffle_ps(s[j + 1], s[j + 3], 0x44);
        r[j + 3] = _mm256_shuffle_ps(s[j + 1], s[j + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
        t[j]     = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
        t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
    }
}

#if defined(__FMA__)
#define FLASH_ATTN_FEW 4 // up to this many rows, a tile of the cache is not stored in fp32

// prefetch 8 cells: they are read across, a pattern that the hardware prefetcher does not detect
static inline void prefetch_cells(const char * x, size_t stride, int64_t width) {
    for (int j = 0; j < 8; ++j) {
        for (size_t b = 0; b < width*sizeof(ggml_fp16_t); b += 64) {
            _mm_prefetch(x + j*stride + b, _MM_HINT_T0);
        }
    }
}

// kq[r][i] = sum over d of q[r][d] k[i][d], for R rows and n cells; v, their values, are used next
template <int R, int KV>
static void few_scores(const float * q, int64_t width, const char * k, size_t stride, const char * v, size_t v_stride, int64_t v_width,
                       int64_t n, float * kq) {
    for (int64_t i = 0; i < n; i += 8) {
        prefetch_cells(k + (i + 16)*stride, stride, width);
        prefetch_cells(v + i*v_stride, v_stride, v_width);
        __m256 acc[R];
        for (int r = 0; r < R; ++r) {
            acc[r] = _mm256_setzero_ps();
        }
        for (int64_t d = 0; d < width; d += 8) {
            __m256 t[8];
            if (n - i >= 8) {
                load_transposed(k + i*stride + d*sizeof(ggml_fp16_t), stride, 8, t);
            } else {
                load_transposed(k + i*stride + d*sizeof(ggml_fp16_t), stride, n - i, t);
            }
            for (int j = 0; j < 8; ++j) {
                for (int r = 0; r < R; ++r) {
                    acc[r] = _mm256_fmadd_ps(t[j], _mm256_set1_ps(q[r*width + d + j]), acc[r]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            _mm256_storeu_ps(kq + r*KV + i, acc[r]);
        }
    }
}

// out[r][d] += sum over i of kq[r][i] v[i][d], W vectors of d at a time
template <int R, int KV, int W>
static int64_t few_values(const float * kq, const char * v, size_t stride, int64_t n, int64_t width, float * out, int64_t d) {
    for (; d + 8*W <= width; d += 8*W) {
        __m256 acc[R][W];
        for (int r = 0; r < R; ++r) {
            for (int w = 0; w < W; ++w) {
                acc[r][w] = _mm256_loadu_ps(out + r*width + d + 8*w);
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            const __m128i * cell = (const __m128i *) (v + i*stride + d*sizeof(ggml_fp16_t));
            for (int w = 0; w < W; ++w) {
                const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(cell + w));
                for (int r = 0; r < R; ++r) {
                    acc[r][w] = _mm256_fmadd_ps(x, _mm256_set1_ps(kq[r*KV + i]), acc[r][w]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int w = 0; w < W; ++w) {
                _mm256_storeu_ps(out + r*width + d + 8*w, acc[r][w]);
            }
        }
    }
    return d;
}

template <int R, int KV>
static void few_values(const float * kq, const char * v, size_t stride, int64_t n, int64_t width, float * out) {
    const int64_t d = few_values<R, KV, R <= 2 ? 4 : 2>(kq, v, stride, n, width, out, 0);
    few_values<R, KV, 1>(kq, v, stride, n, width, out, d);
}
#endif
