#pragma once

// W4A8 products of up to 8 columns that mbq_w4a8_mmv (mbq-w4a8-gemv.cuh) does not support: rows that are not whole groups of 256, and GPUs before Hopper.

#include "mbq-w4a8-quantize.cuh"

// Four warps share two rows; each processes 8 blocks of both at a time, with four lanes per block. A CTA has two such groups.
static constexpr int MBQ_W4A8_SPLIT = 4;

struct mbq_w4a8_vec_args {
    const char * w;
    const int2 * q;       // records
    const float * scale;
    float * dst;
    int64_t dst_column;
    int M, row_bytes, blocks;
};

template <int bits>
static __device__ __forceinline__ void mbq_w4a8_load_words(const char * p, uint32_t (&word)[bits/4]) {
#pragma unroll
    for (int j = 0; j < bits/4; ++j) { // at multiples of 2 bytes
        const uint16_t * h = (const uint16_t *) (p + 16*j);
        word[j] = (uint32_t) h[0] | (uint32_t) h[1] << 16;
    }
}

// Loads activations 4t to 4t + 3 and 16 + 4t to 19 + 4t of a block from the records
static __device__ __forceinline__ int2 mbq_w4a8_load_pair(const mbq_w4a8_vec_args & args, const int columns, const int column, const int block, const int t) {
    return args.q[(((int64_t) (block/8*4 + block%2*2 + t/2)*columns + column)*4 + block%8/2)*2 + t%2];
}

template <int bits, int N>
static __global__ void __launch_bounds__(256) mbq_w4a8_vec(const mbq_w4a8_vec_args args) {
    using L = mbq_w4a8_layout<bits>;
    constexpr int ahead = 4;
    ggml_cuda_pdl_lc();
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int row  = (blockIdx.x*(8/MBQ_W4A8_SPLIT) + warp/MBQ_W4A8_SPLIT)*2;
    const int part = warp % MBQ_W4A8_SPLIT;
    ggml_cuda_pdl_sync();
    const char * w[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        w[r] = args.w + (int64_t) min(row + r, args.M - 1)*args.row_bytes;
    }
    int sum[N][2] = {};
    for (int b0 = part*8 + lane/4; b0 < args.blocks; b0 += 8*MBQ_W4A8_SPLIT*ahead) {
        uint32_t word[ahead][2][bits/4];
#pragma unroll
        for (int u = 0; u < ahead; ++u) {
            const int b = min(b0 + 8*MBQ_W4A8_SPLIT*u, args.blocks - 1); // blocks after the end are multiplied by zeros below
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                mbq_w4a8_load_words<bits>(w[r] + b*L::block_bytes + 2 + 4*(lane % 4), word[u][r]);
            }
        }
#pragma unroll
        for (int u = 0; u < ahead; ++u) {
            const int b = b0 + 8*MBQ_W4A8_SPLIT*u;
            uint32_t a[2][2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                a[r][0] = b >= args.blocks ? 0 : bits == 4 ? mbq_w4a8_nibbles(word[u][r][0] << 4) : word[u][r][0];
                a[r][1] = b >= args.blocks ? 0 : bits == 4 ? mbq_w4a8_nibbles(word[u][r][0])      : word[u][r][bits/4 - 1];
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int2 q = mbq_w4a8_load_pair(args, N, n, min(b, args.blocks - 1), lane % 4);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    sum[n][r] = ggml_cuda_dp4a(a[r][0], q.x, ggml_cuda_dp4a(a[r][1], q.y, sum[n][r]));
                }
            }
        }
    }
    __shared__ int sums[8][N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int all = warp_reduce_sum(sum[n][r]);
            if (lane == 0) {
                sums[warp][n][r] = all;
            }
        }
    }
    __syncthreads();
    if (part == 0 && lane < 2*N && row + lane%2 < args.M) {
        int all = 0;
#pragma unroll
        for (int i = 0; i < MBQ_W4A8_SPLIT; ++i) {
            all += sums[warp + i][lane/2][lane%2];
        }
        const float d = __half2float(*(const half *) (args.w + (int64_t) (row + lane%2)*args.row_bytes));
        args.dst[lane/2*args.dst_column + row + lane%2] = mbq_w4a8_scale(all >> L::shift, d, args.scale[lane/2]);
    }
}
