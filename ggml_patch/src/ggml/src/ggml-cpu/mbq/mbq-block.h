#pragma once

// Traits of the block types. The layout of the codes depends on the number of weights (128 or 64). A block has one grid for all weights, or
// one for each half (planes 0 and 1, planes 2 and 3).

#include "ggml-quants.h"
#include "simd-mappings.h"

template <typename B> constexpr int mbq_weights = 4*sizeof(B::ql); // per block
template <typename B> constexpr int mbq_grids   = 1;
template <> inline constexpr int mbq_grids<block_mbq3s>    = 2;
template <> inline constexpr int mbq_grids<block_mbq3s_64> = 2;
template <typename B> constexpr int mbq_group = mbq_weights<B>/mbq_grids<B>; // weights per grid

// a weight is d*code + m
struct mbq_grid {
    float d;
    float m;
};

template <typename B>
static inline mbq_grid mbq_grid_of(const B & x, int group) {
    if constexpr (mbq_grids<B> == 1) {
        (void) group;
        return { GGML_CPU_FP16_TO_FP32(x.d), GGML_CPU_FP16_TO_FP32(x.m) };
    } else {
        const float d = GGML_CPU_FP16_TO_FP32((x.scale_zp[group] & 0xFFC0) >> 1);
        return { d, d*(x.scale_zp[group] & 0x3F)*(-1.0f/8) };
    }
}

// for both halves
template <typename B>
static inline void mbq_load_grids(const B & x, mbq_grid grid[2]) {
    grid[0] = mbq_grid_of(x, 0);
    grid[1] = mbq_grids<B> == 1 ? grid[0] : mbq_grid_of(x, 1);
}

// Vector code decodes both scale words from 32 bits at once: d as fp16 has the bits (words >> 1) & MBQ_SCALE_WORD_D, and
// words & MBQ_SCALE_WORD_Z is z/2^24 as (denormal) fp16, so that m = d * (z/2^24) * MBQ_SCALE_WORD_M.
#define MBQ_SCALE_WORD_D 0x7FE07FE0
#define MBQ_SCALE_WORD_Z 0x003F003F
#define MBQ_SCALE_WORD_M (-2097152.0f)
