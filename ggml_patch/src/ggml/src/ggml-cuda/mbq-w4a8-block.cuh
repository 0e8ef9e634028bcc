#pragma once

// How blocks of 32 weights become operands of int8 products (see ggml-row-scale.h).
//
//   Q4_0   byte 0, 1: fp16 d   2 ... 17: byte 2 + i holds code i in its low and code 16 + i in its high nibble, code = weight/d + 8
//   Q8_0   byte 0, 1: fp16 d   2 ... 33: byte 2 + i is weight/d of weight i
//
// A group is 256 weights of a row, 8 blocks, 144 or 272 bytes. The products of a sum may be in any order, so for mma and wgmma lane t of 4 gets blocks 2t and
// 2t + 1 of a group: 9 or 17 contiguous words, each loaded once. (With word t of every block, each word would be loaded twice, because every second block
// is at an odd multiple of 2 bytes.) In step j of 8 (32 weights), weights 4(j%4) ... of block 2t + j/4 are the A operand's k = 4t ..., and
// weights 16 + 4(j%4) ... are its k = 16 + 4t ...; activations have the same order (mbq-w4a8-quantize.cuh).
//
// A 4-bit code enters the product as the signed byte 16 * (code - 8), which takes an AND and an XOR.

#include "mbq-wgmma.cuh"

template <int bits> struct mbq_w4a8_layout {
    static constexpr int block_bytes = 2 + 4*bits;
    static constexpr int group_bytes = 8*block_bytes;     // 256 weights
    static constexpr int shift       = bits == 4 ? 4 : 0; // shift of sums: 4-bit codes are multiplied by 16
};

// a & 0xF0F0F0F0 ^ 0x80808080: 16 * (code - 8) for the high nibbles
static __device__ __forceinline__ uint32_t mbq_w4a8_nibbles(const uint32_t a) {
    return (a & 0xF0F0F0F0u) ^ 0x80808080u;
}

// The bytes of a block, with the aligned words around them. whole: the block's codes are word-aligned.
template <int bits> struct mbq_w4a8_words {
    uint32_t w[bits + 1];

    // Weights 4j to 4j + 3 and 16 + 4j to 19 + 4j
    template <bool whole>
    __device__ __forceinline__ void unpack(const int j, const uint32_t pick, uint32_t & low, uint32_t & high) const {
        const auto word = [&](const int i) { return whole ? w[i] : __byte_perm(w[i], w[i + 1], pick); };
        if constexpr (bits == 4) {
            low  = mbq_w4a8_nibbles(word(j) << 4);
            high = mbq_w4a8_nibbles(word(j));
        } else {
            low  = word(j);
            high = word(j + 4);
        }
    }
};

#ifdef MBQ_TMA_AVAILABLE

// Two consecutive blocks in shared memory. dense: rows are multiples of 16 bytes, so the first block starts at a multiple of 4.
template <int bits, bool dense> struct mbq_w4a8_pair {
    uint32_t at;                     // the aligned words around the first block
    uint32_t pick_first, pick_second;

    __device__ __forceinline__ mbq_w4a8_pair(const uint32_t address) {
        at          = dense ? address : address & ~3u;
        pick_first  = dense || address % 4 == 0 ? 0x5432 : 0x7654;
        pick_second = dense || address % 4 == 0 ? 0x3210 : 0x5432;
    }

    __device__ __forceinline__ void unpack(const mbq_w4a8_words<bits> & words, const int second, const int j, uint32_t & low, uint32_t & high) const {
        if (dense && second) {
            words.template unpack<true>(j, 0, low, high);
        } else {
            words.template unpack<false>(j, dense ? 0x5432 : second ? pick_second : pick_first, low, high);
        }
    }

    __device__ __forceinline__ mbq_w4a8_words<bits> load(const uint32_t offset, const int second) const {
        mbq_w4a8_words<bits> words;
#pragma unroll
        for (int i = 0; i < bits + (dense && second ? 0 : 1); ++i) {
            words.w[i] = mbq_load_shared(at + offset + second*(mbq_w4a8_layout<bits>::block_bytes + 2) + 4*i);
        }
        return words;
    }
};

#endif // MBQ_TMA_AVAILABLE

// A tensor map of weights as words, row by row; a box is one group times some rows
#ifdef MBQ_USE_TMA
using mbq_w4a8_map = CUtensorMap;
#else
struct mbq_w4a8_map {};
#endif

static constexpr int MBQ_W4A8_MATRICES = 3; // maximum per kernel: q, k and v

struct mbq_w4a8_maps {
    mbq_w4a8_map of[MBQ_W4A8_MATRICES];
};

#if defined(MBQ_USE_TMA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA)
#define MBQ_W4A8_MAPS const __grid_constant__ mbq_w4a8_maps
#else
#define MBQ_W4A8_MAPS const mbq_w4a8_maps
#endif

// Under ggml's -use_fast_math, denormals are flushed and division is approximate. These functions are exact.
static __device__ __forceinline__ float mbq_mul_rn(const float a, const float b) {
    float v;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

static __device__ __forceinline__ float mbq_div_rn(const float a, const float b) {
    float v;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// One product from its exact sum, with a fixed order of multiplications
static __device__ __forceinline__ float mbq_w4a8_scale(const int sum, const float d, const float s) {
    return mbq_mul_rn(mbq_mul_rn((float) sum, d), s);
}
