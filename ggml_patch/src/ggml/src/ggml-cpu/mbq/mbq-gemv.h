#pragma once

// Products of several rows of MBQ weights with one row of activations (token generation): the lanes run along the row, as in
// mbq-vec.c, but the activations are read from a panel of one row, where codes and float scales lie dense, and serve several rows of
// weights at once. The next rows are fetched ahead: short rows end before the hardware has learnt where they go (Xeon with AMX, 2
// cores: 1.5 times the tokens a second). MBQ_GEMV_ROWS stays undefined where there is no such kernel.

#include "ggml-quants.h"
#include "mbq-x86.h"

#include <stddef.h>

#if defined(MBQ_AVX512) || defined(MBQ_AVX2)

// d, m, and two numbers that do not matter
static inline __m128 mbq_load_dm(const void * block) {
    int64_t v;
    memcpy(&v, block, 8);
    return _mm_cvtph_ps(_mm_cvtsi64_si128(v));
}

#endif

#if defined(MBQ_AVX512)

#define MBQ_GEMV_ROWS 4

// what one block of activations brings along for every row of weights
struct mbq3_acts {
    __m512i q01, q23;
    __m512  d01, d23;

    mbq3_acts(const int8_t * q, const float * d) {
        const __m512 d4 = _mm512_broadcast_f32x4(_mm_loadu_ps(d));
        q01 = _mm512_loadu_si512(q);
        q23 = _mm512_loadu_si512(q + 64);
        d01 = _mm512_mul_ps(_mm512_permutevar_ps(d4, mbq_lanes_epi32(0, 0, 1, 1)), mbq3_undo01());
        d23 = _mm512_mul_ps(_mm512_permutevar_ps(d4, mbq_lanes_epi32(2, 2, 3, 3)), mbq3_undo23());
    }

    __m512 dot(const block_mbq3 * x) const {
        return _mm512_fmadd_ps(mbq_dot4(mbq3_codes23(x), q23), d23, _mm512_mul_ps(mbq_dot4(mbq3_codes01(x), q01), d01));
    }
};

struct mbq3_64_acts {
    __m512i q0;
    __m512  d0;

    mbq3_64_acts(const int8_t * q, const float * d) {
        double d2;
        memcpy(&d2, d, 8);
        q0 = _mm512_loadu_si512(q);
        d0 = _mm512_mul_ps(_mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(d2)), mbq_lanes_epi32(0, 0, 1, 1)), mbq3_64_undo());
    }

    __m512 dot(const block_mbq3_64 * x) const { return _mm512_mul_ps(mbq_dot4(mbq3_64_codes(x), q0), d0); }
};

using mbq_fvec = __m512;
static inline mbq_fvec mbq_fzero(void) { return _mm512_setzero_ps(); }
static inline mbq_fvec mbq_fma_first(mbq_fvec a, __m128 b, mbq_fvec c) { return _mm512_fmadd_ps(a, _mm512_broadcastss_ps(b), c); }
static inline float    mbq_fsum(mbq_fvec v) { return _mm512_reduce_add_ps(v); }

#elif defined(MBQ_AVX2)

#define MBQ_GEMV_ROWS 2

struct mbq3_acts {
    const int8_t * q;
    __m256 d[4];

    mbq3_acts(const int8_t * q, const float * d) : q(q), d{ _mm256_set1_ps(d[0]), _mm256_set1_ps(d[1]/4), _mm256_set1_ps(d[2]/16), _mm256_set1_ps(d[3]) } {}

    __m256 dot(const block_mbq3 * x) const {
        __m256i w[4];
        mbq3_codes(x, w);
        __m256 sum = _mm256_mul_ps(mbq_dot4(w[0], _mm256_loadu_si256((const __m256i *) q)), d[0]);
        for (int i = 1; i < 4; ++i) {
            sum = _mm256_fmadd_ps(mbq_dot4(w[i], _mm256_loadu_si256((const __m256i *) (q + 32*i))), d[i], sum);
        }
        return sum;
    }
};

struct mbq3_64_acts {
    __m256i q01, q23;
    __m256  d01, d23;

    mbq3_64_acts(const int8_t * q, const float * d) {
        q01 = _mm256_loadu_si256((const __m256i *) q);
        q23 = _mm256_loadu_si256((const __m256i *) (q + 32));
        d01 = _mm256_mul_ps(_mm256_set1_ps(d[0]), mbq3_64_undo01());
        d23 = _mm256_mul_ps(_mm256_set1_ps(d[1]), mbq3_64_undo23());
    }

    __m256 dot(const block_mbq3_64 * x) const {
        __m256i w[2];
        mbq3_64_codes(x, w);
        return _mm256_fmadd_ps(mbq_dot4(w[1], q23), d23, _mm256_mul_ps(mbq_dot4(w[0], q01), d01));
    }
};

using mbq_fvec = __m256;
static inline mbq_fvec mbq_fzero(void) { return _mm256_setzero_ps(); }
static inline mbq_fvec mbq_fma_first(mbq_fvec a, __m128 b, mbq_fvec c) { return _mm256_fmadd_ps(a, _mm256_broadcastss_ps(b), c); }
static inline float    mbq_fsum(mbq_fvec v) { return mbq_hsum(v); }

#endif

#if defined(MBQ_GEMV_ROWS)

template <typename B> struct mbq_acts;
template <> struct mbq_acts<block_mbq3>    { using type = mbq3_acts; };
template <> struct mbq_acts<block_mbq3_64> { using type = mbq3_64_acts; };

// rows rows of k weights, stride bytes apart, times the panel of one row q, d, s (see mbq.cpp)
template <int rows, typename B>
static void mbq_gemv_rows(const B * x, size_t stride, int64_t k, const int8_t * q, const float * d, const float * s, float * dst) {
    constexpr int group = 4*sizeof(B::ql);

    mbq_fvec acc[rows];
    __m128   accm[rows]; // element 1: sum of m * s
    for (int r = 0; r < rows; ++r) {
        acc[r]  = mbq_fzero();
        accm[r] = _mm_setzero_ps();
    }
    for (int64_t g = 0; g < k/group; ++g) {
        const typename mbq_acts<B>::type acts(q + g*group, d + g*(group/QK8_1));
        const __m128 sg = _mm_set1_ps(s[g]);
        for (int r = 0; r < rows; ++r) {
            const B * b = (const B *) ((const char *) x + r*stride) + g;
            _mm_prefetch((const char *) b + rows*stride, _MM_HINT_T0);
            const __m128 dm = mbq_load_dm(b);
            acc[r]  = mbq_fma_first(acts.dot(b), dm, acc[r]);
            accm[r] = _mm_fmadd_ps(dm, sg, accm[r]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        dst[r] = mbq_fsum(acc[r]) + _mm_cvtss_f32(_mm_movehdup_ps(accm[r]));
    }
}

#endif
