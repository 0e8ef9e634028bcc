#pragma once

// Products of ROWS rows of MBQ weights with one row of activations (token generation). The integer products run along the stored rows, without
// unpacking a slab; their sums are then collected in one vector with one lane per row, and from there the order is that of mbq-panel.h. The
// next rows are prefetched, because short rows end before the hardware prefetcher adapts (Xeon with AMX, 2 cores: 1.5 times the tokens per
// second). MBQ_GEMV is undefined if there is no such kernel.

#include "mbq-panel.h"
#include "mbq-x86.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(MBQ_AVX512) || defined(MBQ_AVX2)

#define MBQ_GEMV

namespace {

using mbq_ivec = mbq_simd::ivec;

// vectors of codes per block; each covers VECTOR_BLOCKS blocks of activations
template <typename B> constexpr int mbq_vectors = mbq_weights<B>/(int) sizeof(mbq_ivec);
constexpr int VECTOR_BLOCKS = sizeof(mbq_ivec)/QK8_1;

#if defined(MBQ_AVX512)

inline mbq_ivec mbq_load(const int8_t * q) { return _mm512_loadu_si512(q); }

// Sums of pairs, alternating a and b; then of the 4 numbers in each 16 bytes, of a, b, c and d
inline mbq_ivec mbq_sum_pairs(mbq_ivec a, mbq_ivec b)   { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
inline mbq_ivec mbq_sum_fours(mbq_ivec ab, mbq_ivec cd) { return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)); }

// all vectors of codes of a block, and the left shift of each 16 bytes of vector i
template <typename B> void mbq_codes(const B * x, mbq_ivec w[mbq_vectors<B>]) {
    if constexpr (mbq_weights<B> == 64) {
        w[0] = mbq3_64_codes(x);
    } else {
        w[0] = mbq3_codes01(x);
        w[1] = mbq3_codes23(x);
    }
}
template <typename B> mbq_ivec mbq_excess(int i) {
    if constexpr (mbq_weights<B> == 64) {
        return mbq_lanes_epi32(0, 2, 4, 0);
    } else {
        return i == 0 ? mbq_lanes_epi32(0, 0, 2, 2) : mbq_lanes_epi32(4, 4, 0, 0);
    }
}
inline mbq_ivec mbq_shift(mbq_ivec v, mbq_ivec n) { return _mm512_srav_epi32(v, n); }

// Combines the sums of 16 bytes of 4 times 4 rows to sums of 32 bytes, i.e. of one block of activations, of 16 rows.
inline void mbq_join(const mbq_ivec part[4], mbq_ivec dot[2]) {
    const mbq_ivec ab = _mm512_add_epi32(_mm512_shuffle_i32x4(part[0], part[1], 0x88), _mm512_shuffle_i32x4(part[0], part[1], 0xDD));
    const mbq_ivec cd = _mm512_add_epi32(_mm512_shuffle_i32x4(part[2], part[3], 0x88), _mm512_shuffle_i32x4(part[2], part[3], 0xDD));
    dot[0] = _mm512_shuffle_i32x4(ab, cd, 0x88);
    dot[1] = _mm512_shuffle_i32x4(ab, cd, 0xDD);
}

#else

inline mbq_ivec mbq_load(const int8_t * q) { return _mm256_loadu_si256((const __m256i *) q); }

inline mbq_ivec mbq_sum_pairs(mbq_ivec a, mbq_ivec b)   { return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); }
inline mbq_ivec mbq_sum_fours(mbq_ivec ab, mbq_ivec cd) { return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd)); }

template <typename B> void mbq_codes(const B * x, mbq_ivec w[mbq_vectors<B>]) {
    if constexpr (mbq_weights<B> == 64) {
        mbq3_64_codes(x, w);
    } else {
        mbq3_codes(x, w);
    }
}
template <typename B> mbq_ivec mbq_excess(int i) {
    if constexpr (mbq_weights<B> == 64) {
        return i == 0 ? _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0) : _mm256_set_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    } else {
        return _mm256_set1_epi32(i % 3 * 2);
    }
}
inline mbq_ivec mbq_shift(mbq_ivec v, mbq_ivec n) { return _mm256_srav_epi32(v, n); }

inline void mbq_join(const mbq_ivec part[2], mbq_ivec dot[1]) {
    dot[0] = _mm256_add_epi32(_mm256_permute2x128_si256(part[0], part[1], 0x20), _mm256_permute2x128_si256(part[0], part[1], 0x31));
}

#endif

// The products of a block with its activations, 4 summed
template <typename B>
inline void mbq_row_dots(const uint8_t * x, const int8_t * q, mbq_ivec v[mbq_vectors<B>]) {
    mbq_ivec w[mbq_vectors<B>];
    mbq_codes((const B *) x, w);
    for (int i = 0; i < mbq_vectors<B>; ++i) {
        v[i] = mbq_dot4_int(w[i], mbq_load(q + i*sizeof(mbq_ivec)));
    }
}

// The same for two rows with pairs summed, alternating a and b
template <typename B>
inline void mbq_two_rows(const uint8_t * a, const uint8_t * b, const int8_t * q, mbq_ivec ab[mbq_vectors<B>]) {
    mbq_ivec va[mbq_vectors<B>], vb[mbq_vectors<B>];
    mbq_row_dots<B>(a, q, va);
    mbq_row_dots<B>(b, q, vb);
    for (int i = 0; i < mbq_vectors<B>; ++i) {
        ab[i] = mbq_sum_pairs(va[i], vb[i]);
    }
}

// The products of ROWS blocks with their activations, as integers: dot[b] with block b of these
template <typename B>
void mbq_lane_dots(const uint8_t * x, const int32_t * offset, const int8_t * q, mbq_ivec dot[mbq_weights<B>/QK8_1]) {
    mbq_ivec part[mbq_vectors<B>][ROWS/4];
    for (int r = 0; r < ROWS/4; ++r) {
        mbq_ivec ab[mbq_vectors<B>], cd[mbq_vectors<B>];
        mbq_two_rows<B>(x + offset[4*r],     x + offset[4*r + 1], q, ab);
        mbq_two_rows<B>(x + offset[4*r + 2], x + offset[4*r + 3], q, cd);
        for (int i = 0; i < mbq_vectors<B>; ++i) {
            part[i][r] = mbq_shift(mbq_sum_fours(ab[i], cd[i]), mbq_excess<B>(i));
        }
    }
    for (int i = 0; i < mbq_vectors<B>; ++i) {
        mbq_join(part[i], dot + i*VECTOR_BLOCKS);
    }
}

// loads the first 4 bytes of each block; faster than AVX2's gather
inline mbq_ivec mbq_load_words(const uint8_t * x, const int32_t * offset) {
    alignas(sizeof(mbq_ivec)) uint8_t words[4*ROWS];
    for (int r = 0; r < ROWS; ++r) {
        memcpy(words + 4*r, x + offset[r], 4);
    }
    return mbq_simd::load(words);
}

// Multiplies ROWS rows of k weights, row r at x + offset[r], with a panel of one row; stores nrows of them. ahead: offset in bytes of rows to prefetch
template <typename B>
void mbq_gemv(const uint8_t * x, const int32_t * offset, size_t ahead, int64_t k, const panel & y, float * dst, int nrows) {
    constexpr int blocks = mbq_group<B>/QK8_1;

    mbq_simd::fvec sum = mbq_simd::fzero();
    const int8_t * q = y.q;
    const float  * d = y.d;
    const float  * s = y.s;
    for (int64_t ib = 0; ib < k/mbq_weights<B>; ++ib, x += sizeof(B), q += mbq_weights<B>, s += mbq_grids<B>) {
        for (int r = 0; r < ROWS; ++r) {
            _mm_prefetch((const char *) x + offset[r] + ahead, _MM_HINT_T0);
        }
        mbq_ivec dot[mbq_weights<B>/QK8_1];
        mbq_lane_dots<B>(x, offset, q, dot);
        const lane_grids<B> grids(mbq_load_words(x, offset));
        for (int g = 0; g < mbq_grids<B>; ++g) {
            for (int b = 0; b < blocks; ++b) {
                sum = add_block(sum, mbq_simd::int_to_float(dot[g*blocks + b]), grids.d[g], *d++);
            }
            sum = add_minimum(sum, grids.m[g], s[g]);
        }
    }
    store_rows(dst, sum, nrows);
}

} // namespace

#endif
