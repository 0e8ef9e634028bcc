#pragma once

// The epilogue of a tile of q, k or v, which prepares them for attention (mbq-w4a8-gemm.cuh):
//
//   q   bias, ROPE         scaled for attention, F16, each head at the start of its floats
//   k   bias, ROPE, CPY    F16, heads before positions
//   v   bias               F16, each position at the start of its floats
//
// ROPE rotates elements i and i + half of a head. In such a tile, a thread has both, as rows g and g + 8 of its A operand (mbq_w4a8_tile_rows), and computes
// their sine and cosine itself. 32 columns at a time are collected in shared memory, so that a column's rows are stored as 64 contiguous bytes: word by word,
// 3840 x 1280 by 4096 takes 60 us on an H200. Separate nodes, and mbq_qkv (mbq-qkv.cuh), write and read q and k as floats: 84 MB for 4096 positions of 1280.
// The bits are the same.

#include "mbq-w4a8-sums.cuh"

#ifdef MBQ_WGMMA

// Shared memory of a group of four warps, for a tile of 64 rows
template <int BN> struct mbq_w4a8_heads {
    static constexpr int columns = 32;
    int4  halves[columns*8];   // 64 rows of a column: for each warp 8 rows, then for each warp the 8 rows that these are rotated with; see slot
    float scale[BN];
    float positions[2][BN];

    // Index of eight rows of a column. Neighbouring columns start at different banks.
    static __device__ __forceinline__ int slot(const int column, const int eight) {
        return column*8 + (eight ^ column%8);
    }
};

// Stores four 8 x 8 matrices, transposed from mma's register layout; each lane has the address of one column of one of them
static __device__ __forceinline__ void mbq_store_matrices(int4 * to, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
        : : "r"((uint32_t) __cvta_generic_to_shared(to)), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
}

// Copies `columns` of a tile, starting at `first`, from shared memory to their destination. `left` columns are in range.
template <typename T>
static __device__ __forceinline__ void mbq_w4a8_store_met(const mbq_w4a8_args & w4a8, const mbq_w4a8_gemm_matrix & m, const int first_row, const int first, const int left,
        const mbq_w4a8_heads<T::BN> & shared) {
    const int pairs = w4a8.angles.n_dims, eight = threadIdx.x % 8;
    const int row   = mbq_w4a8_tile_rows<T>::row(first_row, eight % 4, 0, pairs), head = row/(2*pairs);
    half * dst = (half *) m.dst + head*m.dst_head + row - head*2*pairs + eight/4*pairs;
#pragma unroll
    for (int i = threadIdx.x % 128; i < 8*shared.columns; i += 128) {
        if (i/8 < left && row < m.M) {
            mbq_store_past_l1(dst + (first + i/8)*m.dst_column, shared.halves[shared.slot(i/8, eight)]);
        }
    }
}

// first_row: the tile's; row: the thread's first
template <typename T, bool turn>
static __device__ __forceinline__ void mbq_w4a8_store_pairs(const mbq_w4a8_args & w4a8, const mbq_w4a8_end & end, const int n_tile, const int first_row, const int row,
        const mbq_gemm_thread & at, mbq_w4a8_heads<T::BN> & shared, const int (&d)[T::BN/2]) {
    using L = mbq_w4a8_layout<T::bits>;
    const mbq_rope_angles & angles = w4a8.angles;
    const int warp = at.warp % 4, t = at.lane % 4, i_pair = row % (2*angles.n_dims), section = angles.positions_of(i_pair, 1) - angles.pos, first = n_tile*T::BN, N = w4a8.gemm.N;
    const auto together = [&] { asm volatile("bar.sync %0, 128;" : : "r"(1 + at.warp/4) : "memory"); };
    for (int i = threadIdx.x % 128; i < T::BN; i += 128) {
        const int column = min(first + i, N - 1); // columns after the last one are dropped
        shared.scale[i] = w4a8.scale[column];
        if constexpr (turn) {
            shared.positions[0][i] = angles.pos[column];
            shared.positions[1][i] = angles.pos[column + N];
        }
    }
    const float power = turn ? angles.power(i_pair) : 0.0f;
    const auto two = [&](const int * sums, const float of_column, const float position, float & a, float & b) {
        a = end(sums[0] >> L::shift, 0, of_column, 0.0f);
        b = end(sums[2] >> L::shift, 1, of_column, 0.0f);
        if constexpr (turn) {
            const float2 angle = angles.at(position, power);
            mbq_rope_turn(a, b, angle.x, angle.y);
            a = __fmul_rn(a, end.m.turn);
            b = __fmul_rn(b, end.m.turn);
        }
    };
    together();
#pragma unroll
    for (int i0 = 0; i0 < T::BN/8; i0 += shared.columns/8) {
#pragma unroll
        for (int i = i0; i < i0 + shared.columns/8; i += 2) {
            if (i < T::BN/8) {
                uint32_t words[4]; // for the first and the second 8 columns: the first rows and those that they are rotated with
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int column = 8*(i + j) + 2*t;
                    const float2 scale    = *(const float2 *) &shared.scale[column];
                    const float2 position = turn ? *(const float2 *) &shared.positions[section][column] : make_float2(0.0f, 0.0f);
                    float a[2], b[2];
                    two(d + 4*(i + j),     scale.x, position.x, a[0], b[0]);
                    two(d + 4*(i + j) + 1, scale.y, position.y, a[1], b[1]);
                    const half2 h[2] = { __floats2half2_rn(a[0], a[1]), __floats2half2_rn(b[0], b[1]) };
                    words[2*j]     = *(const uint32_t *) &h[0];
                    words[2*j + 1] = *(const uint32_t *) &h[1];
                }
                mbq_store_matrices(&shared.halves[shared.slot(8*(i - i0) + at.lane/16*8 + at.lane%8, at.lane/8%2*4 + warp)], words);
            }
        }
        together();
        mbq_w4a8_store_met<T>(w4a8, end.m, first_row, first + 8*i0, min(N - first, T::BN) - 8*i0, shared);
        together();
    }
}

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_store_heads(const mbq_w4a8_args & w4a8, const mbq_w4a8_end & end, const int n_tile, const int first_row, const int row,
        const mbq_gemm_thread & at, const int (&d)[T::BN/2]) {
    __shared__ mbq_w4a8_heads<T::BN> shared[2]; // one per group
    if (end.m.turn != 0.0f) {
        mbq_w4a8_store_pairs<T, true>(w4a8, end, n_tile, first_row, row, at, shared[at.warp/4], d);
    } else {
        mbq_w4a8_store_pairs<T, false>(w4a8, end, n_tile, first_row, row, at, shared[at.warp/4], d);
    }
}

#endif // MBQ_WGMMA
