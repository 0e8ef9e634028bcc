#pragma once

// Products of row-scale.cpp with several rows of activations: weights are unpacked once, to slabs, and multiplied with every panel.

#include "row-scale-amx.h"
#include "row-scale-panel.h"
#include "row-scale-simd.h"

namespace {

using simd = row_scale_simd;

constexpr int ROWS = simd::rows;
#if MBQ_SIMD_ROWS == 8 && defined(__AVX2__)
constexpr int COLS = 6; // sums of 16 and of 32 bits in 12 of 16 registers
#else
constexpr int COLS = simd::cols;
#endif

constexpr int64_t SLABS_MAX = 8;

#ifdef ROW_SCALE_AMX
constexpr size_t SLABS_BYTES = 1024*1024; // unpacked weights that a thread keeps: within its L2 cache
#else
constexpr size_t SLABS_BYTES = 512*1024;
#endif

// ---- slabs of weights: codes [k/4][ROWS][4], then one scale per row

size_t slab_bytes(int64_t k) { return GGML_PAD(ROWS*(k + sizeof(float)), ALIGNMENT); }

// filled: the columns of a slab; k, or more with tiles, whose extra activations are 0
template <typename B>
void unpack_slab(const uint8_t * x, const int32_t * offset, int64_t k, int64_t filled, uint8_t * out) {
    for (int r = 0; r < ROWS; ++r) {
        ((float *) (out + ROWS*filled))[r] = scale_of((const B *) (x + offset[r]));
    }
    for (int64_t b = 0; b < k/QK; ++b, x += sizeof(B), out += QK*ROWS) {
        for (int half = 0; half < (int) sizeof(B::qs)/16; ++half) {
            simd::ivec v[4];
            simd::words(x + offsetof(B, qs) + 16*half, offset, v);
            for (int i = 0; i < 4; ++i) {
                if constexpr (is_wide<B>) {
                    simd::store(out + (4*half + i)*ROWS*4, simd::stored(v[i]));
                } else {
                    simd::store(out + i*ROWS*4, simd::masked(v[i], 0x0F0F0F0F));
                    simd::store(out + (i + 4)*ROWS*4, simd::masked(simd::template srl<4>(v[i]), 0x0F0F0F0F));
                }
            }
        }
    }
}

// stores the results of nrows rows of a slab for one row of activations
template <bool wide>
void finish(float * dst, simd::acc sum, int32_t sum_q, const float * d, float s, int nrows) {
    if (nrows == ROWS) {
        simd::epilogue(dst, sum, simd::zero_point(wide)*sum_q, d, s);
    } else {
        float tmp[ROWS];
        simd::epilogue(tmp, sum, simd::zero_point(wide)*sum_q, d, s);
        memcpy(dst, tmp, nrows*sizeof(float));
    }
}

// Multiplies one slab with one panel of cols rows; stores nrows of the slab's rows, column c of the result at dst + c*stride.
template <bool wide, int cols>
void multiply(const uint8_t * w, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    simd::acc sum[cols];
    for (int c = 0; c < cols; ++c) {
        sum[c] = simd::zero();
    }
    const int8_t * q = y.q;
    for (int64_t b = 0; b < k/QK; ++b, q += cols*QK) {
        simd::acc part[cols];
        for (int c = 0; c < cols; ++c) {
            part[c] = simd::zero();
        }
        for (int i = 0; i < QK/4; ++i, w += 4*ROWS) {
            const simd::ivec codes = simd::load(w);
            for (int c = 0; c < cols; ++c) {
                part[c] = simd::template dot<wide>(part[c], codes, q + c*QK + 4*i);
            }
        }
        for (int c = 0; c < cols; ++c) {
            sum[c] = simd::template fold<wide>(sum[c], part[c]);
        }
    }
    for (int c = 0; c < cols; ++c) {
        finish<wide>(dst + c*stride, sum[c], y.sum[c], (const float *) w, y.s[c], nrows);
    }
}

// multiply() for a number of columns known at run time
template <bool wide, int cols = COLS>
void multiply_any(int n, const uint8_t * w, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    if constexpr (cols > 0) {
        if (n == cols) {
            multiply<wide, cols>(w, y, k, dst, stride, nrows);
        } else {
            multiply_any<wide, cols - 1>(n, w, y, k, dst, stride, nrows);
        }
    }
}

// slabs of one chunk of work, which has nrows rows of weights and columns k
int64_t chunk_slabs(int64_t nrows, int64_t k, int nth) {
    const int64_t slabs = (nrows + ROWS - 1)/ROWS;
    const int64_t fit   = SLABS_BYTES/slab_bytes(k);
    return std::max<int64_t>(1, std::min({ fit, SLABS_MAX, slabs/(4*nth) }));
}

// ---- tiles

#ifdef ROW_SCALE_AMX

constexpr panel_shape TILES = { 2*row_scale_amx::TILE, row_scale_amx::STEP, row_scale_amx::TILE };

static_assert(ROWS == row_scale_amx::TILE, "a slab is a tile of weights");

// multiplies nrows rows of weights, in one or two slabs, with n rows of activations, in a panel of one or two tiles
template <bool wide>
void multiply_tiles(int n, const uint8_t * w, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    using namespace row_scale_amx;
    alignas(ALIGNMENT) int32_t sums[2][2][TILE][TILE];

    const int    nq     = y.cols/TILE;
    const int    nw     = nrows > ROWS ? 2 : 1;
    const size_t slab   = slab_bytes(k);
    const size_t q_step = y.cols*STEP;
    if (nq == 2 && nw == 2) {
        row_scale_amx::multiply<2, 2>(w, slab, y.q, q_step, k/STEP, sums);
    } else if (nq == 2) {
        row_scale_amx::multiply<2, 1>(w, slab, y.q, q_step, k/STEP, sums);
    } else if (nw == 2) {
        row_scale_amx::multiply<1, 2>(w, slab, y.q, q_step, k/STEP, sums);
    } else {
        row_scale_amx::multiply<1, 1>(w, slab, y.q, q_step, k/STEP, sums);
    }

    for (int c = 0; c < n; ++c) {
        for (int j = 0; j < nw; ++j) {
            const simd::acc sum = _mm512_load_si512(sums[c/TILE][j][c % TILE]);
            const float *   d   = (const float *) (w + j*slab + ROWS*k);
            finish<wide>(dst + c*stride + j*ROWS, sum, y.sum[c], d, y.s[c], std::min(ROWS, nrows - j*ROWS));
        }
    }
}

#endif

} // namespace
