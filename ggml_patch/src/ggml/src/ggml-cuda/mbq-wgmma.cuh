#pragma once

// Building blocks of mbq_gemm (mbq-gemm.cuh) on Hopper: wgmma, and weights as wgmma's A operand.

#include "mbq-block.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MBQ_WGMMA
#endif

#ifdef MBQ_WGMMA

// CTA scope only: a release at cluster scope costs as much as the products of 64 weights.
template <int cluster>
static __device__ __forceinline__ void mbq_barrier_arrive(const uint32_t barrier) {
    if constexpr (cluster == 1) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
    } else {
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" : : "r"(barrier) : "memory");
    }
}

// The same address in the CTA of the cluster with this rank
template <int cluster>
static __device__ __forceinline__ uint32_t mbq_in_cta(const uint32_t address, const int rank) {
    uint32_t there = address;
    if constexpr (cluster > 1) {
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    }
    return there;
}

template <int cluster>
static __device__ __forceinline__ void mbq_cluster_sync() {
    if constexpr (cluster == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" : : : "memory");
    }
}

// Copies to the same address in all CTAs of the mask, and signals the barrier at the same address
static __device__ __forceinline__ void mbq_multicast(const uint32_t dst, const void * src, const int bytes, const uint32_t barrier, const uint16_t mask) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        : : "r"(dst), "l"(src), "r"(bytes), "r"(barrier), "h"(mask) : "memory");
}

// What the warp wrote before __syncwarp is visible to threads for which mbq_await has returned.
static __device__ __forceinline__ void mbq_signal(int * flag) {
    asm volatile("st.release.gpu.global.s32 [%0], 1;" : : "l"(flag) : "memory");
}

static __device__ __forceinline__ void mbq_await(const int * flag) {
    int v;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
    } while (v == 0);
}

// The same for readers that use copies such as mbq_multicast
static __device__ __forceinline__ void mbq_signal_copies(int * count) {
    asm volatile("fence.proxy.async.global;" : : : "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        asm volatile("red.release.gpu.global.add.s32 [%0], 1;" : : "l"(count) : "memory");
    }
}

// Waits until the first of n counts is full; returns how many consecutive ones are, of these and of 32.
static __device__ __forceinline__ int mbq_await_counts(const int * counts, const int n, const int full) {
    const int lane = threadIdx.x % 32;
    uint32_t there;
    do {
        int v = full;
        if (lane < n) {
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counts + lane) : "memory");
        }
        there = __ballot_sync(0xFFFFFFFF, v == full);
    } while (there % 2 == 0);
    __syncwarp();
    asm volatile("fence.proxy.async.global;" : : : "memory");
    return there == 0xFFFFFFFF ? 32 : __ffs(~there) - 1;
}

// d += A, 64 rows times 16 of K in registers, times B, 16 of K times 128 or 256 columns in shared memory
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
static __device__ __forceinline__ void mbq_wgmma(float (&d)[64], const half2 (&a)[4], const uint64_t b) {
    const uint32_t * r = (const uint32_t *) a;
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
        : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(b));
}

static __device__ __forceinline__ void mbq_wgmma(float (&d)[128], const half2 (&a)[4], const uint64_t b) {
    const uint32_t * r = (const uint32_t *) a;
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56),
          D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
        : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(b));
}
#undef D8

// 64 or 128 weights of a row: words of ql and of qh, shifted so that the high bit of plane 0 is bit 2 of a byte, for bytes 0 and 2
// (even weights of the A operand) and 1 and 3 (odd ones)
struct mbq_word {
    uint32_t ql[2], qh[2], top[2]; // top: bit 8 is the high bit of plane 3
};

static __device__ __forceinline__ mbq_word mbq_split_word(const uint32_t ql, const uint32_t qh) {
    return { { ql, ql >> 8 }, { qh, qh >> 8 }, { qh << 8, qh } };
}

// Weights of plane j. A code in the low bits of a half's fraction, with the exponent of 1024, is 1024 + 4^j * code; subtracting 1024 is exact.
template <int j>
static __device__ __forceinline__ half2 mbq_plane(const mbq_word & w, const int odd, const half2 d, const half2 m) {
    constexpr uint32_t magic = 0x64006400u;
    const uint32_t v = j < 3 ? mbq_and_or<(0x00030003u << 2*j)>(w.ql[odd], mbq_and_or<(j < 3 ? 0x00040004u << 2*j : 0)>(w.qh[odd], magic)) :
        mbq_and_or<0x00C000C0u>(w.ql[odd], mbq_and_or<0x01000100u>(w.top[odd], magic));
    const half2 scale  = __float2half2_rn(j == 0 ?     1.0f : j == 1 ?   0.25f : j == 2 ? 0.0625f : 0.015625f);
    const half2 offset = __float2half2_rn(j == 0 ? -1024.0f : j == 1 ? -256.0f : j == 2 ?  -64.0f :    -16.0f);
    return __hfma2(__hfma2(*(const half2 *) &v, scale, offset), d, m);
}

// 128 weights of a row: one block or two
template <int QK> struct mbq_words {
    uint32_t dm[128/QK];
    mbq_word word[2];
};

template <int QK>
static __device__ __forceinline__ mbq_words<QK> mbq_load_words(const uint32_t p, const int t) {
    mbq_words<QK> w;
    if constexpr (QK == 128) {
        const uint32_t qh = mbq_load_shared(p + 36 + 4*t);
        w.dm[0]   = mbq_load_shared(p);
        w.word[0] = mbq_split_word(mbq_load_shared(p +  4 + 4*t), qh);
        w.word[1] = mbq_split_word(mbq_load_shared(p + 20 + 4*t), qh >> 1);
    } else {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            w.dm[b]   = mbq_load_shared(p + 28*b);
            w.word[b] = mbq_split_word(mbq_load_shared(p + 28*b + 4 + 4*t), mbq_load_shared(p + 28*b + 20 + 4*(t & 1)) >> (t >> 1));
        }
    }
    return w;
}

// d and m of all weights of a block, or of those of one scale word, as one half of a pair, which HFMA2 can duplicate itself. With two scale words m = -d*z/8 has up to 12
// bits and is rounded to 11: a mean error of 1.7e-4 of the weights, where that of fp16 activations is 2.8e-4. d*(code - z/8) would be exact, but take one more
// instruction per two weights.
template <typename L>
static __device__ __forceinline__ void mbq_scale_f16(const uint32_t word, const int which, half2 & d, half2 & m) {
    if constexpr (L::scales == 1) {
        d = __low2half2 (*(const half2 *) &word);
        m = __high2half2(*(const half2 *) &word);
    } else {
        const uint32_t bits    = (word & 0xFFC0FFC0u) >> 1;
        const uint32_t eighths = mbq_and_or<0x003F003Fu>(word, 0x58005800u); // 128 + z/8
        const half2 scales = *(const half2 *) &bits;
        const half2 minima = __hmul2(scales, __hsub2(__float2half2_rn(128.0f), *(const half2 *) &eighths));
        d = which == 0 ? __low2half2(scales) : __high2half2(scales);
        m = which == 0 ? __low2half2(minima) : __high2half2(minima);
    }
}

// The A operands of 64 weights, the first 64 (h = 0) or the last of 128: steps of 16, registers of row r
template <typename L, int h>
static __device__ __forceinline__ void mbq_dequantize_64(const mbq_words<L::QK> & w, const int r, half2 (&a)[4][4]) {
    constexpr bool one = L::QK == 128; // block, of which these are the first or the last 64
    half2 d[2], m[2];                  // of a[0] and a[1], of a[2] and a[3]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        mbq_scale_f16<L>(w.dm[one ? 0 : h], one ? h : i, d[i], m[i]);
    }
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        if constexpr (one) {
            a[0][r + 2*odd] = mbq_plane<2*h>    (w.word[0], odd, d[0], m[0]);
            a[1][r + 2*odd] = mbq_plane<2*h>    (w.word[1], odd, d[0], m[0]);
            a[2][r + 2*odd] = mbq_plane<2*h + 1>(w.word[0], odd, d[1], m[1]);
            a[3][r + 2*odd] = mbq_plane<2*h + 1>(w.word[1], odd, d[1], m[1]);
        } else {
            a[0][r + 2*odd] = mbq_plane<0>(w.word[h], odd, d[0], m[0]);
            a[1][r + 2*odd] = mbq_plane<1>(w.word[h], odd, d[0], m[0]);
            a[2][r + 2*odd] = mbq_plane<2>(w.word[h], odd, d[1], m[1]);
            a[3][r + 2*odd] = mbq_plane<3>(w.word[h], odd, d[1], m[1]);
        }
    }
}

#endif // MBQ_WGMMA
