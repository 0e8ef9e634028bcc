#pragma once

// Extends the vectors of mbq-simd.h for the products of row-scale.cpp. Codes have 4 bits (0 to 15) or, wide, 8 bits. The offset is the
// difference between a stored code and its value, which is subtracted with the sum of the activations.
//
//   words(p, o, v)        the 4 words of 4 bytes at p + o[row], for each row: v[i] has word i of all rows
//   zero_point(wide)      that offset
//   stored(v)             wide codes as needed by dot
//   dot<wide>(a, w, q)    a + products of the 4 codes of each row in w with the 4 signed bytes at q, at most 8 times before fold
//   fold<wide>(sum, a)    sum + a, 32 bits
//   epilogue(sum, o, d, s) ((float) (sum - o) * d) * s

#include "mbq-simd.h"

#include <stdint.h>

#ifdef MBQ_SIMD_ROWS

struct row_scale_simd : mbq_simd {
#if defined(__AVX2__)
    static __m128i load16(const uint8_t * p) { return _mm_loadu_si128((const __m128i *) p); }
#endif

#if MBQ_SIMD_ROWS == 16

    static void words(const uint8_t * p, const int32_t * o, ivec v[4]) {
        ivec row[4]; // in 16 bytes i of row[r] row 4*i + r
        for (int r = 0; r < 4; ++r) {
            row[r] = _mm512_castsi128_si512(load16(p + o[r]));
            row[r] = _mm512_inserti32x4(row[r], load16(p + o[r +  4]), 1);
            row[r] = _mm512_inserti32x4(row[r], load16(p + o[r +  8]), 2);
            row[r] = _mm512_inserti32x4(row[r], load16(p + o[r + 12]), 3);
        }
        const ivec ab0 = _mm512_unpacklo_epi32(row[0], row[1]), ab1 = _mm512_unpackhi_epi32(row[0], row[1]);
        const ivec cd0 = _mm512_unpacklo_epi32(row[2], row[3]), cd1 = _mm512_unpackhi_epi32(row[2], row[3]);
        v[0] = _mm512_unpacklo_epi64(ab0, cd0);
        v[1] = _mm512_unpackhi_epi64(ab0, cd0);
        v[2] = _mm512_unpacklo_epi64(ab1, cd1);
        v[3] = _mm512_unpackhi_epi64(ab1, cd1);
    }

    static constexpr int zero_point(bool wide) { return wide ? 128 : 8; }
    static ivec stored(ivec v) { return _mm512_xor_si512(v, _mm512_set1_epi32((int) 0x80808080)); }

    template <bool wide> static acc dot(acc a, ivec w, const int8_t * q) { return mbq_simd::dot(a, w, q); }
    template <bool wide> static acc fold(acc sum, acc a) { return _mm512_add_epi32(sum, a); }

    static void epilogue(float * y, acc sum, int32_t o, const float * d, float s) {
        const fvec v = to_float(_mm512_sub_epi32(sum, _mm512_set1_epi32(o)));
        fstore(y, mul(mul(v, _mm512_loadu_ps(d)), _mm512_set1_ps(s)));
    }

#elif defined(__AVX2__)

    static void words(const uint8_t * p, const int32_t * o, ivec v[4]) {
        ivec row[4]; // in 16 bytes i of row[r] row 4*i + r
        for (int r = 0; r < 4; ++r) {
            row[r] = _mm256_set_m128i(load16(p + o[r + 4]), load16(p + o[r]));
        }
        const ivec ab0 = _mm256_unpacklo_epi32(row[0], row[1]), ab1 = _mm256_unpackhi_epi32(row[0], row[1]);
        const ivec cd0 = _mm256_unpacklo_epi32(row[2], row[3]), cd1 = _mm256_unpackhi_epi32(row[2], row[3]);
        v[0] = _mm256_unpacklo_epi64(ab0, cd0);
        v[1] = _mm256_unpackhi_epi64(ab0, cd0);
        v[2] = _mm256_unpacklo_epi64(ab1, cd1);
        v[3] = _mm256_unpackhi_epi64(ab1, cd1);
    }

#if defined(__AVXVNNI__)
    static constexpr int zero_point(bool wide) { return wide ? 128 : 8; }
    static ivec stored(ivec v) { return _mm256_xor_si256(v, _mm256_set1_epi32((int) 0x80808080)); }
#else
    static constexpr int zero_point(bool wide) { return wide ? 0 : 8; }
    static ivec stored(ivec v) { return v; }
#endif

    template <bool wide> static acc dot(acc a, ivec w, const int8_t * q) {
#if !defined(__AVXVNNI__)
        if constexpr (wide) {
            int32_t q4;
            memcpy(&q4, q, 4);
            // 2 * 128 * 127 = 32512: 16 bits hold one step
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(q4), w));
            return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
#endif
        return mbq_simd::dot(a, w, q); // without VNNI 16 bits hold 8 steps: 8 * 2 * 15 * 127 = 30480
    }
    template <bool wide> static acc fold(acc sum, acc a) {
#if !defined(__AVXVNNI__)
        if constexpr (!wide) {
            a = _mm256_madd_epi16(a, _mm256_set1_epi16(1));
        }
#endif
        return _mm256_add_epi32(sum, a);
    }

    static void epilogue(float * y, acc sum, int32_t o, const float * d, float s) {
        const fvec v = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(o)));
        fstore(y, mul(mul(v, _mm256_loadu_ps(d)), _mm256_set1_ps(s)));
    }

#else

    static void words(const uint8_t * p, const int32_t * o, ivec v[4]) {
        for (int i = 0; i < 4; ++i) {
            v[i] = gather(p + 4*i, o);
        }
    }

    static constexpr int zero_point(bool wide) { return wide ? 0 : 8; }
    static ivec stored(ivec v) { return v; }

    template <bool wide> static acc dot(acc a, ivec w, const int8_t * q) { return mbq_simd::dot(a, w, q); }
    template <bool wide> static acc fold(acc sum, acc a) { return {{ vaddq_s32(sum.v[0], a.v[0]), vaddq_s32(sum.v[1], a.v[1]) }}; }

    static void epilogue(float * y, acc sum, int32_t o, const float * d, float s) {
        for (int i = 0; i < 2; ++i) {
            const float32x4_t v = vcvtq_f32_s32(vsubq_s32(sum.v[i], vdupq_n_s32(o)));
            vst1q_f32(y + 4*i, vmulq_n_f32(vmulq_f32(v, vld1q_f32(d + 4*i)), s));
        }
    }

#endif
};

// ---- along one row of weights, for a single row of activations: 32 codes times 32 activations

struct row_scale_line {
#if defined(__AVX2__)

    using acc = __m256i;
    static constexpr int zero_point(bool wide) { return row_scale_simd::zero_point(wide); }
    static acc zero() { return _mm256_setzero_si256(); }
    static acc activations(const int8_t * q) { return _mm256_loadu_si256((const __m256i *) q); }

    // at most 8 times before fold
    template <bool wide> static acc add(acc a, const uint8_t * w, acc q) {
        __m256i codes;
        if constexpr (wide) {
            codes = _mm256_loadu_si256((const __m256i *) w);
        } else {
            const __m128i v = _mm_loadu_si128((const __m128i *) w);
            codes = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
        }
#if defined(__AVXVNNI__) || MBQ_SIMD_ROWS == 16
        if constexpr (wide) {
            codes = _mm256_xor_si256(codes, _mm256_set1_epi8((char) 0x80));
        }
#if MBQ_SIMD_ROWS == 16
        return _mm256_dpbusd_epi32(a, codes, q);
#else
        return _mm256_dpbusd_avx_epi32(a, codes, q);
#endif
#else
        if constexpr (wide) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes));
            return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        return _mm256_add_epi16(a, _mm256_maddubs_epi16(codes, q));
#endif
    }

    template <bool wide> static acc fold(acc sum, acc a) {
#if !defined(__AVXVNNI__) && MBQ_SIMD_ROWS != 16
        if constexpr (!wide) {
            a = _mm256_madd_epi16(a, _mm256_set1_epi16(1));
        }
#endif
        return _mm256_add_epi32(sum, a);
    }

    static int32_t total(acc sum) {
        __m128i r = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 0xB1)));
    }

#else

    struct pair { int8x16_t v[2]; };
    using acc = int32x4_t;
    static constexpr int zero_point(bool wide) { return wide ? 0 : 8; }
    static acc zero() { return vdupq_n_s32(0); }
    static pair activations(const int8_t * q) { return {{ vld1q_s8(q), vld1q_s8(q + 16) }}; }

    template <bool wide> static acc add(acc a, const uint8_t * w, const pair & q) {
        if constexpr (wide) {
            return vdotq_s32(vdotq_s32(a, vld1q_s8((const int8_t *) w), q.v[0]), vld1q_s8((const int8_t *) w + 16), q.v[1]);
        } else {
            const uint8x16_t v = vld1q_u8(w);
            a = vdotq_s32(a, vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15))), q.v[0]);
            return vdotq_s32(a, vreinterpretq_s8_u8(vshrq_n_u8(v, 4)), q.v[1]);
        }
    }

    template <bool wide> static acc fold(acc sum, acc a) { return vaddq_s32(sum, a); }

    static int32_t total(acc sum) { return vaddvq_s32(sum); }

#endif
};

#endif
