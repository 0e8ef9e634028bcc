#pragma once

// Shared by both products of mbq.cpp, so that a result does not depend on the number of rows of activations: the layout of activations and
// the order of float additions. Included if mbq-simd.h has vectors.
//
// The product of a row of weights with a row of activations, which become Q8_1; every operation is rounded to nearest separately:
//
//   sum = 0
//   for each group of weights on one grid { d, m }:
//       for each block of 32 of its activations { d8, q }:  sum = fma(float(the integer sum of code * q) * d, d8, sum)
//       sum = fma(m, the sum of the blocks' s, sum)

#include "mbq-block.h"
#include "mbq-simd.h"

#include "ggml-cpu-impl.h"
#include "quants.h"
#include "simd-mappings.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int ROWS = mbq_simd::rows;
constexpr int COLS = mbq_simd::cols;

constexpr size_t ALIGNMENT = 64;

// ---- the order of sums, one lane per row of weights

mbq_simd::fvec add_block(mbq_simd::fvec sum, mbq_simd::fvec dot, mbq_simd::fvec d, float d8) {
    return mbq_simd::fma(mbq_simd::mul(dot, d), d8, sum);
}

mbq_simd::fvec add_minimum(mbq_simd::fvec sum, mbq_simd::fvec m, float s) {
    return mbq_simd::fma(m, s, sum);
}

// the first nrows lanes
void store_rows(float * dst, mbq_simd::fvec sum, int nrows) {
    if (nrows == ROWS) {
        mbq_simd::fstore(dst, sum);
    } else {
        float tmp[ROWS];
        mbq_simd::fstore(tmp, sum);
        memcpy(dst, tmp, nrows*sizeof(float));
    }
}

// ---- grids of ROWS blocks of weights

template <typename B> struct lane_grids {
    mbq_simd::fvec d[mbq_grids<B>];
    mbq_simd::fvec m[mbq_grids<B>];

    // from the first 4 bytes of each block
    explicit lane_grids(mbq_simd::ivec words) {
        if constexpr (mbq_grids<B> == 1) {
            d[0] = mbq_simd::half_low(words);
            m[0] = mbq_simd::half_high(words);
        } else {
            const mbq_simd::ivec scale = mbq_simd::masked(mbq_simd::srl<1>(words), MBQ_SCALE_WORD_D);
            const mbq_simd::ivec zero  = mbq_simd::masked(words, MBQ_SCALE_WORD_Z);
            d[0] = mbq_simd::half_low(scale);
            d[1] = mbq_simd::half_high(scale);
            m[0] = mbq_simd::fma(mbq_simd::mul(d[0], mbq_simd::half_low(zero)),  MBQ_SCALE_WORD_M, mbq_simd::fzero());
            m[1] = mbq_simd::fma(mbq_simd::mul(d[1], mbq_simd::half_high(zero)), MBQ_SCALE_WORD_M, mbq_simd::fzero());
        }
    }
};

// ---- panels of activations: codes block by block, and within a block row by row, so that the kernel reads one stream; then scales and sums

struct panel {
    const int8_t * q; // [k/QK8_1][cols][QK8_1]
    const float  * d; // [k/QK8_1][cols]
    const float  * s; // [k/group][cols], sum of d * q
};

size_t panel_row_bytes(int64_t k, int64_t group) {
    return k + sizeof(float)*(k/QK8_1 + k/group);
}

panel panel_at(const uint8_t * base, int64_t k, int cols) {
    const int8_t * q = (const int8_t *) base;
    const float  * d = (const float *) (q + k*cols);
    return { q, d, d + k/QK8_1*cols };
}

constexpr int CHUNK = 16; // blocks of activations that a thread quantises at a time

// Quantises blocks first to first + n (at most CHUNK, first a multiple of it) of a row of activations to row col of a panel of cols.
template <int group>
void quantize_to_panel(const float * x, int64_t k, int64_t first, int64_t n, uint8_t * base, int col, int cols) {
    block_q8_1 tmp[CHUNK];
    quantize_row_q8_1(x + first*QK8_1, tmp, n*QK8_1);

    int8_t * q = (int8_t *) base;
    float  * d = (float *) (q + k*cols);
    float  * s = d + k/QK8_1*cols;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = (first + i)*cols + col;
        memcpy(q + at*QK8_1, tmp[i].qs, QK8_1);
        d[at] = GGML_CPU_FP16_TO_FP32(tmp[i].d);
        float & sum = s[(first + i)/(group/QK8_1)*cols + col];
        sum = i % (group/QK8_1) == 0 ? 0.0f : sum;
        sum += GGML_CPU_FP16_TO_FP32(tmp[i].s);
    }
}

} // namespace
