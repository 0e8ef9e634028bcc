#pragma once

// Hopper primitives of mbq_attention (mbq-attention.cuh): wgmma with tiles of keys and values as its B operand.

#include "mbq-wgmma.cuh"

#ifdef MBQ_WGMMA

// d = A*B, or d += A*B with add. A: 64 rows times 16 of K in registers; B: 16 of K times 64, 80 or 128 columns in shared memory, whose rows run along
// K if transposed.
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
template <int add, int transposed>
static __device__ __forceinline__ void mbq_attention_wgmma(float (&d)[32], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, %37, 1, 1, %38;"
        : D8(0), D8(8), D8(16), D8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add), "n"(transposed));
}

template <int add, int transposed>
static __device__ __forceinline__ void mbq_attention_wgmma(float (&d)[40], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39}, "
        "{%40, %41, %42, %43}, %44, %45, 1, 1, %46;"
        : D8(0), D8(8), D8(16), D8(24), D8(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add), "n"(transposed));
}

template <int add, int transposed>
static __device__ __forceinline__ void mbq_attention_wgmma(float (&d)[64], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, %69, 1, 1, %70;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add), "n"(transposed));
}
#undef D8

// A tile is [slice of 16 elements of a head][row][16 elements] in the 32-byte swizzle (the 16-byte halves of four rows of eight are swapped), which
// also fits heads of 72 and 80. Stride: 256 bytes between groups of 8 rows. slice: bytes between slices; only transposed products use it.
static __device__ __forceinline__ uint64_t mbq_attention_operand(const uint32_t address, const int slice) {
    return (uint64_t) (address >> 4) | (uint64_t) (slice >> 4) << 16 | (uint64_t) (256 >> 4) << 32 | (uint64_t) 3 << 62;
}

// Copies the box at (x, row, head, sample) of a tensor map
static __device__ __forceinline__ void mbq_box_copy_4d(const uint32_t dst, const CUtensorMap & map, const int x, const int row, const int head, const int sample,
        const uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
        : : "r"(dst), "l"(&map), "r"(x), "r"(row), "r"(head), "r"(sample), "r"(barrier) : "memory");
}

// A compiler barrier: accesses to the sums of an asynchronous product are not moved across it.
template <int n>
static __device__ __forceinline__ void mbq_settled(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        asm volatile("" : "+f"(d[i]) : : "memory");
    }
}

template <int n>
static __device__ __forceinline__ void mbq_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(n) : "memory");
}

static __device__ __forceinline__ float mbq_exp2(const float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ uint32_t mbq_pack_half2(const float x, const float y) {
    const half2 h = __floats2half2_rn(x, y);
    return *(const uint32_t *) &h;
}

#endif // MBQ_WGMMA
