#pragma once

// Activations as mbq_gemm (mbq-gemm.cuh) wants them: fp16 tiles of 128 columns and 64 weights that one bulk copy moves to shared memory as they
// are, with even weights before odd ones in each 16 and the 16-byte words of a column in wgmma's 128-byte swizzle.

#include "mbq-shares.cuh"
#include "mbq-wgmma.cuh"

static constexpr int MBQ_GEMM_THREADS = 384;
static constexpr int MBQ_GEMM_COLUMNS = 128; // of a tile: a block of mbq_gemm takes one or two
static constexpr int MBQ_GEMM_CHUNK   = 64;  // activations of a column in a tile: 128 bytes, the span of the swizzle
static constexpr int MBQ_GEMM_UNIT    = 32;  // columns of a chunk that a warp of mbq_convert takes at a time

// Tiles are [column tile][chunk][column][chunk of 8 halves, swizzled]. A warp takes n columns of a chunk at a time. Activations are read once
// (.cs), so that the tiles stay in the L2 cache.
template <int n>
static __device__ __forceinline__ void mbq_load_columns(const mbq_gemm_args & args, const int chunk, const int first, float4 (&v)[n/2]) {
    const int lane = threadIdx.x % 32;
    const float * x = args.x + chunk*MBQ_GEMM_CHUNK + lane%16*4;
#pragma unroll
    for (int j = 0; j < n/2; ++j) {
        const int column = first + 2*j + lane/16;
        const float * from = x + column*args.x_column;
        v[j] = column >= args.columns ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : args.x_aligned ? __ldcs((const float4 *) from) :
            make_float4(from[0], from[1], from[2], from[3]);
    }
}

// Lanes of a pair swap, so that each has two halves of 4 even or odd ones.
template <int n>
static __device__ __forceinline__ void mbq_store_halves(const mbq_gemm_args & args, const int chunk, const int first, const float4 (&v)[n/2]) {
    const int lane = threadIdx.x % 32;
    const int i    = lane % 16; // of the 4s of a chunk
    const int tile = first/MBQ_GEMM_COLUMNS;
    int2 * to = (int2 *) args.tiles + ((int64_t) tile*(args.k/MBQ_GEMM_CHUNK) + chunk)*MBQ_GEMM_COLUMNS*16 + i/2%2;
#pragma unroll
    for (int j = 0; j < n/2; ++j) {
        const int column = first % MBQ_GEMM_COLUMNS + 2*j + lane/16;
        const half2 even = __floats2half2_rn(v[j].x, v[j].z);
        const half2 odd  = __floats2half2_rn(v[j].y, v[j].w);
        const half2 kept = i % 2 ? odd : even;
        const half2 got  = __shfl_xor_sync(0xFFFFFFFF, i % 2 ? even : odd, 1);
        const half2 h[2] = { i % 2 ? got : kept, i % 2 ? kept : got };
        to[column*16 + ((i/4*2 + i%2) ^ (column % 8))*2] = *(const int2 *) h;
    }
}

// The chunks before args.early. Block: 64 columns. Grid: (chunks, 2*column tiles).
static __global__ void __launch_bounds__(256) mbq_halves(const mbq_gemm_args args, int * flags, const int n_flags) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    for (int i = (blockIdx.y*gridDim.x + blockIdx.x)*256 + threadIdx.x; i < n_flags; i += gridDim.x*gridDim.y*256) {
        flags[i] = 0;
    }
    const int first = blockIdx.y*64 + threadIdx.x/32*8;
    float4 v[4];
    mbq_load_columns<8>(args, blockIdx.x, first, v);
    mbq_store_halves<8>(args, blockIdx.x, first, v);
}

#ifdef MBQ_WGMMA

// The other chunks, by blocks of mbq_gemm that have no rows, while the others multiply. Their warps take 32 columns of a chunk in turns.
static __device__ __forceinline__ void mbq_convert(const mbq_gemm_args & args) {
    constexpr int warps = MBQ_GEMM_THREADS/32;
    constexpr int n = MBQ_GEMM_UNIT;
    const int units  = (args.columns + MBQ_GEMM_COLUMNS - 1)/MBQ_GEMM_COLUMNS*(MBQ_GEMM_COLUMNS/n); // of a chunk
    const int chunks = args.k/MBQ_GEMM_CHUNK;
    const int step   = args.converters*warps;
    int unit = args.early*units + blockIdx.x*warps + threadIdx.x/32;
    if (unit >= chunks*units) {
        return;
    }
    ggml_cuda_pdl_sync();
    float4 v[n/2];
    mbq_load_columns<n>(args, unit/units, unit%units*n, v);
    while (unit < chunks*units) {
        const int chunk = unit/units;
        const int first = unit%units*n;
        mbq_store_halves<n>(args, chunk, first, v);
        unit += step;
        if (unit < chunks*units) {
            mbq_load_columns<n>(args, unit/units, unit%units*n, v); // before the wait for the stores
        }
        mbq_signal_copies(args.ready + first/MBQ_GEMM_COLUMNS*chunks + chunk);
    }
}

#endif // MBQ_WGMMA
