#pragma once

// Blocks of 32 weights on their way into int8 products (see ggml-row-scale.h).
//
//   Q4_0   byte 0, 1: fp16 d   2 ... 17: byte 2 + i holds code i in its low and code 16 + i in its high nibble, code = weight/d + 8
//   Q8_0   byte 0, 1: fp16 d   2 ... 33: byte 2 + i is weight/d of weight i
//
// 256 weights of a row are a group of 8 blocks, 144 or 272 bytes. The order of the products in a sum is free: lane t of 4 takes blocks 2t and
// 2t + 1 of a group for mma and wgmma, 9 or 17 words in one piece, and so loads no word twice (word t of every block: each word twice, since every
// second block lies at an odd multiple of 2 bytes). Step j of 8 (32 weights) takes from block 2t + j/4 its weights 4(j%4) ... as the A operand's k = 4t ...
// and 16 + 4(j%4) ... as its k = 16 + 4t ...; activations lie in the same order (mbq-w4a8-quantize.cuh).
//
// A code of 4 bits meets the product as a signed byte, 16 times (code - 8): an and and an xor.

#include "mbq-wgmma.cuh"

template <int bits> struct mbq_w4a8_layout {
    static constexpr int block_bytes = 2 + 4*bits;
    static constexpr int group_bytes = 8*block_bytes;     // 256 weights
    static constexpr int shift       = bits == 4 ? 4 : 0; // of sums: codes of 4 bits come times 16
};

// a & 0xF0F0F0F0 ^ 0x80808080: 16 times (code - 8) of the high nibbles
static __device__ __forceinline__ uint32_t mbq_w4a8_nibbles(const uint32_t a) {
    return (a & 0xF0F0F0F0u) ^ 0x80808080u;
}

// The bytes of a block, with the aligned words around them. whole: the block begins so that its words are aligned.
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

// Two blocks one behind the other in shared memory. dense: rows are multiples of 16 bytes, so the first block begins at a multiple of 4.
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

// Weights as a map of words, row upon row, in boxes of one group times some rows
#ifdef MBQ_USE_TMA
using mbq_w4a8_map = CUtensorMap;
#else
struct mbq_w4a8_map {};
#endif

static constexpr int MBQ_W4A8_MATRICES = 3; // that a kernel takes: q, k and v

struct mbq_w4a8_maps {
    mbq_w4a8_map of[MBQ_W4A8_MATRICES];
};

#if defined(MBQ_USE_TMA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA)
#define MBQ_W4A8_MAPS const __grid_constant__ mbq_w4a8_maps
#else
#define MBQ_W4A8_MAPS const mbq_w4a8_maps
#endif

// ggml builds with -use_fast_math, which flushes denormals and divides roughly: these do neither.
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

// One product from its exact sum, in the one order of multiplications
static __device__ __forceinline__ float mbq_w4a8_scale(const int sum, const float d, const float s) {
    return mbq_mul_rn(mbq_mul_rn((float) sum, d), s);
}
