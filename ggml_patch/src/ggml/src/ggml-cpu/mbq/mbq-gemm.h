#pragma once

// Parts of the matrix product of MBQ weights with several rows of activations: the layouts that both are converted to, and the kernel.
// Included only by mbq.cpp, if mbq-simd.h has vectors.

#include "mbq-panel.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

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

// Codes of one plane of 4*ROWS weights, from their low bits and high bits; half 1 uses the adjacent high bit.
template <int plane, int half>
mbq_simd::ivec codes_of(mbq_simd::ivec low, mbq_simd::ivec high) {
    constexpr int right = (2*plane + 2)%8 + half - 2; // moves the high bit to bit 2
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

// Unpacks ROWS rows of weights, row r at x + offset[r], to a slab.
template <typename B>
void unpack_slab(const uint8_t * x, const int32_t * offset, int64_t k, const slab & to) {
    constexpr int words = sizeof(B::ql)/4; // of a plane
    constexpr size_t plane_stride = words*ROWS*4;

    uint8_t * out = to.codes;
    for (int64_t ib = 0; ib < k/mbq_weights<B>; ++ib, x += sizeof(B), out += mbq_weights<B>*ROWS) {
        const lane_grids<B> grids(mbq_simd::gather(x, offset));
        for (int i = 0; i < mbq_grids<B>; ++i) {
            mbq_simd::fstore(to.d + (ib*mbq_grids<B> + i)*ROWS, grids.d[i]);
            mbq_simd::fstore(to.m + (ib*mbq_grids<B> + i)*ROWS, grids.m[i]);
        }
        for (int w = 0; w < words/2; ++w) {
            const mbq_simd::ivec high = mbq_simd::gather(x + offsetof(B, qh) + 4*w, offset);
            unpack_word<0>(mbq_simd::gather(x + offsetof(B, ql) + 4*w, offset), high, out + w*ROWS*4, plane_stride);
            unpack_word<1>(mbq_simd::gather(x + offsetof(B, ql) + 4*(w + words/2), offset), high, out + (w + words/2)*ROWS*4, plane_stride);
        }
    }
}

// ---- kernel

// Multiplies one slab with one panel of cols rows; stores nrows of the slab's rows, column c of the result at dst + c*stride.
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
                sum[c] = add_block(sum[c], mbq_simd::to_float(acc[c]), dw, d[c]);
            }
            q += cols*QK8_1;
            d += cols;
        }
        for (int c = 0; c < cols; ++c) {
            sum[c] = add_minimum(sum[c], mw, s[c]);
        }
        s += cols;
    }

    for (int c = 0; c < cols; ++c) {
        store_rows(dst + c*stride, sum[c], nrows);
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
