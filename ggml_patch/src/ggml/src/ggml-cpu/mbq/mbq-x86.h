#pragma once

// Codes of one block in vector registers, for x86: mbq3_* for blocks of 128 weights, mbq3_64_* for blocks of 64. Planes 0 to 2 are multiplied
// by 1, 4 and 16 (two masks, no shift; see ggml-mbq-common.h), which mbq*_undo* divides out exactly.
//
// MBQ_AVX512 or MBQ_AVX2 is defined if the functions exist.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#define MBQ_AVX512

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// one byte for each of the four 16-byte lanes
static inline __m512i mbq_lanes(int a, int b, int c, int d) {
    const int64_t ones = 0x0101010101010101;
    return _mm512_set_epi64(d*ones, d*ones, c*ones, c*ones, b*ones, b*ones, a*ones, a*ones);
}

static inline __m512i mbq_lanes_epi32(int a, int b, int c, int d) {
    return _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
}

static inline __m512 mbq_lanes_ps(float a, float b, float c, float d) {
    return _mm512_set_ps(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
}

static inline __m512i mbq_or_and(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0xF8); // a | (b & c)
}

// plane 0 | plane 1
template <typename B>
static inline __m512i mbq3_codes01(const B * x) {
    const __m512i ql = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x->ql));
    const __m512i qh = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x->qh));
    const __m512i high = _mm512_rolv_epi32(qh, mbq_lanes_epi32(0, 31, 0, 31)); // 31: one to the right
    return mbq_or_and(_mm512_and_si512(ql, mbq_lanes(0x03, 0x03, 0x0C, 0x0C)), high, mbq_lanes(0x04, 0x04, 0x10, 0x10));
}

// plane 2 | plane 3
template <typename B>
static inline __m512i mbq3_codes23(const B * x) {
    const __m512i ql = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x->ql));
    const __m512i qh = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x->qh));
    const __m512i low  = _mm512_srlv_epi32(ql, mbq_lanes_epi32(0, 0, 6, 6));
    const __m512i high = _mm512_rolv_epi32(qh, mbq_lanes_epi32(0, 31, 2, 1));
    return mbq_or_and(_mm512_and_si512(low, mbq_lanes(0x30, 0x30, 0x03, 0x03)), high, mbq_lanes(0x40, 0x40, 0x04, 0x04));
}

static inline __m512 mbq3_undo01(void) { return mbq_lanes_ps(1.0f,    1.0f,    1.0f/4, 1.0f/4); }
static inline __m512 mbq3_undo23(void) { return mbq_lanes_ps(1.0f/16, 1.0f/16, 1.0f,   1.0f);   }

// plane 0 | plane 1 | plane 2 | plane 3
template <typename B>
static inline __m512i mbq3_64_codes(const B * x) {
    int64_t qh;
    memcpy(&qh, x->qh, 8);
    const __m512i ql   = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x->ql));
    const __m512i low  = _mm512_srlv_epi32(ql, mbq_lanes_epi32(0, 0, 0, 6));
    const __m512i high = _mm512_rolv_epi64(_mm512_set1_epi64(qh), _mm512_set_epi64(1, 2, 63, 0, 63, 0, 63, 0)); // 63: one to the right
    return mbq_or_and(_mm512_and_si512(low, mbq_lanes(0x03, 0x0C, 0x30, 0x03)), high, mbq_lanes(0x04, 0x10, 0x40, 0x04));
}

static inline __m512 mbq3_64_undo(void) { return mbq_lanes_ps(1.0f, 1.0f/4, 1.0f/16, 1.0f); }

// groups of 4 products summed, as integers and as float
static inline __m512i mbq_dot4_int(__m512i w, __m512i q) {
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, q);
}

static inline __m512 mbq_dot4(__m512i w, __m512i q) {
    return _mm512_cvtepi32_ps(mbq_dot4_int(w, q));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define MBQ_AVX2

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static inline __m256i mbq_merge(__m256i ql, __m256i qh, __m256i low, __m256i high) {
    return _mm256_or_si256(_mm256_and_si256(ql, low), _mm256_and_si256(qh, high));
}

// one plane in each of w
template <typename B>
static inline void mbq3_codes(const B * x, __m256i w[4]) {
    const __m256i ql = _mm256_loadu_si256((const __m256i *) x->ql);
    const __m256i h  = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x->qh));
    const __m256i qh = _mm256_srlv_epi64(h, _mm256_set_epi64x(1, 1, 0, 0));
    w[0] = mbq_merge(ql, qh, _mm256_set1_epi8(0x03), _mm256_set1_epi8(0x04));
    w[1] = mbq_merge(ql, qh, _mm256_set1_epi8(0x0C), _mm256_set1_epi8(0x10));
    w[2] = mbq_merge(ql, qh, _mm256_set1_epi8(0x30), _mm256_set1_epi8(0x40));
    w[3] = mbq_merge(_mm256_srli_epi16(ql, 6), _mm256_slli_epi16(qh, 2), _mm256_set1_epi8(0x03), _mm256_set1_epi8(0x04));
}

// plane 0 | plane 1 and plane 2 | plane 3
template <typename B>
static inline void mbq3_64_codes(const B * x, __m256i w[2]) {
    int64_t h;
    memcpy(&h, x->qh, 8);
    const __m256i ql = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x->ql));
    const __m256i qh = _mm256_srlv_epi64(_mm256_set1_epi64x(h), _mm256_set_epi64x(1, 0, 1, 0));
    const int64_t ones = 0x0101010101010101;
    w[0] = mbq_merge(ql, qh,
        _mm256_set_epi64x(0x0C*ones, 0x0C*ones, 0x03*ones, 0x03*ones), _mm256_set_epi64x(0x10*ones, 0x10*ones, 0x04*ones, 0x04*ones));
    w[1] = mbq_merge(_mm256_srlv_epi64(ql, _mm256_set_epi64x(6, 6, 0, 0)), _mm256_sllv_epi64(qh, _mm256_set_epi64x(2, 2, 0, 0)),
        _mm256_set_epi64x(0x03*ones, 0x03*ones, 0x30*ones, 0x30*ones), _mm256_set_epi64x(0x04*ones, 0x04*ones, 0x40*ones, 0x40*ones));
}

static inline __m256 mbq3_64_undo01(void) { return _mm256_set_ps(1.0f/4, 1.0f/4, 1.0f/4, 1.0f/4, 1.0f, 1.0f, 1.0f, 1.0f); }
static inline __m256 mbq3_64_undo23(void) { return _mm256_set_ps(1.0f, 1.0f, 1.0f, 1.0f, 1.0f/16, 1.0f/16, 1.0f/16, 1.0f/16); }

static inline __m256i mbq_dot4_int(__m256i w, __m256i q) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, q);
#else
    // at most 2 * 112 * 127 = 28448: no saturation
    return _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), _mm256_set1_epi16(1));
#endif
}

static inline __m256 mbq_dot4(__m256i w, __m256i q) {
    return _mm256_cvtepi32_ps(mbq_dot4_int(w, q));
}

static inline float mbq_hsum(__m256 v) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

#endif
