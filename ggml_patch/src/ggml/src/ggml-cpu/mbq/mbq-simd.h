#pragma once

// The vector types for the matrix products of mbq.cpp, with one lane per row of weights. Each instruction set defines
//
//   rows            lanes of a vector
//   cols            rows of activations that one pass of the kernel keeps in registers
//   ivec            rows x 32 bits: 4 adjacent bytes of each row
//   fvec            rows x float
//   acc             sums of the products over QK8_1 columns
//   gather(p, o)    the 32 bits at p + o[row], for each row
//   srl, sll        shifts of 32 bits; constants only
//   masked(v, m)    v & m, m 32 bits
//   dot(a, w, q)    a + products of the 4 codes (0 to 7) of each row in w with the 4 signed bytes at q
//   to_float(a)     acc to fvec
//
// MBQ_SIMD_ROWS is undefined without any of them.

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#define MBQ_SIMD_ROWS 16

struct mbq_simd {
    static constexpr int rows = MBQ_SIMD_ROWS;
    static constexpr int cols = 12; // 12 sums, 12 results and 4 more of 32 registers

    using ivec = __m512i;
    using fvec = __m512;
    using acc  = __m512i;

    static ivec gather(const uint8_t * p, const int32_t * offset) {
        return _mm512_i32gather_epi32(_mm512_loadu_si512(offset), p, 1);
    }
    template <int n> static ivec srl(ivec v) { return _mm512_srli_epi32(v, n); }
    template <int n> static ivec sll(ivec v) { return _mm512_slli_epi32(v, n); }
    static ivec masked(ivec v, int32_t m) { return _mm512_and_si512(v, _mm512_set1_epi32(m)); }
    static ivec merge(ivec a, ivec b) { return _mm512_or_si512(a, b); }
    static ivec load(const uint8_t * p) { return _mm512_load_si512(p); }
    static void store(uint8_t * p, ivec v) { _mm512_store_si512(p, v); }
    static fvec half_low (ivec v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
    static fvec half_high(ivec v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))); }

    static acc zero() { return _mm512_setzero_si512(); }
    static acc dot(acc a, ivec w, const int8_t * q) {
        int32_t q4;
        memcpy(&q4, q, 4);
        return _mm512_dpbusd_epi32(a, w, _mm512_set1_epi32(q4));
    }
    static fvec to_float(acc a) { return _mm512_cvtepi32_ps(a); }
    static fvec int_to_float(ivec a) { return _mm512_cvtepi32_ps(a); }

    static fvec fzero() { return _mm512_setzero_ps(); }
    static fvec fload(const float * p) { return _mm512_load_ps(p); }
    static void fstore(float * p, fvec v) { _mm512_storeu_ps(p, v); }
    static fvec mul(fvec a, fvec b) { return _mm512_mul_ps(a, b); }
    static fvec fma(fvec a, float b, fvec c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }
};

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#define MBQ_SIMD_ROWS 8

struct mbq_simd {
    static constexpr int rows = MBQ_SIMD_ROWS;
    static constexpr int cols = 4; // 16 registers

    using ivec = __m256i;
    using fvec = __m256;
    using acc  = __m256i;

    static ivec gather(const uint8_t * p, const int32_t * offset) {
        return _mm256_i32gather_epi32((const int *) p, _mm256_loadu_si256((const __m256i *) offset), 1);
    }
    template <int n> static ivec srl(ivec v) { return _mm256_srli_epi32(v, n); }
    template <int n> static ivec sll(ivec v) { return _mm256_slli_epi32(v, n); }
    static ivec masked(ivec v, int32_t m) { return _mm256_and_si256(v, _mm256_set1_epi32(m)); }
    static ivec merge(ivec a, ivec b) { return _mm256_or_si256(a, b); }
    static ivec load(const uint8_t * p) { return _mm256_load_si256((const __m256i *) p); }
    static void store(uint8_t * p, ivec v) { _mm256_store_si256((__m256i *) p, v); }
    static fvec half_low(ivec v) {
        const __m256i h = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
        return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
    }
    static fvec half_high(ivec v) { return half_low(_mm256_srli_epi32(v, 16)); }

    static acc zero() { return _mm256_setzero_si256(); }
    static acc dot(acc a, ivec w, const int8_t * q) {
        int32_t q4;
        memcpy(&q4, q, 4);
#if defined(__AVXVNNI__)
        return _mm256_dpbusd_avx_epi32(a, w, _mm256_set1_epi32(q4));
#else
        // 16 bits hold the 8 steps of QK8_1 columns: 8 * 2 * 7 * 127 = 14224
        return _mm256_add_epi16(a, _mm256_maddubs_epi16(w, _mm256_set1_epi32(q4)));
#endif
    }
    static fvec to_float(acc a) {
#if defined(__AVXVNNI__)
        return _mm256_cvtepi32_ps(a);
#else
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(a, _mm256_set1_epi16(1)));
#endif
    }

    static fvec int_to_float(ivec a) { return _mm256_cvtepi32_ps(a); }

    static fvec fzero() { return _mm256_setzero_ps(); }
    static fvec fload(const float * p) { return _mm256_load_ps(p); }
    static void fstore(float * p, fvec v) { _mm256_storeu_ps(p, v); }
    static fvec mul(fvec a, fvec b) { return _mm256_mul_ps(a, b); }
    static fvec fma(fvec a, float b, fvec c) { return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c); }
};

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD) && defined(__aarch64__)

#include <arm_neon.h>

#define MBQ_SIMD_ROWS 8

struct mbq_simd {
    static constexpr int rows = MBQ_SIMD_ROWS; // two registers, which share each broadcast of activations
    static constexpr int cols = 6;

    struct ivec { uint32x4_t v[2]; };
    struct fvec { float32x4_t v[2]; };
    struct acc  { int32x4_t v[2]; };

    static ivec gather(const uint8_t * p, const int32_t * offset) {
        uint32_t r[rows];
        for (int i = 0; i < rows; ++i) {
            memcpy(&r[i], p + offset[i], 4);
        }
        return {{ vld1q_u32(r), vld1q_u32(r + 4) }};
    }
    template <int n> static ivec srl(ivec v) {
        if constexpr (n == 0) {
            return v;
        } else {
            return {{ vshrq_n_u32(v.v[0], n), vshrq_n_u32(v.v[1], n) }};
        }
    }
    template <int n> static ivec sll(ivec v) { return {{ vshlq_n_u32(v.v[0], n), vshlq_n_u32(v.v[1], n) }}; }
    static ivec masked(ivec v, int32_t m) { return {{ vandq_u32(v.v[0], vdupq_n_u32(m)), vandq_u32(v.v[1], vdupq_n_u32(m)) }}; }
    static ivec merge(ivec a, ivec b) { return {{ vorrq_u32(a.v[0], b.v[0]), vorrq_u32(a.v[1], b.v[1]) }}; }
    static ivec load(const uint8_t * p) { return {{ vreinterpretq_u32_u8(vld1q_u8(p)), vreinterpretq_u32_u8(vld1q_u8(p + 16)) }}; }
    static void store(uint8_t * p, ivec v) {
        vst1q_u8(p,      vreinterpretq_u8_u32(v.v[0]));
        vst1q_u8(p + 16, vreinterpretq_u8_u32(v.v[1]));
    }
    static fvec half_low(ivec v) {
        return {{ vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(v.v[0]))), vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(v.v[1]))) }};
    }
    static fvec half_high(ivec v) { return half_low(srl<16>(v)); }

    static acc zero() { return {{ vdupq_n_s32(0), vdupq_n_s32(0) }}; }
    static acc dot(acc a, ivec w, const int8_t * q) {
        int32_t q4;
        memcpy(&q4, q, 4);
        const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(q4));
        return {{ vdotq_s32(a.v[0], vreinterpretq_s8_u32(w.v[0]), b), vdotq_s32(a.v[1], vreinterpretq_s8_u32(w.v[1]), b) }};
    }
    static fvec to_float(acc a) { return {{ vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1]) }}; }

    static fvec fzero() { return {{ vdupq_n_f32(0.0f), vdupq_n_f32(0.0f) }}; }
    static fvec fload(const float * p) { return {{ vld1q_f32(p), vld1q_f32(p + 4) }}; }
    static void fstore(float * p, fvec v) {
        vst1q_f32(p,     v.v[0]);
        vst1q_f32(p + 4, v.v[1]);
    }
    static fvec mul(fvec a, fvec b) { return {{ vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1]) }}; }
    static fvec fma(fvec a, float b, fvec c) { return {{ vfmaq_n_f32(c.v[0], a.v[0], b), vfmaq_n_f32(c.v[1], a.v[1], b) }}; }
};

#endif
