#pragma once

// How a block of MBQ weights gets into the int8 tensor cores.
//
// A block of QK weights, as ggml-mbq-common.h stores it (32-bit words; QK = 128 | 64):
//
//   word    0        1 ...  8 | 4             9 ... 12 | 5, 6
//         | d   m  | ql: byte i holds, at    | qh: byte i % (QK/8) holds, at bit
//         | or     | bits 2j, the low bits   | (2j + 2) % 8 + i / (QK/8), the high
//         | s0  s1 | of weight QK/4 * j + i  | bit of weight QK/4 * j + i            (j = 0..3: the plane)
//
//   so for planes 0 to 2, (ql & 3 << 2j) | (qh & 4 << 2j) is 4^j times the code, and each byte fits int8.
//
//   MBQ3, MBQ3_64:   fp16 d and m for all planes, weight = d*code + m
//   MBQ3S, MBQ3S_64: a scale word for planes 0 and 1, one for planes 2 and 3, weight = d*(code - z/8)
//
//   bit     15 ............ 6 | 5 ... 0
//         | fp16 d: bits 14-5 |    z   |    (its sign and lowest five bits are zeros)
//
// mma.m16n8k32 expects, in lane 4g + t, bytes 4t..4t+3 and 16+4t..16+4t+3 of rows g and g + 8 of a 32-weight group. For QK = 128 these are words t and
// t + 4 of ql in one plane and word t of qh; for QK = 64, word t of ql in two planes. Each lane loads each word once and uses all of it: no bit is read
// twice, and only plane 3 needs shifts.

#include <cstdint>

// The tensor memory accelerator copies boxes of a tensor map, which the driver library creates; ggml links that library for virtual memory.
#if defined(GGML_USE_VMM) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && CUDART_VERSION >= 12000
#define MBQ_USE_TMA
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
#define MBQ_TMA_AVAILABLE
#endif
#endif

static constexpr int MBQ_PIECE = 512;        // weights of a row per copy: 208 bytes (QK = 128) or 224 (QK = 64), multiples of 16
static constexpr int MBQ_MAGIC = 0x4B400000; // 1.5 * 2^23 as float: integers below 2^22 added to its bits are added to its value

// Blocks of QK weights with one d and m, or with two scale words
template <int weights, int scale_words> struct mbq_layout {
    static constexpr int QK           = weights;
    static constexpr int scales       = scale_words;
    static constexpr int block_words  = 1 + 3*QK/32;
    static constexpr int piece_blocks = MBQ_PIECE/QK;
    static constexpr int piece_bytes  = 4*block_words*piece_blocks;
    static constexpr int groups       = QK/32;
    // The inverse of the power of four in the codes of a group; the activation scale includes it.
    static __device__ __forceinline__ float unscale(const int group) {
        if constexpr (QK == 128) {
            return group == 1 ? 0.25f : group == 2 ? 0.0625f : 1.0f; // plane 3 does not fit in place and is shifted down
        } else {
            return group % 2 == 0 ? 0.25f : 0.0625f;                 // planes 0, 1 times 4 and planes 2, 3 times 16
        }
    }
};

// (a & mask) | b in one instruction; with constants that it knows, the compiler generates two or more
template <uint32_t mask>
static __host__ __device__ __forceinline__ uint32_t mbq_and_or(const uint32_t a, const uint32_t b) {
#if defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(a), "n"(mask), "r"(b));
    return v;
#else
    return (a & mask) | b;
#endif
}

// d and m, or d and -z/8 of one of two scale words, from a block's first 32 bits. z is combined with the exponent of 2^20 or 16, depending on its position,
// such that its lowest bit is worth an eighth: no shift, no conversion, and subtracting the power of two is exact.
template <typename L>
static __host__ __device__ __forceinline__ float2 mbq_scale(const uint32_t word, const int which) {
    if constexpr (L::scales == 1) {
        return __half22float2(*(const half2 *) &word);
    } else {
        const uint32_t scales  = (word & 0xFFC0FFC0u) >> 1;
        const uint32_t eighths = which == 0 ? mbq_and_or<0x0000003Fu>(word, 0x49800000u) : mbq_and_or<0x003F0000u>(word, 0x41800000u);
        const float2   d = __half22float2(*(const half2 *) &scales);
        return make_float2(which == 0 ? d.x : d.y, (which == 0 ? 1048576.0f : 16.0f) - *(const float *) &eighths);
    }
}

// sum += the products of weights and activations, from the products of their codes, `part`, and the activations' sum. Fused operations are explicit, because
// the compiler's choice could differ between kernels, whose sums must have the same bits.
template <typename L>
static __device__ __forceinline__ void mbq_add(float & sum, const float2 scale, const float part, const float x) {
    if constexpr (L::scales == 1) {
        sum = fmaf(scale.y, x, fmaf(scale.x, part, sum));
    } else {
        sum = fmaf(scale.x, fmaf(scale.y, x, part), sum);
    }
}

#ifdef MBQ_TMA_AVAILABLE

static __device__ __forceinline__ void mbq_barrier_init(const uint32_t barrier, const int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(count) : "memory");
}

static __device__ __forceinline__ void mbq_barrier_expect(const uint32_t barrier, const int bytes, const bool arrive) {
    if (arrive) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
    } else {
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
    }
}

static __device__ __forceinline__ void mbq_barrier_wait(const uint32_t barrier, const int parity) {
    asm volatile("{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
        : : "r"(barrier), "r"(parity) : "memory");
}

// Multiples of 16 bytes from global to shared memory
static __device__ __forceinline__ void mbq_bulk_copy(const uint32_t dst, const void * src, const int bytes, const uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        : : "r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}

// The box at byte x of row y of a map
static __device__ __forceinline__ void mbq_box_copy(const uint32_t dst, const CUtensorMap & map, const int x, const int y, const uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        : : "r"(dst), "l"(&map), "r"(x), "r"(y), "r"(barrier) : "memory");
}

static __device__ __forceinline__ uint32_t mbq_load_shared(const uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

#endif // MBQ_TMA_AVAILABLE

#ifdef TURING_MMA_AVAILABLE

// Copies 16 bytes from global to shared memory, asynchronously if the hardware supports it.
static __device__ __forceinline__ void mbq_copy_16(void * dst, const void * src) {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src) : "memory");
#else
    *(int4 *) dst = *(const int4 *) src;
#endif
}

static __device__ __forceinline__ void mbq_copy_commit() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until at most N commits of this thread are pending.
template <int N>
static __device__ __forceinline__ void mbq_copy_wait() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

// d = a * b + MBQ_MAGIC: 16 rows, 8 columns, 32 int8 products each. Turing does it in quarters.
static __device__ __forceinline__ void mbq_mma(int (&d)[4], const int (&a)[4], const int (&b)[2]) {
#if defined(AMPERE_MMA_AVAILABLE)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(MBQ_MAGIC));
#else
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        d[2*i] = d[2*i + 1] = MBQ_MAGIC;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+r"(d[2*i]), "+r"(d[2*i + 1]) : "r"(a[2*j + i]), "r"(b[j]));
        }
    }
#endif
}

// The A operands of all groups of one block for rows g and g + 8, which start at p[0] and p[1].
template <int QK>
static __device__ __forceinline__ void mbq_unpack(const uint32_t * const (&p)[2], const int t, int (&a)[QK/32][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if constexpr (QK == 128) {
            const uint32_t ql0 = p[r][1 + t];
            const uint32_t ql1 = p[r][5 + t];
            const uint32_t qh0 = p[r][9 + t];
            const uint32_t qh1 = qh0 >> 1;
#pragma unroll
            for (int j = 0; j < 3; ++j) {
                a[j][r]     = (ql0 & (0x03030303u << 2*j)) | (qh0 & (0x04040404u << 2*j));
                a[j][r + 2] = (ql1 & (0x03030303u << 2*j)) | (qh1 & (0x04040404u << 2*j));
            }
            a[3][r]     = ((ql0 >> 6) & 0x03030303u) | ((qh0 << 2) & 0x04040404u);
            a[3][r + 2] = ((ql1 >> 6) & 0x03030303u) | ((qh0 << 1) & 0x04040404u);
        } else {
            const uint32_t ql = p[r][1 + t];
            const uint32_t qh = p[r][5 + (t & 1)] >> (t >> 1);
            a[0][r]     = ((ql << 2) & 0x0C0C0C0Cu) | ((qh << 2) & 0x10101010u);
            a[0][r + 2] = ( ql       & 0x0C0C0C0Cu) | ( qh       & 0x10101010u);
            a[1][r]     = ( ql       & 0x30303030u) | ( qh       & 0x40404040u);
            a[1][r + 2] = ((ql >> 2) & 0x30303030u) | ((qh << 6) & 0x40404040u);
        }
    }
}

#endif // TURING_MMA_AVAILABLE
