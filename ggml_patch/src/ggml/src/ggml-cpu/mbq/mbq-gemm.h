#pragma once

// Parts of the matrix product of MBQ weights with several rows of activations: the layouts that both are brought into, and the kernel.
// Included by mbq.cpp alone, where mbq-simd.h has vectors.

#include "mbq-block.h"
#include "mbq-simd.h"

#include "ggml-cpu-impl.h"
#include "quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int ROWS = mbq_simd::rows;
constexpr int COLS = mbq_simd::cols;

constexpr size_t ALIGNMENT = 64;

// ---- panels of activations: the codes block by block and in a block row by row, so that the kernel reads one stream; then scales and sums

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

// Blocks first to first + n (at most CHUNK, first a multiple of it) of a row of activations to row col of a panel of cols.
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

// ---- slabs of weights

struct slab {
    uint8_t * codes; // [k/4][ROWS][4]
    float   * d;     // [k/group][ROWS]
    float   * m;     // [k/group][ROWS]
};

size_t slab_bytes(int64_t k, int64_t group) {
    return GGML_PAD(ROWS*(k + 2*sizeof(float)*(k/group)), ALIGNMENT);
}

slab slab_at(uint8_t * base, int64_t k, int64_t group) {
    float * d = (float *) (base + ROWS*k);
    return { base, d, d + ROWS*(k/group) };
}

// Codes of one plane of the 4*ROWS weights whose low bits are in low, high bits in high: half 1 takes the neighbouring bit.
template <int plane, int half>
mbq_simd::ivec codes_of(mbq_simd::ivec low, mbq_simd::ivec high) {
    constexpr int right = (2*plane + 2)%8 + half - 2; // the high bit goes to bit 2
    if constexpr (right >= 0) {
        high = mbq_simd::srl<right>(high);
    } else {
        high = mbq_simd::sll<-right>(high);
    }
    return mbq_simd::merge(mbq_simd::masked(mbq_simd::srl<2*plane>(low), 0x03030303), mbq_simd::masked(high, 0x04040404));
}

template <int half>
void unpack_word(mbq_simd::ivec low, mbq_simd::ivec high, uint8_t * out, size_t plane_stride) {
    mbq_simd::store(out + 0*plane_stride, codes_of<0, half>(low, high));
    mbq_simd::store(out + 1*plane_stride, codes_of<1, half>(low, high));
    mbq_simd::store(out + 2*plane_stride, codes_of<2, half>(low, high));
    mbq_simd::store(out + 3*plane_stride, codes_of<3, half>(low, high));
}

// Scales and minimums of ROWS blocks, one a row, whose first 4 bytes are in words.
template <typename B>
void unpack_scales(mbq_simd::ivec words, float * d, float * m) {
    if constexpr (mbq_grids<B> == 1) {
        mbq_simd::fstore(d, mbq_simd::half_low(words));
        mbq_simd::fstore(m, mbq_simd::half_high(words));
    } else {
        const mbq_simd::ivec scale = mbq_simd::masked(mbq_simd::srl<1>(words), MBQ_SCALE_WORD_D);
        const mbq_simd::ivec zero  = mbq_simd::masked(words, MBQ_SCALE_WORD_Z);
        const mbq_simd::fvec d0 = mbq_simd::half_low(scale);
        const mbq_simd::fvec d1 = mbq_simd::half_high(scale);
        mbq_simd::fstore(d,        d0);
        mbq_simd::fstore(d + ROWS, d1);
        mbq_simd::fstore(m,        mbq_simd::fma(mbq_simd::mul(d0, mbq_simd::half_low(zero)),  MBQ_SCALE_WORD_M, mbq_simd::fzero()));
        mbq_simd::fstore(m + ROWS, mbq_simd::fma(mbq_simd::mul(d1, mbq_simd::half_high(zero)), MBQ_SCALE_WORD_M, mbq_simd::fzero()));
    }
}

// ROWS rows of weights, row r at x + offset[r], to a slab.
template <typename B>
void unpack_slab(const uint8_t * x, const int32_t * offset, int64_t k, const slab & to) {
    constexpr int words = sizeof(B::ql)/4; // of a plane
    constexpr size_t plane_stride = words*ROWS*4;

    uint8_t * out = to.codes;
    for (int64_t ib = 0; ib < k/mbq_weights<B>; ++ib, x += sizeof(B), out += mbq_weights<B>*ROWS) {
        unpack_scales<B>(mbq_simd::gather(x, offset), to.d + ib*mbq_grids<B>*ROWS, to.m + ib*mbq_grids<B>*ROWS);
        for (int w = 0; w < words/2; ++w) {
            const mbq_simd::ivec high = mbq_simd::gather(x + offsetof(B, qh) + 4*w, offset);
            unpack_word<0>(mbq_simd::gather(x + offsetof(B, ql) + 4*w, offset), high, out + w*ROWS*4, plane_stride);
            unpack_word<1>(mbq_simd::gather(x + offsetof(B, ql) + 4*(w + words/2), offset), high, out + (w + words/2)*ROWS*4, plane_stride);
        }
    }
}

// ---- kernel

// One slab times one panel of cols rows; nrows of the slab's rows are stored, column c of the result at dst + c*stride.
template <int group, int cols>
void multiply(const slab & x, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    mbq_simd::fvec sum[cols];
    for (int c = 0; c < cols; ++c) {
        sum[c] = mbq_simd::fzero();
    }

    const uint8_t * w = x.codes;
    const int8_t  * q = y.q;
    const float   * d = y.d;
    const float   * s = y.s;
    for (int64_t g = 0; g < k/group; ++g) {
        const mbq_simd::fvec dw = mbq_simd::fload(x.d + g*ROWS);
        const mbq_simd::fvec mw = mbq_simd::fload(x.m + g*ROWS);
        for (int b = 0; b < group/QK8_1; ++b) {
            mbq_simd::acc acc[cols];
            for (int c = 0; c < cols; ++c) {
                acc[c] = mbq_simd::zero();
            }
            for (int i = 0; i < QK8_1/4; ++i, w += 4*ROWS) {
                const mbq_simd::ivec codes = mbq_simd::load(w);
                for (int c = 0; c < cols; ++c) {
                    acc[c] = mbq_simd::dot(acc[c], codes, q + c*QK8_1 + 4*i);
                }
            }
            for (int c = 0; c < cols; ++c) {
                sum[c] = mbq_simd::fma(mbq_simd::mul(mbq_simd::to_float(acc[c]), dw), d[c], sum[c]);
            }
            q += cols*QK8_1;
            d += cols;
        }
        for (int c = 0; c < cols; ++c) {
            sum[c] = mbq_simd::fma(mw, s[c], sum[c]);
        }
        s += cols;
    }

    for (int c = 0; c < cols; ++c) {
        if (nrows == ROWS) {
            mbq_simd::fstore(dst + c*stride, sum[c]);
        } else {
            float tmp[ROWS];
            mbq_simd::fstore(tmp, sum[c]);
            memcpy(dst + c*stride, tmp, nrows*sizeof(float));
        }
    }
}

// multiply() for a number of columns known at run time
template <int group, int cols = COLS>
void multiply_any(int n, const slab & x, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    if constexpr (cols > 0) {
        if (n == cols) {
            multiply<group, cols>(x, y, k, dst, stride, nrows);
        } else {
            multiply_any<group, cols - 1>(n, x, y, k, dst, stride, nrows);
        }
    }
}

} // namespace
