#pragma once

// W4A8 products of up to 8 columns on Hopper, for rows of whole groups of 256. There is one CTA per multiprocessor, and each warp has its own ring buffer of
// pieces: 16 rows times 256 of K, which one lane copies with the tensor memory accelerator. Copies start while the previous kernel still runs, because
// weights do not depend on it.
//
//   output rows   tile 0 (16 rows)   tile 1   ...   CTA c, group of warps g: tiles c + g*gridDim.x, then every gridDim.x*groups
//   K of a tile   | piece 0 | piece 1 | piece 2 | ...   warp kw of the group's KW: pieces kw, kw + KW, ...
//
// One column: each CTA quantises it redundantly while the weights arrive. More columns: mbq_w4a8_quantize has written records, which are copied with the
// weights. One column of several matrices: their tiles are numbered consecutively. Gate and up: for each tile, first the gate's pieces and sums, then up's,
// and the result is silu(gate)*up.
// 4096 x 14336, cold: 14.0 us with one column and 15.9 with 8; dp4a on words loaded two bytes at a time (mbq_w4a8_vec) took 19.6 and 29.9.

#include "mbq-plan.cuh"
#include "mbq-w4a8-quantize.cuh"
#include "unary.cuh"

static constexpr int MBQ_W4A8_MAX_STAGES = 8;
static constexpr int MBQ_W4A8_UNITS      = 4; // units of 16 activations that a thread quantises

static constexpr int MBQ_W4A8_STATIC_BYTES = MBQ_MAX_WARPS*MBQ_W4A8_MAX_STAGES*8 + 32*4; // shared memory for barriers and for a reduction

enum mbq_w4a8_columns { MBQ_W4A8_SEVERAL, MBQ_W4A8_ONE, MBQ_W4A8_GATED }; // GATED: one column, gate and up

struct mbq_w4a8_mmv_matrix {
    const char  * w;
    float       * dst;
    const float * bias; // ONE: added to dst, or nullptr; may be dst
    int M, tile;        // number of rows; its first tile
};

struct mbq_w4a8_mmv_args {
    mbq_w4a8_mmv_matrix of[MBQ_W4A8_MATRICES]; // ONE: all, with tile = INT_MAX for missing ones; GATED: up, and the gate's w; otherwise only the first
    const float * x;        // one column
    const char * records;   // several columns
    const float * scale;    // of the records
    int64_t dst_column;
    int tiles, row_bytes, K, N; // K: a multiple of 256
    int x_aligned, stages;
    mbq_w4a8_ranges ranges; // for one column
};

// The weights of a piece and, for more than one column, the records of its activations
template <int bits>
static constexpr __host__ __device__ int mbq_w4a8_stage_bytes(const int N) {
    return 16*mbq_w4a8_layout<bits>::group_bytes + (N > 1 ? 256*N : 0);
}

#ifdef MBQ_TMA_AVAILABLE

// d += a * b: 16 rows, 8 columns, 32 of K
static __device__ __forceinline__ void mbq_mma_add(int (&d)[4], const uint32_t (&a)[4], const int b0, const int b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ int4 mbq_load_shared_16(const uint32_t address) {
    int4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

#endif // MBQ_TMA_AVAILABLE

template <int bits, mbq_w4a8_columns columns>
static __global__ void __launch_bounds__(512, 1) mbq_w4a8_mmv(const mbq_w4a8_mmv_args args, MBQ_W4A8_MAPS maps) {
#ifdef MBQ_TMA_AVAILABLE
    using L = mbq_w4a8_layout<bits>;
    constexpr bool one = columns != MBQ_W4A8_SEVERAL, gated = columns == MBQ_W4A8_GATED;
    extern __shared__ __align__(128) char mbq_shared[];
    __shared__ uint64_t mbq_ready[MBQ_MAX_WARPS][MBQ_W4A8_MAX_STAGES];
    __shared__ int   largest[32];
    ggml_cuda_pdl_lc();
    const int lane = threadIdx.x % 32, kw = threadIdx.x / 32, KW = blockDim.x / 32;
    const int group = threadIdx.y, warp = group*KW + kw, warps = blockDim.y*KW;
    const int g = lane / 4, t = lane % 4;
    const int pieces      = args.K/256;
    const int tiles       = args.tiles;
    const int tile_step   = gridDim.x*blockDim.y;
    const int stage_bytes = mbq_w4a8_stage_bytes<bits>(args.N);
    const uint32_t ring   = __cvta_generic_to_shared(mbq_shared) + warp*args.stages*stage_bytes;
    const uint32_t ready  = __cvta_generic_to_shared(mbq_ready[warp]);
    char * behind = mbq_shared + warps*args.stages*stage_bytes;
    int4 * sums   = (int4 *) behind + group*KW*2*32; // for two tiles, 16 bytes per lane
    int4 * column = (int4 *) behind + warps*2*32;    // one column, quantised

    const auto matrix_of = [&](const int tile) {
        return columns == MBQ_W4A8_ONE ? (tile >= args.of[1].tile) + (tile >= args.of[2].tile) : 0;
    };

    // What the warp copies next
    int tile_next  = kw < pieces ? blockIdx.x + group*gridDim.x : tiles;
    int piece_next = kw;
    bool up_next   = !gated;
    const auto fill = [&](const int stage, const bool rows, const bool records) {
        if (lane == 0 && tile_next < tiles) {
            const uint32_t to = ring + stage*stage_bytes;
            if (rows) {
                mbq_barrier_expect(ready + 8*stage, stage_bytes, true);
                const int from = up_next ? matrix_of(tile_next) : 1;
                const int row  = (tile_next - (columns == MBQ_W4A8_ONE ? args.of[from].tile : 0))*16;
                mbq_box_copy(to, maps.of[from], piece_next*(L::group_bytes/4), row, ready + 8*stage);
            }
            if (!one && records) {
                mbq_bulk_copy(to + 16*L::group_bytes, args.records + (int64_t) piece_next*256*args.N, 256*args.N, ready + 8*stage);
            }
        }
        piece_next += KW;
        if (piece_next >= pieces) {
            piece_next = kw;
            up_next    = !gated || !up_next;
            tile_next += gated && up_next ? 0 : tile_step;
        }
    };

    if (lane == 0) {
        for (int i = 0; i < args.stages; ++i) {
            mbq_barrier_init(ready + 8*i, 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    }
    __syncwarp();
    const int tile_first = tile_next;
    for (int i = 0; i < args.stages; ++i) {
        fill(i, true, false);
    }
    ggml_cuda_pdl_sync();
    float scale_one = 0.0f;
    if constexpr (one) {
        const int thread = warp*32 + lane, threads = warps*32;
        mbq_w4a8_unit unit[MBQ_W4A8_UNITS];
        int amax = 0;
#pragma unroll
        for (int r = 0; r < MBQ_W4A8_UNITS; ++r) {
            unit[r].template load<false>(args.x, r*threads + thread, args.K, args.x_aligned);
        }
#pragma unroll
        for (int r = 0; r < MBQ_W4A8_UNITS; ++r) {
            amax = unit[r].amax(amax);
        }
        const float2 scale = mbq_w4a8_column_scale(mbq_w4a8_amax(args.ranges.of(0), mbq_w4a8_largest(amax, largest, thread, threads)));
        scale_one = scale.y;
#pragma unroll
        for (int r = 0; r < MBQ_W4A8_UNITS; ++r) {
            if (r*threads + thread < args.K/16) {
                column[r*threads + thread] = unit[r].codes(scale.x);
            }
        }
        __syncthreads();
    } else {
        tile_next  = tile_first;
        piece_next = kw;
        for (int i = 0; i < args.stages; ++i) {
            fill(i, false, true);
        }
    }

    const int n = one ? 0 : min(g, args.N - 1); // the column of this lane's B operand
    const uint32_t x_one = __cvta_generic_to_shared(column);
    const int x_step = one ? 64 : 64*args.N;
    uint32_t stage = 0, phase = 0;
    int parity = 0;
    for (int tile = blockIdx.x + group*gridDim.x; tile < tiles; tile += tile_step) {
        float gate = 0.0f; // GATED: the gate's product
#pragma unroll 1
        for (int up = gated ? 0 : 1; up < 2; ++up) {
            // One column: each of these threads finishes one row. Its scale and bias are loaded while the pieces are multiplied.
            const mbq_w4a8_mmv_matrix & m = args.of[gated && up == 0 ? 1 : matrix_of(tile)];
            const int  row_one = (columns == MBQ_W4A8_ONE ? tile - m.tile : tile)*16 + threadIdx.x;
            const bool ends = one && threadIdx.x < 16 && row_one < m.M;
            half  d_one = 0.0f;
            float bias  = 0.0f;
            if (ends) {
                d_one = *(const half *) (m.w + (int64_t) row_one*args.row_bytes);
                bias  = columns == MBQ_W4A8_ONE && m.bias ? m.bias[row_one] : 0.0f;
            }
            int sum[2][4] = {};
            for (int piece = kw; piece < pieces; piece += KW) {
                const uint32_t here = ring + stage*stage_bytes;
                mbq_barrier_wait(ready + 8*stage, phase);
                const uint32_t x = (one ? x_one + piece*256 : here + 16*L::group_bytes) + (n*4 + t)*16;
                const mbq_w4a8_pair<bits, true> p[2] = { { here + g*L::group_bytes + t*2*L::block_bytes }, { here + (g + 8)*L::group_bytes + t*2*L::block_bytes } };
#pragma unroll
                for (int second = 0; second < 2; ++second) {
                    const mbq_w4a8_words<bits> w0 = p[0].load(0, second), w1 = p[1].load(0, second);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int4 b = mbq_load_shared_16(x + (2*second + i)*x_step);
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            uint32_t a[4];
                            p[0].unpack(w0, second, 2*i + j, a[0], a[2]);
                            p[1].unpack(w1, second, 2*i + j, a[1], a[3]);
                            mbq_mma_add(sum[j], a, j == 0 ? b.x : b.z, j == 0 ? b.y : b.w);
                        }
                    }
                }
                __syncwarp(); // all lanes have read the stage
                fill(stage, true, true);
                if (++stage == args.stages) {
                    stage  = 0;
                    phase ^= 1;
                }
            }

            // Sums are double-buffered: a warp that is ahead writes the next tile's sums while this tile's are read.
            int4 * all = sums + parity*KW*32;
            if constexpr (one) {
                if (t == 0) {
                    ((int *) all)[kw*16 + g]     = sum[0][0] + sum[1][0];
                    ((int *) all)[kw*16 + g + 8] = sum[0][2] + sum[1][2];
                }
            } else {
                all[kw*32 + lane] = make_int4(sum[0][0] + sum[1][0], sum[0][1] + sum[1][1], sum[0][2] + sum[1][2], sum[0][3] + sum[1][3]);
            }
            asm volatile("bar.sync %0, %1;" : : "r"(group + 1), "r"(KW*32) : "memory"); // barrier 0 belongs to __syncthreads
            if (ends) {
                int v = 0;
                for (int k = 0; k < KW; ++k) {
                    v += ((const int *) all)[k*16 + threadIdx.x];
                }
                const float y = mbq_w4a8_scale(v >> L::shift, __half2float(d_one), scale_one);
                if (up == 0) {
                    gate = y;
                } else if (gated) {
                    m.dst[row_one] = ggml_cuda_op_silu_single(gate) * y; // as in unary_gated_op_kernel
                } else {
                    m.dst[row_one] = m.bias ? y + bias : y;
                }
            }
            for (int i = threadIdx.x; !one && i < 128; i += KW*32) {
                const int of  = i/4;                    // the lane that wrote it
                const int row = tile*16 + of/4 + i/2%2*8;
                const int col = of%4*2 + i%2;
                if (row < m.M && col < args.N) {
                    int v = 0;
                    for (int k = 0; k < KW; ++k) {
                        v += ((const int *) all)[k*128 + i];
                    }
                    const float d = __half2float(*(const half *) (m.w + (int64_t) row*args.row_bytes));
                    m.dst[col*args.dst_column + row] = mbq_w4a8_scale(v >> L::shift, d, args.scale[col]);
                }
            }
            parity ^= 1;
        }
    }
#else
    GGML_UNUSED_VARS(args, maps);
    NO_DEVICE_CODE;
#endif // MBQ_TMA_AVAILABLE
}
