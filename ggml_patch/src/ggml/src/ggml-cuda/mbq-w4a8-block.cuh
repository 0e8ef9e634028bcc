#pragma once

// Blocks of 32 weights on their way into int8 products (see ggml-row-scale.h).
//
//   Q4_0   byte 0, 1: fp16 d   2 ... 17: byte 2 + i holds code i in its low and code 16 + i in its high nibble, code = weight/d + 8
//   Q8_0   byte 0, 1: fp16 d   2 ... 33: byte 2 + i is weight/d of weight i
//
// Lane t of 4 takes weights 4t to 4t + 3 and 16 + 4t to 19 + 4t: word t of Q4_0's nibbles, words t and t + 4 of Q8_0's bytes, which is also what
// mma and wgmma want of an A operand. A code of 4 bits meets the product as a signed byte, 16 times (code - 8): an and and an xor.

#include <cstdint>

template <int bits> struct mbq_w4a8_layout {
    static constexpr int block_bytes = 2 + 4*bits;
    static constexpr int shift       = bits == 4 ? 4 : 0; // of sums: codes of 4 bits come times 16
    static constexpr int words       = bits/4;            // that a lane loads of a block
};

// a & 0xF0F0F0F0 ^ 0x80808080: 16 times (code - 8) of the high nibbles
static __device__ __forceinline__ uint32_t mbq_w4a8_nibbles(const uint32_t a) {
    return (a & 0xF0F0F0F0u) ^ 0x80808080u;
}

// a: weights 4t.. and 16 + 4t.. of a block from its word t, and word t + 4 where bits = 8
template <int bits>
static __device__ __forceinline__ void mbq_w4a8_unpack(const uint32_t (&word)[bits/4], uint32_t & low, uint32_t & high) {
    if constexpr (bits == 4) {
        low  = mbq_w4a8_nibbles(word[0] << 4);
        high = mbq_w4a8_nibbles(word[0]);
    } else {
        low  = word[0];
        high = word[bits/4 - 1];
    }
}

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
