// Dot products of rows of MBQ weights with rows of Q8_1 activations

#include "mbq.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "mbq-block.h"
#include "mbq-x86.h"

#include <assert.h>
#include <math.h>
#include <string.h>

// ---- scalar

// Sum of d8 * code * q over 32 weights and their block of activations; plane and byte are those of the first weight.
template <typename B>
static float mbq_dot32_scalar(const B & x, int first, const block_q8_1 & y) {
    constexpr int n = mbq_weights<B>;
    int sum = 0;
    for (int j = 0; j < QK8_1; ++j) {
        const int plane = (first + j) / (n/4);
        const int byte  = (first + j) % (n/4);
        const int low   = (x.ql[byte] >> (2*plane)) & 3;
        const int high  = (x.qh[byte % (n/8)] >> ((2*plane + 2)%8 + byte/(n/8))) & 1;
        sum += (low | high << 2)*y.qs[j];
    }
    return GGML_CPU_FP16_TO_FP32(y.d)*sum;
}

template <typename B>
static float mbq_dot_scalar(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    float sum = 0.0f;
    for (int ib = 0; ib < nb; ++ib) {
        for (int group = 0; group < mbq_grids<B>; ++group) {
            const mbq_grid grid = mbq_grid_of(x[ib], group);
            float dot = 0.0f;
            float s8  = 0.0f;
            for (int i = 0; i < mbq_group<B>; i += QK8_1, ++y) {
                dot += mbq_dot32_scalar(x[ib], group*mbq_group<B> + i, *y);
                s8  += GGML_CPU_FP16_TO_FP32(y->s);
            }
            sum += grid.d*dot + grid.m*s8;
        }
    }
    return sum;
}

// ---- SIMD: each section defines MBQ_SIMD and mbq3_dot, mbq3_64_dot: the dot product of nb blocks of 128, of 64 weights

#if defined(MBQ_AVX512)
#define MBQ_SIMD

// d and m of the grid for each block of activations (repeated for blocks of 64 weights)
template <typename B>
static inline __m256 mbq_load_dm(const B * x) {
    int32_t words;
    memcpy(&words, x, 4);
    const __m128i h = _mm_set1_epi32(words);
    if constexpr (mbq_grids<B> == 1) {
        return _mm256_cvtph_ps(h);
    } else {
        // duplicates each scale word, for d and for m = d * factor
        const __m128i twice = mbq_weights<B> == 128 ? _mm_unpacklo_epi32(_mm_unpacklo_epi16(h, h), _mm_unpacklo_epi16(h, h)) : _mm_unpacklo_epi16(h, h);
        const __m128i d = _mm_and_si128(_mm_srli_epi32(twice, 1), _mm_set1_epi32(MBQ_SCALE_WORD_D));
        const __m128i z = _mm_or_si128(_mm_and_si128(twice, _mm_set1_epi32(MBQ_SCALE_WORD_Z & 0xFFFF0000)), _mm_set1_epi32(0x3C00));
        const float m = MBQ_SCALE_WORD_M;
        const __m256 factor = _mm256_mul_ps(_mm256_cvtph_ps(z), _mm256_set_ps(m, 1, m, 1, m, 1, m, 1));
        return _mm256_mul_ps(_mm256_cvtph_ps(d), factor);
    }
}

// d and s of 2 or 4 blocks of activations as float: d0 s0 d1 s1 ...
static inline __m128 mbq_load_ds2(const block_q8_1 * y) {
    int32_t ds[2];
    memcpy(&ds[0], &y[0].ds, 4);
    memcpy(&ds[1], &y[1].ds, 4);
    return _mm_cvtph_ps(_mm_set_epi32(0, 0, ds[1], ds[0]));
}

static inline __m256 mbq_load_ds4(const block_q8_1 * y) {
    int32_t ds[4];
    for (int i = 0; i < 4; ++i) {
        memcpy(&ds[i], &y[i].ds, 4);
    }
    return _mm256_cvtph_ps(_mm_set_epi32(ds[3], ds[2], ds[1], ds[0]));
}

static inline __m512i mbq_load_q2(const block_q8_1 * y) {
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) y[0].qs));
    return _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *) y[1].qs), 1);
}

template <typename B>
static float mbq3_dot(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    const __m512i pick01 = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i pick23 = _mm512_set_epi32(6, 6, 6, 6, 6, 6, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4);

    __m512 acc01 = _mm512_setzero_ps();
    __m512 acc23 = _mm512_setzero_ps();
    __m256 accm  = _mm256_setzero_ps(); // odd elements: m * s
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        const __m256 scales = _mm256_mul_ps(mbq_load_dm(&x[ib]), mbq_load_ds4(y));
        const __m512 wide   = _mm512_castps256_ps512(scales);
        accm  = _mm256_add_ps(accm, scales);
        acc01 = _mm512_fmadd_ps(mbq_dot4(mbq3_codes01(&x[ib]), mbq_load_q2(y)),     _mm512_permutexvar_ps(pick01, wide), acc01);
        acc23 = _mm512_fmadd_ps(mbq_dot4(mbq3_codes23(&x[ib]), mbq_load_q2(y + 2)), _mm512_permutexvar_ps(pick23, wide), acc23);
    }
    const __m512 sum = _mm512_fmadd_ps(acc01, mbq3_undo01(), _mm512_mul_ps(acc23, mbq3_undo23()));
    return _mm512_reduce_add_ps(sum) + _mm512_mask_reduce_add_ps(0xAA, _mm512_castps256_ps512(accm));
}

template <typename B>
static float mbq3_64_dot(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    const __m512i pick = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);

    __m512 acc  = _mm512_setzero_ps();
    __m128 accm = _mm_setzero_ps(); // odd elements: m * s
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        const __m128 scales = _mm_mul_ps(_mm256_castps256_ps128(mbq_load_dm(&x[ib])), mbq_load_ds2(y));
        accm = _mm_add_ps(accm, scales);
        acc  = _mm512_fmadd_ps(mbq_dot4(mbq3_64_codes(&x[ib]), mbq_load_q2(y)), _mm512_permutexvar_ps(pick, _mm512_castps128_ps512(scales)), acc);
    }
    return _mm512_reduce_add_ps(_mm512_mul_ps(acc, mbq3_64_undo())) + _mm512_mask_reduce_add_ps(0xA, _mm512_castps128_ps512(accm));
}

#elif defined(MBQ_AVX2)
#define MBQ_SIMD

// Sum of m * s over one block of weights.
template <typename B>
static inline float mbq_minimums(const mbq_grid grid[2], const block_q8_1 * y) {
    constexpr int half = mbq_weights<B>/QK8_1/2;
    float s8[2] = { 0.0f, 0.0f };
    for (int i = 0; i < 2*half; ++i) {
        s8[mbq_grids<B> == 1 ? 0 : i/half] += GGML_CPU_FP16_TO_FP32(y[i].s);
    }
    return mbq_grids<B> == 1 ? grid[0].m*s8[0] : grid[0].m*s8[0] + grid[1].m*s8[1];
}

template <typename B>
static float mbq3_dot(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    static const float undo[4] = { 1.0f, 1.0f/4, 1.0f/16, 1.0f };

    __m256 acc = _mm256_setzero_ps();
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        __m256i w[4];
        mbq3_codes(&x[ib], w);

        mbq_grid grid[2];
        mbq_load_grids(x[ib], grid);
        for (int i = 0; i < 4; ++i) {
            const __m256 scale = _mm256_set1_ps(undo[i]*grid[i/2].d*GGML_CPU_FP16_TO_FP32(y[i].d));
            acc = _mm256_fmadd_ps(scale, mbq_dot4(w[i], _mm256_loadu_si256((const __m256i *) y[i].qs)), acc);
        }
        sumf += mbq_minimums<B>(grid, y);
    }
    return mbq_hsum(acc) + sumf;
}

template <typename B>
static float mbq3_64_dot(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    __m256 acc01 = _mm256_setzero_ps();
    __m256 acc23 = _mm256_setzero_ps();
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        __m256i w[2];
        mbq3_64_codes(&x[ib], w);

        mbq_grid grid[2];
        mbq_load_grids(x[ib], grid);
        acc01 = _mm256_fmadd_ps(_mm256_set1_ps(grid[0].d*GGML_CPU_FP16_TO_FP32(y[0].d)), mbq_dot4(w[0], _mm256_loadu_si256((const __m256i *) y[0].qs)), acc01);
        acc23 = _mm256_fmadd_ps(_mm256_set1_ps(grid[1].d*GGML_CPU_FP16_TO_FP32(y[1].d)), mbq_dot4(w[1], _mm256_loadu_si256((const __m256i *) y[1].qs)), acc23);
        sumf += mbq_minimums<B>(grid, y);
    }
    return mbq_hsum(_mm256_fmadd_ps(acc01, mbq3_64_undo01(), _mm256_mul_ps(acc23, mbq3_64_undo23()))) + sumf;
}

#elif defined(__ARM_NEON)
#define MBQ_SIMD

// mbq.cpp also uses these for one row of activations, so their float additions are in the order of mbq-panel.h.

// sum + d * d8 * the products of one block of activations with 32 codes that are shifted left by `excess` bits
static inline float mbq_add_block(float sum, uint8x16_t w0, uint8x16_t w1, int excess, float d, const block_q8_1 * y) {
    int32x4_t dot = ggml_vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(w0), vld1q_s8(y->qs));
    dot = ggml_vdotq_s32(dot, vreinterpretq_s8_u8(w1), vld1q_s8(y->qs + 16));
    return fmaf((float) (vaddvq_s32(dot) >> excess)*d, GGML_CPU_FP16_TO_FP32(y->d), sum);
}

// sum + m * the sum of n blocks of activations
static inline float mbq_add_minimum(float sum, float m, const block_q8_1 * y, int n) {
    float s8 = 0.0f;
    for (int i = 0; i < n; ++i) {
        s8 += GGML_CPU_FP16_TO_FP32(y[i].s);
    }
    return fmaf(m, s8, sum);
}

static inline uint8x16_t mbq_merge(uint8x16_t ql, uint8x16_t qh, uint8_t low, uint8_t high) {
    return vorrq_u8(vandq_u8(ql, vdupq_n_u8(low)), vandq_u8(qh, vdupq_n_u8(high)));
}

template <typename B>
static float mbq3_dot(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    float sum = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        const uint8x16_t a = vld1q_u8(x[ib].ql);
        const uint8x16_t b = vld1q_u8(x[ib].ql + 16);
        const uint8x16_t h = vld1q_u8(x[ib].qh);
        const uint8x16_t g = vshrq_n_u8(h, 1);

        mbq_grid grid[2];
        mbq_load_grids(x[ib], grid);
        sum = mbq_add_block(sum, mbq_merge(a, h, 0x03, 0x04), mbq_merge(b, g, 0x03, 0x04), 0, grid[0].d, &y[0]);
        sum = mbq_add_block(sum, mbq_merge(a, h, 0x0C, 0x10), mbq_merge(b, g, 0x0C, 0x10), 2, grid[0].d, &y[1]);
        sum = mbq_grids<B> == 1 ? sum : mbq_add_minimum(sum, grid[0].m, y, 2);
        sum = mbq_add_block(sum, mbq_merge(a, h, 0x30, 0x40), mbq_merge(b, g, 0x30, 0x40), 4, grid[1].d, &y[2]);
        sum = mbq_add_block(sum, mbq_merge(vshrq_n_u8(a, 6), vshlq_n_u8(h, 2), 0x03, 0x04), mbq_merge(vshrq_n_u8(b, 6), vshlq_n_u8(g, 2), 0x03, 0x04), 0, grid[1].d, &y[3]);
        sum = mbq_grids<B> == 1 ? mbq_add_minimum(sum, grid[0].m, y, 4) : mbq_add_minimum(sum, grid[1].m, y + 2, 2);
    }
    return sum;
}

template <typename B>
static float mbq3_64_dot(const B * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    float sum = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        const uint8x16_t a = vld1q_u8(x[ib].ql);
        const uint8x8_t  l = vld1_u8(x[ib].qh);
        const uint8x16_t h = vcombine_u8(l, vshr_n_u8(l, 1));

        // shift plane 1 back to the plain code, since it shares a block of activations with plane 0; likewise planes 2 and 3
        mbq_grid grid[2];
        mbq_load_grids(x[ib], grid);
        sum = mbq_add_block(sum, mbq_merge(a, h, 0x03, 0x04), vshrq_n_u8(mbq_merge(a, h, 0x0C, 0x10), 2), 0, grid[0].d, &y[0]);
        sum = mbq_grids<B> == 1 ? sum : mbq_add_minimum(sum, grid[0].m, y, 1);
        sum = mbq_add_block(sum, vshrq_n_u8(mbq_merge(a, h, 0x30, 0x40), 4), mbq_merge(vshrq_n_u8(a, 6), vshlq_n_u8(h, 2), 0x03, 0x04), 0, grid[1].d, &y[1]);
        sum = mbq_grids<B> == 1 ? mbq_add_minimum(sum, grid[0].m, y, 2) : mbq_add_minimum(sum, grid[1].m, y + 1, 1);
    }
    return sum;
}

#endif

#if !defined(MBQ_SIMD)
#define mbq3_dot    mbq_dot_scalar
#define mbq3_64_dot mbq_dot_scalar
#endif

#define MBQ_FUNCTIONS(name, dot)                                                                                             \
    void ggml_mbq_from_float_##name(const float * x, void * y, int64_t k) {                                                  \
        quantize_row_##name##_ref(x, (block_##name *) y, k);                                                                 \
    }                                                                                                                        \
    void ggml_vec_dot_##name##_q8_1(int n, float * s, size_t, const void * x, size_t, const void * y, size_t, int nrc) {     \
        assert(n % mbq_weights<block_##name> == 0 && nrc == 1);                                                              \
        GGML_UNUSED(nrc);                                                                                                    \
        *s = dot((const block_##name *) x, (const block_q8_1 *) y, n/mbq_weights<block_##name>);                             \
    }                                                                                                                        \
    void ggml_vec_dot_##name##_q8_1_generic(int n, float * s, size_t, const void * x, size_t, const void * y, size_t, int) { \
        *s = mbq_dot_scalar((const block_##name *) x, (const block_q8_1 *) y, n/mbq_weights<block_##name>);                  \
    }

MBQ_FUNCTIONS(mbq3,     mbq3_dot)
MBQ_FUNCTIONS(mbq3_64,  mbq3_64_dot)
MBQ_FUNCTIONS(mbq3s,    mbq3_dot)
MBQ_FUNCTIONS(mbq3s_64, mbq3_64_dot)
