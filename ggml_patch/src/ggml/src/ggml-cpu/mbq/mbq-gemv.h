#pragma once

// Products of several rows of MBQ weights with one row of activations (token generation): the lanes run along the row, as in
// mbq-vec.c, but the activations are read from a panel of one row, where codes and float scales lie dense, and serve several rows of
// weights at once. MBQ_GEMV_ROWS stays undefined where there is no such kernel.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include "ggml-quants.h"

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MBQ_GEMV_ROWS 4

// 16 bytes times four: the same constant in each of the four 16-byte lanes
static inline __m512i mbq_lanes(int a, int b, int c, int d) {
    return _mm512_set_epi64(d*0x0101010101010101, d*0x0101010101010101, c*0x0101010101010101, c*0x0101010101010101,
                            b*0x0101010101010101, b*0x0101010101010101, a*0x0101010101010101, a*0x0101010101010101);
}

static inline __m512 mbq_lanes_ps(float a, float b, float c, float d) {
    return _mm512_set_ps(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
}

static inline __m512i mbq_lanes_epi32(int a, int b, int c, int d) {
    return _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
}

// d, m, and two numbers that do not matter
static inline __m128 mbq_load_dm(const void * block) {
    int64_t v;
    memcpy(&v, block, 8);
    return _mm_cvtph_ps(_mm_cvtsi64_si128(v));
}

template <int rows>
static void mbq_gemv_rows(const block_mbq3 * x, size_t stride, int64_t k, const int8_t * q, const float * d, const float * s, float * dst) {
    const __m512i low01  = mbq_lanes(0x03, 0x03, 0x0C, 0x0C); // plane 0 | plane 1
    const __m512i low23  = mbq_lanes(0x30, 0x30, 0x03, 0x03); // plane 2 | plane 3
    const __m512i high01 = mbq_lanes(0x04, 0x04, 0x10, 0x10);
    const __m512i high23 = mbq_lanes(0x40, 0x40, 0x04, 0x04);
    const __m512i shift  = mbq_lanes_epi32(0, 0, 6, 6);
    const __m512i rol01  = mbq_lanes_epi32(0, 31, 0, 31); // 31: one to the right
    const __m512i rol23  = mbq_lanes_epi32(0, 31, 2, 1);
    const __m512i pick01 = mbq_lanes_epi32(0, 0, 1, 1);
    const __m512i pick23 = mbq_lanes_epi32(2, 2, 3, 3);
    const __m512  undo01 = mbq_lanes_ps(1.0f, 1.0f, 1.0f/4, 1.0f/4);
    const __m512  undo23 = mbq_lanes_ps(1.0f/16, 1.0f/16, 1.0f, 1.0f);

    __m512 acc[rows];
    __m128 accm[rows];
    for (int r = 0; r < rows; ++r) {
        acc[r]  = _mm512_setzero_ps();
        accm[r] = _mm_setzero_ps();
    }
    for (int64_t g = 0; g < k/QKMBQ3; ++g) {
        const __m512i q01 = _mm512_loadu_si512(q + g*QKMBQ3);
        const __m512i q23 = _mm512_loadu_si512(q + g*QKMBQ3 + 64);
        const __m512  d4  = _mm512_broadcast_f32x4(_mm_loadu_ps(d + 4*g));
        const __m512  d01 = _mm512_mul_ps(_mm512_permutevar_ps(d4, pick01), undo01);
        const __m512  d23 = _mm512_mul_ps(_mm512_permutevar_ps(d4, pick23), undo23);
        const __m128  sg  = _mm_set1_ps(s[g]);
        for (int r = 0; r < rows; ++r) {
            const block_mbq3 * b = (const block_mbq3 *) ((const char *) x + r*stride) + g;
            const __m512i ql = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) b->ql));
            const __m512i qh = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) b->qh));
            // a | (b & c)
            const __m512i w01 = _mm512_ternarylogic_epi32(_mm512_and_si512(ql, low01), _mm512_rolv_epi32(qh, rol01), high01, 0xF8);
            const __m512i w23 = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srlv_epi32(ql, shift), low23), _mm512_rolv_epi32(qh, rol23), high23, 0xF8);
            const __m512  f01 = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w01, q01));
            const __m512  f23 = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w23, q23));
            const __m128  dm  = mbq_load_dm(b);
            acc[r]  = _mm512_fmadd_ps(_mm512_fmadd_ps(f23, d23, _mm512_mul_ps(f01, d01)), _mm512_broadcastss_ps(dm), acc[r]);
            accm[r] = _mm_fmadd_ps(dm, sg, accm[r]); // element 1: m * s
        }
    }
    for (int r = 0; r < rows; ++r) {
        dst[r] = _mm512_reduce_add_ps(acc[r]) + _mm_cvtss_f32(_mm_movehdup_ps(accm[r]));
    }
}

template <int rows>
static void mbq_gemv_rows(const block_mbq3_64 * x, size_t stride, int64_t k, const int8_t * q, const float * d, const float * s, float * dst) {
    const __m512i low   = mbq_lanes(0x03, 0x0C, 0x30, 0x03); // one plane in 16 bytes
    const __m512i high  = mbq_lanes(0x04, 0x10, 0x40, 0x04);
    const __m512i shift = mbq_lanes_epi32(0, 0, 0, 6);
    const __m512i rol   = _mm512_set_epi64(1, 2, 63, 0, 63, 0, 63, 0); // 63: one to the right
    const __m512i pick  = mbq_lanes_epi32(0, 0, 1, 1);
    const __m512  undo  = mbq_lanes_ps(1.0f, 1.0f/4, 1.0f/16, 1.0f);

    __m512 acc[rows];
    __m128 accm[rows];
    for (int r = 0; r < rows; ++r) {
        acc[r]  = _mm512_setzero_ps();
        accm[r] = _mm_setzero_ps();
    }
    for (int64_t g = 0; g < k/QKMBQ3_64; ++g) {
        const __m512i qg = _mm512_loadu_si512(q + g*QKMBQ3_64);
        double d2;
        memcpy(&d2, d + 2*g, 8);
        const __m512 dg = _mm512_mul_ps(_mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(d2)), pick), undo);
        const __m128 sg = _mm_set1_ps(s[g]);
        for (int r = 0; r < rows; ++r) {
            const block_mbq3_64 * b = (const block_mbq3_64 *) ((const char *) x + r*stride) + g;
            int64_t high8;
            memcpy(&high8, b->qh, 8);
            const __m512i ql = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) b->ql));
            const __m512i qh = _mm512_rolv_epi64(_mm512_set1_epi64(high8), rol);
            const __m512i w  = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srlv_epi32(ql, shift), low), qh, high, 0xF8);
            const __m512  f  = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, qg));
            const __m128  dm = mbq_load_dm(b);
            acc[r]  = _mm512_fmadd_ps(_mm512_mul_ps(f, dg), _mm512_broadcastss_ps(dm), acc[r]);
            accm[r] = _mm_fmadd_ps(dm, sg, accm[r]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        dst[r] = _mm512_reduce_add_ps(acc[r]) + _mm_cvtss_f32(_mm_movehdup_ps(accm[r]));
    }
}

#endif
