#pragma once

// Converts activations to fp16 for mbq_gemm (mbq-gemm.cuh): tiles of 128 columns and 64 of K, each one bulk copy, with the layout of shared memory:
// even weights before odd ones in each 16, and the 16-byte words of a column in wgmma's 128-byte swizzle.

#include "mbq-stream-k.cuh"
#include "mbq-wgmma.cuh"

static constexpr int MBQ_GEMM_THREADS = 384;
static constexpr int MBQ_GEMM_TILE_N  = 128; // columns per tile of activations: a CTA of mbq_gemm uses one or two
static constexpr int MBQ_GEMM_TILE_K  = 64;  // activations per column in a tile: 128 bytes, the span of the swizzle
static constexpr int MBQ_CONVERT_N    = 32;  // columns of a tile that a warp of mbq_convert_late converts at a time

// Tiles are [n tile][k tile][column][16-byte words, swizzled]. A warp converts n columns of a tile at a time. Activations are read once (.cs), so that
// the tiles stay in the L2 cache.
template <int n>
static __device__ __forceinline__ void mbq_load_f32(const mbq_gemm_args & args, const int k_tile, const int first, float4 (&v)[n/2]) {
    const int lane = threadIdx.x % 32;
    const float * x = args.x + k_tile*MBQ_GEMM_TILE_K + lane%16*4;
#pragma unroll
    for (int j = 0; j < n/2; ++j) {
        const int column = first + 2*j + lane/16;
        const float * from = x + column*args.x_column;
        v[j] = column >= args.N ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : args.x_aligned ? __ldcs((const float4 *) from) :
            make_float4(from[0], from[1], from[2], from[3]);
    }
}

// The lanes of a pair exchange values, so that each has two runs of 4 even or odd ones.
template <int n>
static __device__ __forceinline__ void mbq_store_f16(const mbq_gemm_args & args, const int k_tile, const int first, const float4 (&v)[n/2]) {
    const int lane = threadIdx.x % 32;
    const int i    = lane % 16; // which 4 of the 64
    const int n_tile = first/MBQ_GEMM_TILE_N;
    int2 * to = (int2 *) args.x_tiles + ((int64_t) n_tile*(args.K/MBQ_GEMM_TILE_K) + k_tile)*MBQ_GEMM_TILE_N*16 + i/2%2;
#pragma unroll
    for (int j = 0; j < n/2; ++j) {
        const int column = first % MBQ_GEMM_TILE_N + 2*j + lane/16;
        const half2 even = __floats2half2_rn(v[j].x, v[j].z);
        const half2 odd  = __floats2half2_rn(v[j].y, v[j].w);
        const half2 kept = i % 2 ? odd : even;
        const half2 got  = __shfl_xor_sync(0xFFFFFFFF, i % 2 ? even : odd, 1);
        const half2 h[2] = { i % 2 ? got : kept, i % 2 ? kept : got };
        to[column*16 + ((i/4*2 + i%2) ^ (column % 8))*2] = *(const int2 *) h;
    }
}

// The k tiles before args.early. CTA: 64 columns. Grid: (k tiles, 2 * n tiles).
static __global__ void __launch_bounds__(256) mbq_convert_early(const mbq_gemm_args args, int * flags, const int n_flags) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    for (int i = (blockIdx.y*gridDim.x + blockIdx.x)*256 + threadIdx.x; i < n_flags; i += gridDim.x*gridDim.y*256) {
        flags[i] = 0;
    }
    const int first = blockIdx.y*64 + threadIdx.x/32*8;
    float4 v[4];
    mbq_load_f32<8>(args, blockIdx.x, first, v);
    mbq_store_f16<8>(args, blockIdx.x, first, v);
}

#ifdef MBQ_WGMMA

// Converts the other k tiles, in CTAs of mbq_gemm that have no output tile, while the others multiply. Warps process chunks of 32 columns of a tile round-robin.
static __device__ __forceinline__ void mbq_convert_late(const mbq_gemm_args & args) {
    constexpr int warps = MBQ_GEMM_THREADS/32;
    constexpr int n = MBQ_CONVERT_N;
    const int chunks  = (args.N + MBQ_GEMM_TILE_N - 1)/MBQ_GEMM_TILE_N*(MBQ_GEMM_TILE_N/n); // per k tile
    const int k_tiles = args.K/MBQ_GEMM_TILE_K;
    const int step    = args.converters*warps;
    int chunk = args.early*chunks + blockIdx.x*warps + threadIdx.x/32;
    if (chunk >= k_tiles*chunks) {
        return;
    }
    ggml_cuda_pdl_sync();
    float4 v[n/2];
    mbq_load_f32<n>(args, chunk/chunks, chunk%chunks*n, v);
    while (chunk < k_tiles*chunks) {
        const int k_tile = chunk/chunks;
        const int first = chunk%chunks*n;
        mbq_store_f16<n>(args, k_tile, first, v);
        chunk += step;
        if (chunk < k_tiles*chunks) {
            mbq_load_f32<n>(args, chunk/chunks, chunk%chunks*n, v); // before the wait for the stores
        }
        mbq_signal_copies(args.ready + first/MBQ_GEMM_TILE_N*k_tiles + k_tile);
    }
}

#endif // MBQ_WGMMA
