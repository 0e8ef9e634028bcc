#pragma once

// The end of a tile of mbq_w4a8_gemm (mbq-w4a8-gemm.cuh): a consumer's sums, as wgmma leaves them, go to another worker or, scaled, to dst.

#include "mbq-w4a8-wgmma.cuh"

#ifdef MBQ_WGMMA

// The sums of a CTA's part of a tile
template <typename T>
static __device__ __forceinline__ int4 * mbq_w4a8_part(const mbq_gemm_args & args, const mbq_gemm_thread & at, const int worker) {
    return (int4 *) args.parts + (int64_t) (worker*T::CL + at.rank)*(T::BN/8*256) + threadIdx.x;
}

template <typename T>
static __device__ __forceinline__ int * mbq_w4a8_done(const mbq_gemm_args & args, const mbq_gemm_thread & at, const int worker) {
    return args.done + (worker*T::CL + at.rank)*8 + at.warp;
}

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_leave(int4 * part, const int (&d)[T::BN/2]) {
#pragma unroll
    for (int i = 0; i < T::BN/8; ++i) {
        part[i*256] = make_int4(d[4*i], d[4*i + 1], d[4*i + 2], d[4*i + 3]);
    }
}

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_add(const int4 * part, int (&d)[T::BN/2]) {
    constexpr int batch = T::BN < 128 ? T::BN/8 : 16; // loads on their way
#pragma unroll
    for (int first = 0; first < T::BN/8; first += batch) {
        int4 p[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            p[i] = part[(first + i)*256];
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int * v = d + 4*(first + i);
            v[0] += p[i].x; v[1] += p[i].y; v[2] += p[i].z; v[3] += p[i].w;
        }
    }
}

// Rows `row` and row + 1 of the tile's columns; d_w: the rows' scales
template <typename T>
static __device__ __forceinline__ void mbq_w4a8_store(const mbq_w4a8_args & w4a8, const int n_tile, const int row, const int t, const float (&d_w)[2], const int (&d)[T::BN/2]) {
    using L = mbq_w4a8_layout<T::bits>;
    const mbq_gemm_args & args = w4a8.gemm;
    const int first = n_tile*T::BN + 2*t; // column, and the next, and 8 on
    float * dst = args.dst + row + first*args.dst_column;
    const float * scale = w4a8.scale + first;
    const auto product = [&](const int i, const int c, const int r, const float s) {
        return mbq_w4a8_scale(d[4*i + 2*r + c] >> L::shift, d_w[r], s);
    };
    if (((uintptr_t) args.dst | args.dst_column*4) % 8 == 0 && row + 1 < args.M && (n_tile + 1)*T::BN <= args.N) {
        // Scales are loaded many at a time: one before each store takes 6 us a tile of 128 columns.
        constexpr int batch = T::BN < 128 ? T::BN/8 : 16;
#pragma unroll
        for (int i0 = 0; i0 < T::BN/8; i0 += batch) {
            float2 s[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                s[i] = *(const float2 *) (scale + 8*(i0 + i));
            }
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                float * to = dst + 8*(i0 + i)*args.dst_column;
                *(float2 *) to                       = make_float2(product(i0 + i, 0, 0, s[i].x), product(i0 + i, 0, 1, s[i].x));
                *(float2 *) (to + args.dst_column) = make_float2(product(i0 + i, 1, 0, s[i].y), product(i0 + i, 1, 1, s[i].y));
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < T::BN/8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (first + 8*i + c < args.N) {
                const float s = scale[8*i + c];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (row + r < args.M) {
                        dst[(8*i + c)*args.dst_column + r] = product(i, c, r, s);
                    }
                }
            }
        }
    }
}

#endif // MBQ_WGMMA
