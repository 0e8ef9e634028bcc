// Dot products of rows of MBQ weights with rows of Q8_1 activations

#include "mbq.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-quants.h"
#include "mbq-x86.h"
#include "simd-mappings.h"

#include <assert.h>
#include <string.h>

void ggml_mbq_from_float_mbq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_mbq3_ref(x, y, k);
}

void ggml_mbq_from_float_mbq3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_mbq3_64_ref(x, y, k);
}

// ---- scalar

// Sum of d8 * code * q over one block of n weights and its n/32 blocks of activations.
static inline float mbq3_block_dot(const uint8_t * GGML_RESTRICT ql, const uint8_t * GGML_RESTRICT qh, const block_q8_1 * GGML_RESTRICT y, int n) {
    float sum = 0.0f;
    for (int ib = 0; ib < n/QK8_1; ++ib) {
        int sumi = 0;
        for (int j = 0; j < QK8_1; ++j) {
            const int i     = ib*QK8_1 + j;
            const int plane = i / (n/4);
            const int byte  = i % (n/4);
            const int low   = (ql[byte] >> (2*plane)) & 3;
            const int high  = (qh[byte % (n/8)] >> ((2*plane + 2)%8 + byte/(n/8))) & 1;
            sumi += (low | high << 2)*y[ib].qs[j];
        }
        sum += GGML_CPU_FP16_TO_FP32(y[ib].d)*sumi;
    }
    return sum;
}

void ggml_vec_dot_mbq3_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QKMBQ3 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);

    const block_mbq3 * GGML_RESTRICT x = vx;
    const block_q8_1 * GGML_RESTRICT y = vy;

    float sum = 0.0f;
    for (int ib = 0; ib < n/QKMBQ3; ++ib, y += 4) {
        const float s8 = GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s) + GGML_CPU_FP16_TO_FP32(y[2].s) + GGML_CPU_FP16_TO_FP32(y[3].s);
        sum += GGML_CPU_FP16_TO_FP32(x[ib].d)*mbq3_block_dot(x[ib].ql, x[ib].qh, y, QKMBQ3) + GGML_CPU_FP16_TO_FP32(x[ib].m)*s8;
    }
    *s = sum;
}

void ggml_vec_dot_mbq3_64_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QKMBQ3_64 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);

    const block_mbq3_64 * GGML_RESTRICT x = vx;
    const block_q8_1    * GGML_RESTRICT y = vy;

    float sum = 0.0f;
    for (int ib = 0; ib < n/QKMBQ3_64; ++ib, y += 2) {
        const float s8 = GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s);
        sum += GGML_CPU_FP16_TO_FP32(x[ib].d)*mbq3_block_dot(x[ib].ql, x[ib].qh, y, QKMBQ3_64) + GGML_CPU_FP16_TO_FP32(x[ib].m)*s8;
    }
    *s = sum;
}

// ---- SIMD: each section defines MBQ_SIMD and mbq3_dot, mbq3_64_dot: the dot product of nb blocks

#if defined(MBQ_AVX512)
#define MBQ_SIMD

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

static float mbq3_dot(const block_mbq3 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    const __m512i pick01 = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i pick23 = _mm512_set_epi32(6, 6, 6, 6, 6, 6, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4);

    __m512 acc01 = _mm512_setzero_ps();
    __m512 acc23 = _mm512_setzero_ps();
    __m256 accm  = _mm256_setzero_ps(); // odd elements: m * s
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        int32_t dm;
        memcpy(&dm, &x[ib], 4);
        const __m256 scales = _mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi32(dm)), mbq_load_ds4(y));
        const __m512 wide   = _mm512_castps256_ps512(scales);
        accm  = _mm256_add_ps(accm, scales);
        acc01 = _mm512_fmadd_ps(mbq_dot4(mbq3_codes01(&x[ib]), mbq_load_q2(y)),     _mm512_permutexvar_ps(pick01, wide), acc01);
        acc23 = _mm512_fmadd_ps(mbq_dot4(mbq3_codes23(&x[ib]), mbq_load_q2(y + 2)), _mm512_permutexvar_ps(pick23, wide), acc23);
    }
    const __m512 sum = _mm512_fmadd_ps(acc01, mbq3_undo01(), _mm512_mul_ps(acc23, mbq3_undo23()));
    return _mm512_reduce_add_ps(sum) + _mm512_mask_reduce_add_ps(0xAA, _mm512_castps256_ps512(accm));
}

static float mbq3_64_dot(const block_mbq3_64 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    const __m512i pick = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);

    __m512 acc  = _mm512_setzero_ps();
    __m128 accm = _mm_setzero_ps(); // odd elements: m * s
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        int32_t dm;
        memcpy(&dm, &x[ib], 4);
        const __m128 scales = _mm_mul_ps(_mm_cvtph_ps(_mm_set1_epi32(dm)), mbq_load_ds2(y));
        accm = _mm_add_ps(accm, scales);
        acc  = _mm512_fmadd_ps(mbq_dot4(mbq3_64_codes(&x[ib]), mbq_load_q2(y)), _mm512_permutexvar_ps(pick, _mm512_castps128_ps512(scales)), acc);
    }
    return _mm512_reduce_add_ps(_mm512_mul_ps(acc, mbq3_64_undo())) + _mm512_mask_reduce_add_ps(0xA, _mm512_castps128_ps512(accm));
}

#elif defined(MBQ_AVX2)
#define MBQ_SIMD

static float mbq3_dot(const block_mbq3 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    static const float undo[4] = { 1.0f, 1.0f/4, 1.0f/16, 1.0f };

    __m256 acc = _mm256_setzero_ps();
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        __m256i w[4];
        mbq3_codes(&x[ib], w);

        const float d = GGML_CPU_FP16_TO_FP32(x[ib].d);
        float s8 = 0.0f;
        for (int i = 0; i < 4; ++i) {
            const __m256 scale = _mm256_set1_ps(undo[i]*d*GGML_CPU_FP16_TO_FP32(y[i].d));
            acc = _mm256_fmadd_ps(scale, mbq_dot4(w[i], _mm256_loadu_si256((const __m256i *) y[i].qs)), acc);
            s8 += GGML_CPU_FP16_TO_FP32(y[i].s);
        }
        sumf += GGML_CPU_FP16_TO_FP32(x[ib].m)*s8;
    }
    return mbq_hsum(acc) + sumf;
}

static float mbq3_64_dot(const block_mbq3_64 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    __m256 acc01 = _mm256_setzero_ps();
    __m256 acc23 = _mm256_setzero_ps();
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        __m256i w[2];
        mbq3_64_codes(&x[ib], w);

        const float d = GGML_CPU_FP16_TO_FP32(x[ib].d);
        acc01 = _mm256_fmadd_ps(_mm256_set1_ps(d*GGML_CPU_FP16_TO_FP32(y[0].d)), mbq_dot4(w[0], _mm256_loadu_si256((const __m256i *) y[0].qs)), acc01);
        acc23 = _mm256_fmadd_ps(_mm256_set1_ps(d*GGML_CPU_FP16_TO_FP32(y[1].d)), mbq_dot4(w[1], _mm256_loadu_si256((const __m256i *) y[1].qs)), acc23);
        sumf += GGML_CPU_FP16_TO_FP32(x[ib].m)*(GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s));
    }
    return mbq_hsum(_mm256_fmadd_ps(acc01, mbq3_64_undo01(), _mm256_mul_ps(acc23, mbq3_64_undo23()))) + sumf;
}

#elif defined(__ARM_NEON)
#define MBQ_SIMD

// d8 * sum of the products of one block of activations with 32 codes
static inline float32x4_t mbq_dot_q8(float32x4_t acc, uint8x16_t w0, uint8x16_t w1, const block_q8_1 * y, float scale) {
    int32x4_t sum = ggml_vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(w0), vld1q_s8(y->qs));
    sum = ggml_vdotq_s32(sum, vreinterpretq_s8_u8(w1), vld1q_s8(y->qs + 16));
    return vmlaq_n_f32(acc, vcvtq_f32_s32(sum), scale*GGML_CPU_FP16_TO_FP32(y->d));
}

static inline uint8x16_t mbq_merge(uint8x16_t ql, uint8x16_t qh, uint8_t low, uint8_t high) {
    return vorrq_u8(vandq_u8(ql, vdupq_n_u8(low)), vandq_u8(qh, vdupq_n_u8(high)));
}

static float mbq3_dot(const block_mbq3 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    float32x4_t acc = vdupq_n_f32(0.0f);
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        const uint8x16_t a = vld1q_u8(x[ib].ql);
        const uint8x16_t b = vld1q_u8(x[ib].ql + 16);
        const uint8x16_t h = vld1q_u8(x[ib].qh);
        const uint8x16_t g = vshrq_n_u8(h, 1);

        const float d = GGML_CPU_FP16_TO_FP32(x[ib].d);
        acc = mbq_dot_q8(acc, mbq_merge(a, h, 0x03, 0x04), mbq_merge(b, g, 0x03, 0x04), &y[0], d);
        acc = mbq_dot_q8(acc, mbq_merge(a, h, 0x0C, 0x10), mbq_merge(b, g, 0x0C, 0x10), &y[1], d*(1.0f/4));
        acc = mbq_dot_q8(acc, mbq_merge(a, h, 0x30, 0x40), mbq_merge(b, g, 0x30, 0x40), &y[2], d*(1.0f/16));
        acc = mbq_dot_q8(acc, mbq_merge(vshrq_n_u8(a, 6), vshlq_n_u8(h, 2), 0x03, 0x04), mbq_merge(vshrq_n_u8(b, 6), vshlq_n_u8(g, 2), 0x03, 0x04), &y[3], d);
        sumf += GGML_CPU_FP16_TO_FP32(x[ib].m)*(GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s) + GGML_CPU_FP16_TO_FP32(y[2].s) + GGML_CPU_FP16_TO_FP32(y[3].s));
    }
    return vaddvq_f32(acc) + sumf;
}

static float mbq3_64_dot(const block_mbq3_64 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    float32x4_t acc = vdupq_n_f32(0.0f);
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        const uint8x16_t a = vld1q_u8(x[ib].ql);
        const uint8x8_t  l = vld1_u8(x[ib].qh);
        const uint8x16_t h = vcombine_u8(l, vshr_n_u8(l, 1));

        // plane 1 back to one times the code, to share an accumulator with plane 0; likewise planes 2 and 3
        const float d = GGML_CPU_FP16_TO_FP32(x[ib].d);
        acc = mbq_dot_q8(acc, mbq_merge(a, h, 0x03, 0x04), vshrq_n_u8(mbq_merge(a, h, 0x0C, 0x10), 2), &y[0], d);
        acc = mbq_dot_q8(acc, vshrq_n_u8(mbq_merge(a, h, 0x30, 0x40), 4), mbq_merge(vshrq_n_u8(a, 6), vshlq_n_u8(h, 2), 0x03, 0x04), &y[1], d);
        sumf += GGML_CPU_FP16_TO_FP32(x[ib].m)*(GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s));
    }
    return vaddvq_f32(acc) + sumf;
}

#endif

void ggml_vec_dot_mbq3_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(MBQ_SIMD)
    assert(n % QKMBQ3 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);
    *s = mbq3_dot(vx, vy, n/QKMBQ3);
#else
    ggml_vec_dot_mbq3_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}

void ggml_vec_dot_mbq3_64_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(MBQ_SIMD)
    assert(n % QKMBQ3_64 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);
    *s = mbq3_64_dot(vx, vy, n/QKMBQ3_64);
#else
    ggml_vec_dot_mbq3_64_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
