#pragma once

// Products of several rows of MBQ weights with one row of activations (token generation): the lanes run along the row, as in
// mbq-vec.cpp, but the activations are read from a panel of one row, where codes and float scales lie dense, and serve several rows of
// weights at once. The next rows are fetched ahead: short rows end before the hardware has learnt where they go (Xeon with AMX, 2
// cores: 1.5 times the tokens a second). MBQ_GEMV_ROWS stays undefined where there is no such kernel.

#include "mbq-block.h"
#include "mbq-x86.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

#if defined(MBQ_AVX512) || defined(MBQ_AVX2)

// The scales of a block in each of rows rows (1 to 4), and for each row the sum of its minimums m times the sums of activations s.
template <int grids, int rows> struct mbq_scales;

template <int rows> struct mbq_scales<1, rows> {
    __m128 s;
    __m128 sum[rows]; // in element 1

    mbq_scales() {
        for (int r = 0; r < rows; ++r) {
            sum[r] = _mm_setzero_ps();
        }
    }

    // the next block of each row, stride bytes apart, and the sums of the activations that belong to it
    void next(const void *, size_t, const float * sums) { s = _mm_set1_ps(*sums); }

    // d of row r's block: element 0
    __m128 of(int r, const void * block) {
        int64_t v;
        memcpy(&v, block, 8);
        const __m128 dm = _mm_cvtph_ps(_mm_cvtsi64_si128(v)); // d, m, and two numbers that do not matter
        sum[r] = _mm_fmadd_ps(dm, s, sum[r]);
        return dm;
    }

    float minimums(int r) const { return _mm_cvtss_f32(_mm_movehdup_ps(sum[r])); }
};

// d of both halves of a block: elements first and first + 1
struct mbq_halves {
    __m256 d;
    int first;
};

template <int rows> struct mbq_scales<2, rows> {
    __m256 d; // of both halves, row by row
    __m256 sum = _mm256_setzero_ps();

    // the scale words of all rows at once: one by one they take twice the instructions
    void next(const void * block, size_t stride, const float * s) {
        int32_t word[4] = { 0, 0, 0, 0 };
        for (int r = 0; r < rows; ++r) {
            memcpy(&word[r], (const char *) block + r*stride, 4);
        }
        double s2;
        memcpy(&s2, s, 8);
        const __m128i words = _mm_set_epi32(word[3], word[2], word[1], word[0]);
        const __m256 z = _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi32(MBQ_SCALE_WORD_Z)));
        d   = _mm256_cvtph_ps(_mm_and_si128(_mm_srli_epi32(words, 1), _mm_set1_epi32(MBQ_SCALE_WORD_D)));
        sum = _mm256_fmadd_ps(_mm256_mul_ps(d, z), _mm256_castpd_ps(_mm256_set1_pd(s2)), sum);
    }

    mbq_halves of(int r, const void *) const { return { d, 2*r }; }

    float minimums(int r) const {
        alignas(32) float sums[8];
        _mm256_store_ps(sums, sum);
        return MBQ_SCALE_WORD_M*(sums[2*r] + sums[2*r + 1]);
    }
};

#endif

#if defined(MBQ_AVX512)

#define MBQ_GEMV_ROWS 4

using mbq_fvec = __m512;
inline mbq_fvec mbq_fzero(void) { return _mm512_setzero_ps(); }
inline float    mbq_fsum(mbq_fvec v) { return _mm512_reduce_add_ps(v); }
inline mbq_fvec mbq_first(__m128 v) { return _mm512_broadcastss_ps(v); }
inline mbq_fvec mbq_pick(__m256 v, __m512i element) { return _mm512_permutexvar_ps(element, _mm512_castps256_ps512(v)); }
inline mbq_fvec mbq_pick(__m256 v, int element) { return mbq_pick(v, _mm512_set1_epi32(element)); }
inline mbq_fvec mbq_fma(mbq_fvec a, mbq_fvec b, mbq_fvec c) { return _mm512_fmadd_ps(a, b, c); }
inline mbq_fvec mbq_mul(mbq_fvec a, mbq_fvec b) { return _mm512_mul_ps(a, b); }

// What one block of activations brings along for every row of weights; add() adds the product with one of its blocks.
template <int weights> struct mbq_acts;

template <> struct mbq_acts<128> {
    __m512i q01, q23;
    __m512  d01, d23;

    mbq_acts(const int8_t * q, const float * d) {
        const __m512 d4 = _mm512_broadcast_f32x4(_mm_loadu_ps(d));
        q01 = _mm512_loadu_si512(q);
        q23 = _mm512_loadu_si512(q + 64);
        d01 = _mm512_mul_ps(_mm512_permutevar_ps(d4, mbq_lanes_epi32(0, 0, 1, 1)), mbq3_undo01());
        d23 = _mm512_mul_ps(_mm512_permutevar_ps(d4, mbq_lanes_epi32(2, 2, 3, 3)), mbq3_undo23());
    }

    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, __m128 scale) const {
        return mbq_fma(mbq_fma(mbq_dot4(mbq3_codes23(x), q23), d23, mbq_mul(mbq_dot4(mbq3_codes01(x), q01), d01)), mbq_first(scale), acc);
    }
    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, mbq_halves scales) const {
        acc = mbq_fma(mbq_dot4(mbq3_codes01(x), q01), mbq_mul(d01, mbq_pick(scales.d, scales.first)), acc);
        return mbq_fma(mbq_dot4(mbq3_codes23(x), q23), mbq_mul(d23, mbq_pick(scales.d, scales.first + 1)), acc);
    }
};

template <> struct mbq_acts<64> {
    __m512i q0;
    __m512  d0;

    mbq_acts(const int8_t * q, const float * d) {
        double d2;
        memcpy(&d2, d, 8);
        q0 = _mm512_loadu_si512(q);
        d0 = _mm512_mul_ps(_mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(d2)), mbq_lanes_epi32(0, 0, 1, 1)), mbq3_64_undo());
    }

    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, __m128 scale) const {
        return mbq_fma(mbq_mul(mbq_dot4(mbq3_64_codes(x), q0), d0), mbq_first(scale), acc);
    }
    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, mbq_halves scales) const {
        const int i = scales.first;
        return mbq_fma(mbq_dot4(mbq3_64_codes(x), q0), mbq_mul(d0, mbq_pick(scales.d, mbq_lanes_epi32(i, i, i + 1, i + 1))), acc);
    }
};

#elif defined(MBQ_AVX2)

#define MBQ_GEMV_ROWS 2

using mbq_fvec = __m256;
inline mbq_fvec mbq_fzero(void) { return _mm256_setzero_ps(); }
inline float    mbq_fsum(mbq_fvec v) { return mbq_hsum(v); }
inline mbq_fvec mbq_first(__m128 v) { return _mm256_broadcastss_ps(v); }
inline mbq_fvec mbq_pick(__m256 v, int element) { return _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(element)); }
inline mbq_fvec mbq_fma(mbq_fvec a, mbq_fvec b, mbq_fvec c) { return _mm256_fmadd_ps(a, b, c); }
inline mbq_fvec mbq_mul(mbq_fvec a, mbq_fvec b) { return _mm256_mul_ps(a, b); }

template <int weights> struct mbq_acts;

template <> struct mbq_acts<128> {
    const int8_t * q;
    __m256 d[4];

    mbq_acts(const int8_t * q, const float * d) : q(q), d{ _mm256_set1_ps(d[0]), _mm256_set1_ps(d[1]/4), _mm256_set1_ps(d[2]/16), _mm256_set1_ps(d[3]) } {}

    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, __m128 scale) const {
        __m256 dot[4];
        dots(x, dot);
        return mbq_fma(mbq_fma(dot[3], d[3], mbq_fma(dot[2], d[2], mbq_fma(dot[1], d[1], mbq_mul(dot[0], d[0])))), mbq_first(scale), acc);
    }
    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, mbq_halves scales) const {
        __m256 dot[4];
        dots(x, dot);
        acc = mbq_fma(mbq_fma(dot[1], d[1], mbq_mul(dot[0], d[0])), mbq_pick(scales.d, scales.first), acc);
        return mbq_fma(mbq_fma(dot[3], d[3], mbq_mul(dot[2], d[2])), mbq_pick(scales.d, scales.first + 1), acc);
    }

private:
    template <typename B> void dots(const B * x, __m256 dot[4]) const {
        __m256i w[4];
        mbq3_codes(x, w);
        for (int i = 0; i < 4; ++i) {
            dot[i] = mbq_dot4(w[i], _mm256_loadu_si256((const __m256i *) (q + 32*i)));
        }
    }
};

template <> struct mbq_acts<64> {
    __m256i q01, q23;
    __m256  d01, d23;

    mbq_acts(const int8_t * q, const float * d) {
        q01 = _mm256_loadu_si256((const __m256i *) q);
        q23 = _mm256_loadu_si256((const __m256i *) (q + 32));
        d01 = _mm256_mul_ps(_mm256_set1_ps(d[0]), mbq3_64_undo01());
        d23 = _mm256_mul_ps(_mm256_set1_ps(d[1]), mbq3_64_undo23());
    }

    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, __m128 scale) const {
        __m256i w[2];
        mbq3_64_codes(x, w);
        return mbq_fma(mbq_fma(mbq_dot4(w[1], q23), d23, mbq_mul(mbq_dot4(w[0], q01), d01)), mbq_first(scale), acc);
    }
    template <typename B> mbq_fvec add(mbq_fvec acc, const B * x, mbq_halves scales) const {
        __m256i w[2];
        mbq3_64_codes(x, w);
        acc = mbq_fma(mbq_dot4(w[0], q01), mbq_mul(d01, mbq_pick(scales.d, scales.first)), acc);
        return mbq_fma(mbq_dot4(w[1], q23), mbq_mul(d23, mbq_pick(scales.d, scales.first + 1)), acc);
    }
};

#endif

#if defined(MBQ_GEMV_ROWS)

// rows rows of k weights, stride bytes apart, times the panel of one row q, d, s (see mbq.cpp)
template <int rows, typename B>
void mbq_gemv_rows(const B * x, size_t stride, int64_t k, const int8_t * q, const float * d, const float * s, float * dst) {
    mbq_scales<mbq_grids<B>, rows> scales;
    mbq_fvec acc[rows];
    for (int r = 0; r < rows; ++r) {
        acc[r] = mbq_fzero();
    }
    for (int64_t ib = 0; ib < k/mbq_weights<B>; ++ib) {
        const mbq_acts<mbq_weights<B>> acts(q + ib*mbq_weights<B>, d + ib*(mbq_weights<B>/QK8_1));
        scales.next(x + ib, stride, s + ib*mbq_grids<B>);
        for (int r = 0; r < rows; ++r) {
            const B * b = (const B *) ((const char *) x + r*stride) + ib;
            _mm_prefetch((const char *) b + rows*stride, _MM_HINT_T0);
            acc[r] = acts.add(acc[r], b, scales.of(r, b));
        }
    }
    for (int r = 0; r < rows; ++r) {
        dst[r] = mbq_fsum(acc[r]) + scales.minimums(r);
    }
}

#endif

} // namespace
