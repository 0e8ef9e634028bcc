// Dot products of rows of MBQ weights with rows of Q8_1 activations

#include "mbq.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-quants.h"
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

// ---- SIMD: each section defines MBQ_SIMD and mbq3_dot, mbq3_64_dot: the dot product of nb blocks.
//
// Everywhere: plane 0 to 2 of the codes come out times 1, 4 and 16 (two masks, no shift; see ggml-mbq-common.h), which the
// scales undo exactly. The second half of the high bits is brought to the place of the first by one shift for all planes.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MBQ_SIMD

// d and s of 2 blocks of activations as float: d0 s0 d1 s1
static inline __m128 mbq_load_ds2(const block_q8_1 * y) {
    int32_t ds[2];
    memcpy(&ds[0], &y[0].ds, 4);
    memcpy(&ds[1], &y[1].ds, 4);
    return _mm_cvtph_ps(_mm_insert_epi32(_mm_cvtsi32_si128(ds[0]), ds[1], 1));
}

static inline __m256 mbq_load_ds4(const block_q8_1 * y) {
    int32_t ds[4];
    for (int i = 0; i < 4; ++i) {
        memcpy(&ds[i], &y[i].ds, 4);
    }
    return _mm256_cvtph_ps(_mm_set_epi32(ds[3], ds[2], ds[1], ds[0]));
}

static inline __m512i mbq_load_q2(const block_q8_1 * y) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) y[0].qs)), _mm256_loadu_si256((const __m256i *) y[1].qs), 1);
}

static float mbq3_dot(const block_mbq3 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    // one constant for each 16 bytes of [plane 0 | plane 1] and of [plane 2 | plane 3]
    const __m512i low01  = _mm512_set_epi64(0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303, 0x0303030303030303, 0x0303030303030303);
    const __m512i low23  = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x0303030303030303, 0x0303030303030303, 0x3030303030303030, 0x3030303030303030, 0x3030303030303030, 0x3030303030303030);
    const __m512i high01 = _mm512_set_epi64(0x1010101010101010, 0x1010101010101010, 0x1010101010101010, 0x1010101010101010, 0x0404040404040404, 0x0404040404040404, 0x0404040404040404, 0x0404040404040404);
    const __m512i high23 = _mm512_set_epi64(0x0404040404040404, 0x0404040404040404, 0x0404040404040404, 0x0404040404040404, 0x4040404040404040, 0x4040404040404040, 0x4040404040404040, 0x4040404040404040);
    const __m512i shift  = _mm512_set_epi64(6, 6, 6, 6, 0, 0, 0, 0);
    const __m512i rol01  = _mm512_set_epi64(63, 63, 0, 0, 63, 63, 0, 0); // 63 = one to the right
    const __m512i rol23  = _mm512_set_epi64( 1,  1, 2, 2, 63, 63, 0, 0);
    const __m512i pick01 = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i pick23 = _mm512_set_epi32(6, 6, 6, 6, 6, 6, 6, 6, 4, 4, 4, 4, 4, 4, 4, 4);
    const __m256  undo   = _mm256_set_ps(1.0f, 1.0f, 1.0f, 1.0f/16, 1.0f, 1.0f/4, 1.0f, 1.0f); // s d of plane 3, ..., s d of plane 0

    __m512 acc01 = _mm512_setzero_ps();
    __m512 acc23 = _mm512_setzero_ps();
    __m256 accm  = _mm256_setzero_ps(); // odd lanes: m * s
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        const __m512i ql = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x[ib].ql));
        const __m512i qh = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x[ib].qh));
        // a | (b & c)
        const __m512i w01 = _mm512_ternarylogic_epi32(_mm512_and_si512(ql, low01), _mm512_rolv_epi64(qh, rol01), high01, 0xF8);
        const __m512i w23 = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srlv_epi64(ql, shift), low23), _mm512_rolv_epi64(qh, rol23), high23, 0xF8);

        const __m512i i01 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w01, mbq_load_q2(y));
        const __m512i i23 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w23, mbq_load_q2(y + 2));

        int32_t dm;
        memcpy(&dm, &x[ib], 4);
        const __m256 scales = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi32(dm)), undo), mbq_load_ds4(y));
        accm  = _mm256_add_ps(accm, scales);
        acc01 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i01), _mm512_permutexvar_ps(pick01, _mm512_castps256_ps512(scales)), acc01);
        acc23 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i23), _mm512_permutexvar_ps(pick23, _mm512_castps256_ps512(scales)), acc23);
    }
    accm = _mm256_blend_ps(_mm256_setzero_ps(), accm, 0xAA);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc01, acc23), _mm512_zextps256_ps512(accm)));
}

static float mbq3_64_dot(const block_mbq3_64 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    const __m512i low   = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x3030303030303030, 0x3030303030303030, 0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303);
    const __m512i high  = _mm512_set_epi64(0x0404040404040404, 0x0404040404040404, 0x4040404040404040, 0x4040404040404040, 0x1010101010101010, 0x1010101010101010, 0x0404040404040404, 0x0404040404040404);
    const __m512i shift = _mm512_set_epi64(6, 6, 0, 0, 0, 0, 0, 0);
    const __m512i rol   = _mm512_set_epi64(1, 2, 63, 0, 63, 0, 63, 0);
    const __m512i pick  = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512  undo  = _mm512_set_ps(1, 1, 1, 1, 1.0f/16, 1.0f/16, 1.0f/16, 1.0f/16, 1.0f/4, 1.0f/4, 1.0f/4, 1.0f/4, 1, 1, 1, 1);

    __m512 acc  = _mm512_setzero_ps();
    __m128 accm = _mm_setzero_ps(); // odd lanes: m * s
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        const __m512i ql = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x[ib].ql));
        int64_t high8;
        memcpy(&high8, x[ib].qh, 8);
        const __m512i qh = _mm512_set1_epi64(high8);
        const __m512i w  = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srlv_epi64(ql, shift), low), _mm512_rolv_epi64(qh, rol), high, 0xF8);
        const __m512i i  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, mbq_load_q2(y));

        int32_t dm;
        memcpy(&dm, &x[ib], 4);
        const __m128 scales = _mm_mul_ps(_mm_cvtph_ps(_mm_set1_epi32(dm)), mbq_load_ds2(y));
        accm = _mm_add_ps(accm, scales);
        acc  = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i), _mm512_permutexvar_ps(pick, _mm512_castps128_ps512(scales)), acc);
    }
    accm = _mm_blend_ps(_mm_setzero_ps(), accm, 0xA);
    return _mm512_reduce_add_ps(_mm512_fmadd_ps(acc, undo, _mm512_zextps128_ps512(accm)));
}

#elif defined(__AVX2__) && defined(__FMA__)
#define MBQ_SIMD

// Groups of 4 products summed, as float.
static inline __m256 mbq_dot4(__m256i w, __m256i q) {
#if defined(__AVXVNNI__)
    return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, q));
#else
    // at most 2 * 112 * 127 = 28448: no saturation
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(w, q), _mm256_set1_epi16(1)));
#endif
}

static inline float mbq_hsum(__m256 v) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

static float mbq3_dot(const block_mbq3 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    const __m256i half = _mm256_set_epi64x(1, 1, 0, 0);

    __m256 acc = _mm256_setzero_ps();
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 4) {
        const __m256i ql = _mm256_loadu_si256((const __m256i *) x[ib].ql);
        const __m256i qh = _mm256_srlv_epi64(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x[ib].qh)), half);
        const __m256i w0 = _mm256_or_si256(_mm256_and_si256(ql, _mm256_set1_epi8(0x03)), _mm256_and_si256(qh, _mm256_set1_epi8(0x04)));
        const __m256i w1 = _mm256_or_si256(_mm256_and_si256(ql, _mm256_set1_epi8(0x0C)), _mm256_and_si256(qh, _mm256_set1_epi8(0x10)));
        const __m256i w2 = _mm256_or_si256(_mm256_and_si256(ql, _mm256_set1_epi8(0x30)), _mm256_and_si256(qh, _mm256_set1_epi8(0x40)));
        const __m256i w3 = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(ql, 6), _mm256_set1_epi8(0x03)), _mm256_and_si256(_mm256_slli_epi16(qh, 2), _mm256_set1_epi8(0x04)));

        const float d = GGML_CPU_FP16_TO_FP32(x[ib].d);
        __m256 sum = _mm256_mul_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(y[0].d)), mbq_dot4(w0, _mm256_loadu_si256((const __m256i *) y[0].qs)));
        sum = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(y[1].d)*(1.0f/4)),  mbq_dot4(w1, _mm256_loadu_si256((const __m256i *) y[1].qs)), sum);
        sum = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(y[2].d)*(1.0f/16)), mbq_dot4(w2, _mm256_loadu_si256((const __m256i *) y[2].qs)), sum);
        sum = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(y[3].d)),           mbq_dot4(w3, _mm256_loadu_si256((const __m256i *) y[3].qs)), sum);
        acc = _mm256_fmadd_ps(_mm256_set1_ps(d), sum, acc);
        sumf += GGML_CPU_FP16_TO_FP32(x[ib].m)*(GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s) + GGML_CPU_FP16_TO_FP32(y[2].s) + GGML_CPU_FP16_TO_FP32(y[3].s));
    }
    return mbq_hsum(acc) + sumf;
}

static float mbq3_64_dot(const block_mbq3_64 * GGML_RESTRICT x, const block_q8_1 * GGML_RESTRICT y, int nb) {
    // one constant for each 8 or 16 bytes of [plane 0 | plane 1] and of [plane 2 | plane 3]
    const __m256i low01   = _mm256_set_epi64x(0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303);
    const __m256i low23   = _mm256_set_epi64x(0x0303030303030303, 0x0303030303030303, 0x3030303030303030, 0x3030303030303030);
    const __m256i high01  = _mm256_set_epi64x(0x1010101010101010, 0x1010101010101010, 0x0404040404040404, 0x0404040404040404);
    const __m256i high23  = _mm256_set_epi64x(0x0404040404040404, 0x0404040404040404, 0x4040404040404040, 0x4040404040404040);
    const __m256i half    = _mm256_set_epi64x(1, 0, 1, 0);
    const __m256i shift   = _mm256_set_epi64x(6, 6, 0, 0);
    const __m256i shift_h = _mm256_set_epi64x(2, 2, 0, 0);
    const __m256  undo01  = _mm256_set_ps(1.0f/4, 1.0f/4, 1.0f/4, 1.0f/4, 1, 1, 1, 1);
    const __m256  undo23  = _mm256_set_ps(1, 1, 1, 1, 1.0f/16, 1.0f/16, 1.0f/16, 1.0f/16);

    __m256 acc01 = _mm256_setzero_ps();
    __m256 acc23 = _mm256_setzero_ps();
    float sumf = 0.0f;
    for (int ib = 0; ib < nb; ++ib, y += 2) {
        const __m256i ql = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x[ib].ql));
        int64_t high8;
        memcpy(&high8, x[ib].qh, 8);
        const __m256i qh  = _mm256_srlv_epi64(_mm256_set1_epi64x(high8), half);
        const __m256i w01 = _mm256_or_si256(_mm256_and_si256(ql, low01), _mm256_and_si256(qh, high01));
        const __m256i w23 = _mm256_or_si256(_mm256_and_si256(_mm256_srlv_epi64(ql, shift), low23), _mm256_and_si256(_mm256_sllv_epi64(qh, shift_h), high23));

        const float d = GGML_CPU_FP16_TO_FP32(x[ib].d);
        acc01 = _mm256_fmadd_ps(_mm256_set1_ps(d*GGML_CPU_FP16_TO_FP32(y[0].d)), mbq_dot4(w01, _mm256_loadu_si256((const __m256i *) y[0].qs)), acc01);
        acc23 = _mm256_fmadd_ps(_mm256_set1_ps(d*GGML_CPU_FP16_TO_FP32(y[1].d)), mbq_dot4(w23, _mm256_loadu_si256((const __m256i *) y[1].qs)), acc23);
        sumf += GGML_CPU_FP16_TO_FP32(x[ib].m)*(GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s));
    }
    return mbq_hsum(_mm256_fmadd_ps(acc01, undo01, _mm256_mul_ps(acc23, undo23))) + sumf;
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
