#pragma once

// The end of a tile of mbq_w4a8_gemm (mbq-w4a8-gemm.cuh): a consumer's sums, as wgmma leaves them, go to another worker or, scaled, to dst.

#include "mbq-w4a8-wgmma.cuh"

#ifdef MBQ_WGMMA

// The sums of a CTA's part of a tile
template <typename T>
static __device__ __forceinline__ int4 * mbq_w4a8_part(const mbq_gemm_args & args, const mbq_gemm_thread & at, const int worker) {
    return (int4 *) args.parts + (int64_t) (worker*T::CL + at.rank)*(T::BN/8*T::WARPS*32) + threadIdx.x % (T::WARPS*32);
}

template <typename T>
static __device__ __forceinline__ int * mbq_w4a8_done(const mbq_gemm_args & args, const mbq_gemm_thread & at, const int worker) {
    return args.done + (worker*T::CL + at.rank)*8 + at.warp % T::WARPS;
}

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_leave(int4 * part, const int (&d)[T::BN/2]) {
#pragma unroll
    for (int i = 0; i < T::BN/8; ++i) {
        part[i*T::WARPS*32] = make_int4(d[4*i], d[4*i + 1], d[4*i + 2], d[4*i + 3]);
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
            p[i] = part[(first + i)*T::WARPS*32];
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int * v = d + 4*(first + i);
            v[0] += p[i].x; v[1] += p[i].y; v[2] += p[i].z; v[3] += p[i].w;
        }
    }
}

// How a sum becomes what is stored: ADD is upstream's, with the same options
struct mbq_w4a8_end {
    const mbq_w4a8_gemm_matrix & m;
    float d_w[2], bias[2]; // of the thread's two rows

    __device__ __forceinline__ float operator()(const int sum, const int r, const float scale, const float more) const {
        float v = mbq_w4a8_scale(sum, d_w[r], scale);
        if (m.bias) {
            v = __fadd_rn(v, bias[r]);
        }
        return m.more ? __fadd_rn(v, more) : v;
    }
};

// A whole tile's columns of two rows. Scales, and what is added, are loaded many at a time: a load before each store takes 6 us a tile of 128 columns.
template <typename T, bool with_more>
static __device__ __forceinline__ void mbq_w4a8_store_whole(const mbq_w4a8_end & end, float * dst, const float * scale, const float * more, const int (&d)[T::BN/2]) {
    using L = mbq_w4a8_layout<T::bits>;
    constexpr int batch = T::BN < 128 || with_more ? 8 : 16;
    const int64_t dst_column = end.m.dst_column, more_column = end.m.more_column;
#pragma unroll
    for (int i0 = 0; i0 < T::BN/8; i0 += batch) {
        float2 s[batch], m[batch][2];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            s[i] = *(const float2 *) (scale + 8*(i0 + i));
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                m[i][c] = with_more ? *(const float2 *) (more + (8*(i0 + i) + c)*more_column) : make_float2(0.0f, 0.0f);
            }
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int * sums = d + 4*(i0 + i) + c;
                const float of_column = c == 0 ? s[i].x : s[i].y;
                mbq_store_past_l1(dst + (8*(i0 + i) + c)*dst_column,
                    make_float2(end(sums[0] >> L::shift, 0, of_column, m[i][c].x), end(sums[2] >> L::shift, 1, of_column, m[i][c].y)));
            }
        }
    }
}

// Rows `row` and row + 1 of the tile's columns; d_w: the rows' scales
template <typename T>
static __device__ __forceinline__ void mbq_w4a8_store(const mbq_w4a8_args & w4a8, const mbq_w4a8_gemm_matrix & m, const int n_tile, const int row, const int t,
        const float (&d_w)[2], const int (&d)[T::BN/2]) {
    using L = mbq_w4a8_layout<T::bits>;
    const mbq_gemm_args & args = w4a8.gemm;
    mbq_w4a8_end end = { m, { d_w[0], d_w[1] }, { 0.0f, 0.0f } };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        end.bias[r] = m.bias ? m.bias[min(row + r, m.M - 1)] : 0.0f;
    }
    const int first = n_tile*T::BN + 2*t; // column, and the next, and 8 on
    float * dst = m.dst + row + first*m.dst_column;
    const float * scale = w4a8.scale + first;
    const float * more  = m.more ? m.more + row + first*m.more_column : nullptr;
    const bool pairs = ((uintptr_t) m.dst | m.dst_column*4 | (uintptr_t) m.more | m.more_column*4) % 8 == 0;
    if (pairs && row + 1 < m.M && (n_tile + 1)*T::BN <= args.N) {
        if (m.more) {
            mbq_w4a8_store_whole<T, true>(end, dst, scale, more, d);
        } else {
            mbq_w4a8_store_whole<T, false>(end, dst, scale, more, d);
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
                    if (row + r < m.M) {
                        const float added = m.more ? more[(8*i + c)*m.more_column + r] : 0.0f;
                        dst[(8*i + c)*m.dst_column + r] = end(d[4*i + 2*r + c] >> L::shift, r, s, added);
                    }
                }
            }
        }
    }
}

#endif // MBQ_WGMMA
