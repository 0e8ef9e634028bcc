#pragma once

// Blocks of the MBQ types, for C, C++ and CUDA alike. Include a GGML_COMMON_DECL_* ggml-common.h first (it defines ggml_half).
//
// A weight is d * code + m. With i = (QK/4) * plane + byte the two low bits of code i are bits 2*plane and 2*plane + 1 of
// ql[byte], its high bit is bit (2*plane + 2) % 8 + byte / (QK/8) of qh[byte % (QK/8)]. For planes 0 to 2 that is directly above the low
// bits, so that two masks give 1, 4 or 16 times the code without a shift.

#define QKMBQ3 128
typedef struct {
    ggml_half d;              // scale
    ggml_half m;              // minimum
    uint8_t   ql[QKMBQ3 / 4]; // low two bits of the codes
    uint8_t   qh[QKMBQ3 / 8]; // high bits
} block_mbq3;
static_assert(sizeof(block_mbq3) == 2*sizeof(ggml_half) + QKMBQ3/4 + QKMBQ3/8, "wrong mbq3 block size/padding");

#define QKMBQ3_64 64
typedef struct {
    ggml_half d;
    ggml_half m;
    uint8_t   ql[QKMBQ3_64 / 4];
    uint8_t   qh[QKMBQ3_64 / 8];
} block_mbq3_64;
static_assert(sizeof(block_mbq3_64) == 2*sizeof(ggml_half) + QKMBQ3_64/4 + QKMBQ3_64/8, "wrong mbq3_64 block size/padding");

// MBQ3S and MBQ3S_64: the same codes, with a scale and a zero point for each half of the block (planes 0 and 1, planes 2 and 3) instead
// of d and m. A scale word has bits 5 to 14 of an fp16 scale d in bits 6 to 15, and the zero point z, in eighths of a step, in
// bits 0 to 5: d is fp16 with the bits scale_zp >> 6 << 5, m = -(d*z)/8.

typedef struct {
    uint16_t scale_zp[2]; // scale words
    uint8_t  ql[QKMBQ3 / 4];
    uint8_t  qh[QKMBQ3 / 8];
} block_mbq3s;
static_assert(sizeof(block_mbq3s) == sizeof(block_mbq3), "wrong mbq3s block size/padding");

typedef struct {
    uint16_t scale_zp[2]; // scale words
    uint8_t  ql[QKMBQ3_64 / 4];
    uint8_t  qh[QKMBQ3_64 / 8];
} block_mbq3s_64;
static_assert(sizeof(block_mbq3s_64) == sizeof(block_mbq3_64), "wrong mbq3s_64 block size/padding");
