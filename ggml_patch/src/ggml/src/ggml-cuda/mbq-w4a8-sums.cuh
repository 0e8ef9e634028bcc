#pragma once

// The epilogue of mbq_w4a8_gemm (mbq-w4a8-gemm.cuh): a consumer's sums, in wgmma's register layout, go to another worker or, scaled, to dst.

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
    constexpr int batch = T::BN < 128 ? T::BN/8 : 16; // loads in flight
#pragma unroll
    for (int first = 0; first < T::BN/8; first += batch) {
        int4 p[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            if (first + i < T::BN/8) {
                p[i] = part[(first + i)*T::WARPS*32];
            }
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            if (first + i < T::BN/8) {
                int * v = d + 4*(first + i);
                v[0] += p[i].x; v[1] += p[i].y; v[2] += p[i].z; v[3] += p[i].w;
            }
        }
    }
}

// Converts a sum to the stored value; ADD is upstream's, with the same compiler options
struct mbq_w4a8_end {
    const mbq_w4a8_gemm_matrix & m;
    float d_w[2], bias[2]; // for the thread's two rows

    __device__ __forceinline__ float operator()(const int sum, const int r, const float scale, const float more) const {
        float v = mbq_w4a8_scale(sum, d_w[r], scale);
        if (m.bias) {
            v = __fadd_rn(v, bias[r]);
        }
        return m.more ? __fadd_rn(v, more) : v;
    }
};

// Stores two rows of a column whose floats start at dst
template <bool halves>
static __device__ __forceinline__ void mbq_w4a8_store_two(float * dst, const int row, const float2 v, const bool really) {
    if constexpr (halves) {
        mbq_store_past_l1((half *) dst + row, v, really);
    } else {
        mbq_store_past_l1(dst + row, v, really);
    }
}

// The columns of a tile that a thread has, two of each 8, clipped to a product of N columns
template <typename T> struct mbq_w4a8_columns_of {
    int first; // the thread's first column
    int left;  // columns from there to the end; 0 or less if it has none
    int last;  // maximum even offset from the first column that is still in range

    __device__ __forceinline__ mbq_w4a8_columns_of(const int n_tile, const int t, const int N) {
        const int wanted = n_tile*T::BN + 2*t;
        left  = min(N - wanted, T::BN);
        first = left > 0 ? wanted : 0;
        last  = max(left - 1, 0) & ~1;
    }
};

// Two rows. Scales and addends are loaded in batches: a load before each store takes 6 us per tile of 128 columns. Scales after the last column are flags
// (mbq_w4a8_int8), and are not used.
template <typename T, bool with_more, bool halves = false>
static __device__ __forceinline__ void mbq_w4a8_store_two_rows(const mbq_w4a8_end & end, float * dst, const int row, const float * scale, const float * more,
        const mbq_w4a8_columns_of<T> & columns, const int (&d)[T::BN/2]) {
    using L = mbq_w4a8_layout<T::bits>;
    constexpr int batch = T::BN < 128 || with_more ? 8 : 16;
    const int64_t dst_column = end.m.dst_column, more_column = end.m.more_column;
#pragma unroll
    for (int i0 = 0; i0 < T::BN/8; i0 += batch) {
        float2 s[batch], m[batch][2];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            if (i0 + i < T::BN/8) {
                const int column = min(8*(i0 + i), columns.last);
                s[i] = *(const float2 *) (scale + column);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    m[i][c] = with_more ? *(const float2 *) (more + min(column + c, max(columns.left - 1, 0))*more_column) : make_float2(0.0f, 0.0f);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            if (i0 + i < T::BN/8) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int * sums = d + 4*(i0 + i) + c;
                    const float of_column = c == 0 ? s[i].x : s[i].y;
                    mbq_w4a8_store_two<halves>(dst + (8*(i0 + i) + c)*dst_column, row,
                        make_float2(end(sums[0] >> L::shift, 0, of_column, m[i][c].x), end(sums[2] >> L::shift, 1, of_column, m[i][c].y)), 8*(i0 + i) + c < columns.left);
                }
            }
        }
    }
}

// Stores rows `row` and row + 1 of the tile's columns
template <typename T>
static __device__ __forceinline__ void mbq_w4a8_store(const mbq_w4a8_args & w4a8, mbq_w4a8_end & end, const int n_tile, const int row, const int t, const int (&d)[T::BN/2]) {
    using L = mbq_w4a8_layout<T::bits>;
    const mbq_gemm_args & args = w4a8.gemm;
    const mbq_w4a8_gemm_matrix & m = end.m;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        end.bias[r] = m.bias ? m.bias[min(row + r, m.M - 1)] : 0.0f;
    }
    const mbq_w4a8_columns_of<T> columns(n_tile, t, args.N);
    const int first = columns.first;
    float * dst = m.dst + first*m.dst_column;
    const float * scale = w4a8.scale + first;
    const float * more  = m.more ? m.more + row + first*m.more_column : nullptr;
    const bool pairs = ((uintptr_t) m.dst | m.dst_column*4 | (uintptr_t) m.more | m.more_column*4) % 8 == 0;
    if (pairs && row + 1 < m.M) {
        if (m.more) {
            mbq_w4a8_store_two_rows<T, true>(end, dst, row, scale, more, columns, d);
        } else if (m.halves) {
            mbq_w4a8_store_two_rows<T, false, true>(end, dst, row, scale, more, columns, d);
        } else {
            mbq_w4a8_store_two_rows<T, false>(end, dst, row, scale, more, columns, d);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < T::BN/8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (8*i + c < columns.left) {
                const float s = scale[8*i + c];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (row + r < m.M) {
                        const float added = m.more ? more[(8*i + c)*m.more_column + r] : 0.0f;
                        const float v = end(d[4*i + 2*r + c] >> L::shift, r, s, added);
                        float * column = dst + (8*i + c)*m.dst_column;
                        if (m.halves) {
                            ((half *) column)[row + r] = __float2half_rn(v);
                        } else {
                            column[row + r] = v;
                        }
                    }
                }
            }
        }
    }
}

// The codes of f, for the sums of two rows by two columns: those of one column in the low bytes of x, of the other in y
template <mbq_w4a8_function f>
static __device__ __forceinline__ uint2 mbq_w4a8_codes_of(const mbq_w4a8_end & end, const int * sums, const int shift, const float2 scale, const float inverse) {
    const auto code = [&](const int i, const int r, const float of_column) {
        return mbq_w4a8_code(mbq_w4a8_gelu<f>::of(end(sums[i] >> shift, r, of_column, 0.0f)), inverse);
    };
    return make_uint2(mbq_w4a8_pack_two(code(0, 0, scale.x), code(2, 1, scale.x)), mbq_w4a8_pack_two(code(1, 0, scale.y), code(3, 1, scale.y)));
}

// Shared memory of a group of four warps, each of which has one word of the same 16 bytes
template <int BN> struct mbq_w4a8_meeting {
    static constexpr int batch = 8; // groups of 8 columns
    uint32_t words[4][batch*32];
    float scale[BN];
};

// Stores a tile's columns, starting at `first`, of rows `row` and row + 1
template <typename T, mbq_w4a8_function f>
static __device__ __forceinline__ void mbq_w4a8_store_codes_of(const mbq_w4a8_args & w4a8, const mbq_w4a8_end & end, const int first, const int row, const mbq_gemm_thread & at,
        const float inverse, mbq_w4a8_meeting<T::BN> & meeting, const int (&d)[T::BN/2]) {
    constexpr int batch = mbq_w4a8_meeting<T::BN>::batch;
    const mbq_w4a8_codes & to = w4a8.codes;
    const int group = at.warp/4, warp = at.warp % 4, g = at.lane/4, t = at.lane % 4;
    const int unit  = row/256*16 + row/32%2*8 + row/16%2; // see mbq_w4a8_codes::word; also units 2, 4 and 6 after it
    const auto together = [&] { asm volatile("bar.sync %0, 128;" : : "r"(1 + group) : "memory"); };
    for (int i = threadIdx.x % 128; i < T::BN; i += 128) {
        meeting.scale[i] = w4a8.scale[min(first + i, w4a8.gemm.N - 1)]; // columns after the last one are dropped
    }
    together();
#pragma unroll
    for (int i0 = 0; i0 < T::BN/8; i0 += batch) {
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            if (i0 + i < T::BN/8) {
                const float2 scale = *(const float2 *) &meeting.scale[8*(i0 + i) + 2*t];
                const uint2  mine  = mbq_w4a8_codes_of<f>(end, d + 4*(i0 + i), mbq_w4a8_layout<T::bits>::shift, scale, inverse);
                // a lane with even g keeps the first column of its rows and its neighbour's, one with odd g the second
                const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, g % 2 ? mine.x : mine.y, 4);
                meeting.words[warp][i*32 + (2*t + g % 2)*4 + g/2] = g % 2 ? mbq_w4a8_join(other, mine.y) : mbq_w4a8_join(mine.x, other);
            }
        }
        together();
#pragma unroll
        for (int i = threadIdx.x % 128; i < batch*32; i += 128) {
            if (T::BN % 128 != 0 && (8*i0 + i/4 >= T::BN || first + 8*i0 + i/4 >= w4a8.gemm.N)) {
                break; // belongs to the next tile, or may be after the last 256 columns
            }
            to.q[mbq_w4a8_unit_at<true>(unit + i%4*2, first + 8*i0 + i/4, 0, to.K)] =
                make_int4(meeting.words[0][i], meeting.words[1][i], meeting.words[2][i], meeting.words[3][i]);
        }
        together();
    }
}

// Stores rows `row` and row + 1 of the tile's columns as int8
template <typename T>
static __device__ __forceinline__ void mbq_w4a8_store_codes(const mbq_w4a8_args & w4a8, const mbq_w4a8_end & end, const int n_tile, const int row, const mbq_gemm_thread & at,
        const float2 of_range, const int (&d)[T::BN/2]) {
    __shared__ mbq_w4a8_meeting<T::BN> meetings[2]; // one per group
    const mbq_w4a8_codes & to = w4a8.codes;
    const int first = n_tile*T::BN;
    if (row < 16) { // one of all warps that have these columns
        for (int i = at.lane; i < min(T::BN, w4a8.gemm.N - first); i += 32) {
            to.scale[first + i] = of_range.y;
        }
    }
    mbq_w4a8_meeting<T::BN> & meeting = meetings[at.warp/4];
    switch (to.of) {
        case MBQ_W4A8_GELU:     mbq_w4a8_store_codes_of<T, MBQ_W4A8_GELU>      (w4a8, end, first, row, at, of_range.x, meeting, d); break;
        case MBQ_W4A8_GELU_ERF: mbq_w4a8_store_codes_of<T, MBQ_W4A8_GELU_ERF>  (w4a8, end, first, row, at, of_range.x, meeting, d); break;
        default:                mbq_w4a8_store_codes_of<T, MBQ_W4A8_GELU_QUICK>(w4a8, end, first, row, at, of_range.x, meeting, d); break;
    }
}

#endif // MBQ_WGMMA
