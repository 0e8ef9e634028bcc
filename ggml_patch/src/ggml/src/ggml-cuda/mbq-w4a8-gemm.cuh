#pragma once

// W4A8 products of many columns on Hopper: int8 wgmma, with weights unpacked in registers as its A operand.
//
//   Up to three matrices with equal row sizes can share the activations: their tiles are numbered consecutively.
//
//   CTA: an output tile of 128 rows and BN = 64, 128 or 160 columns, or tiles of 64 rows and 176 or 256 columns. A cluster of CL = 1, 2 or 4 CTAs has the
//   same columns and consecutive rows; each CTA copies 1/CL of the activations for all. A worker is such a cluster; mbq-stream-k.cuh distributes its tiles,
//   in steps of 256 of K. mbq-w4a8-plan.cuh chooses the shape.
//
//     warps  0 to 7   consumers, in two groups; each unpacks 128 weights of its rows while the tensor cores multiply the previous 128. In tiles of 128 rows,
//                     each group has 64 rows. Tiles of 64 rows alternate between the groups: while one multiplies, the other stores its tile. This takes
//                     58 us for 1280 x 5120 by 4096, instead of 70 with tiles of 128 rows and 256 columns, and 27 instead of 31 for 1280 x 1280. If K is
//                     1280 and there are many rows, it is only as fast: smaller tiles read half as much again from L2.
//     warps  8 to 10  producers of weights. dense: one lane copies a whole stage as one box, with the tensor memory accelerator. Otherwise, three warps copy
//                     rows, each with its misalignment in memory.
//     warp  11        producer of activations: a stage is BN columns times 128 of K
//
// 4096 x 14336 by 512: 45 us; 40 without copies and unpacking, 32 of which are wgmma alone at 1.8 GHz. It is 87 us with two loads and a permutation per word of
// weights, rows copied by three warps, and a load of a scale before each store (6 us per tile).
//
// The sum of 16 * code * q over K stays below 2^31 for K up to 132,000.

#include "mbq-w4a8-heads.cuh"

#ifdef MBQ_WGMMA

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_produce_activations(const mbq_w4a8_args & w4a8, const mbq_gemm_thread & at, const mbq_w4a8_smem<T> & smem) {
    ggml_cuda_pdl_sync();
    const mbq_gemm_args & args = w4a8.gemm;
    constexpr int mine = T::BN/T::CL; // columns that this CTA copies, at most 128
    const int k_tiles = args.K/MBQ_GEMM_TILE_K;
    mbq_ring<T::XS> ring;
    if constexpr (T::codes) {
        w4a8.codes.clear_flags(blockIdx.x*32 + at.lane, gridDim.x*32);
    }
    if (at.lane > 0) {
        return;
    }
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int first = work.tile % args.n_tiles*T::BN + at.rank*mine;
        const int now   = min(mine, 128 - first % 128); // columns in the current block of 128; the others are the first of the next block
        const auto at_first = [&](const int column) { // columns after the last one are computed and dropped, so any valid column will do
            return (const char *) args.x_tiles + ((int64_t) (column < args.N ? column/128 : 0)*k_tiles*MBQ_GEMM_TILE_BYTES + column % 128*128);
        };
        const char * from[2] = { at_first(first), at_first(first + now) };
        for (int k_tile = 2*work.first; k_tile < 2*(int) work.last; ++k_tile, ring.next()) {
            const uint32_t full = smem.full_x + ring.stage*8;
            const uint32_t to   = smem.x + ring.stage*T::X_BYTES + at.rank*mine*128;
            mbq_barrier_wait(smem.empty_x + ring.stage*8, ring.phase ^ 1);
            mbq_barrier_expect(full, T::X_BYTES, true);
            mbq_w4a8_copy_columns<T::CL>(to, from[0] + k_tile*MBQ_GEMM_TILE_BYTES, now*128, full);
            if (now < mine) {
                mbq_w4a8_copy_columns<T::CL>(to + now*128, from[1] + k_tile*MBQ_GEMM_TILE_BYTES, (mine - now)*128, full);
            }
        }
    }
}

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_produce_weights(const mbq_w4a8_args & w4a8, const mbq_w4a8_maps & maps, const mbq_gemm_thread & at, const mbq_w4a8_smem<T> & smem) {
    using L = mbq_w4a8_layout<T::bits>;
    const mbq_gemm_args & args = w4a8.gemm;
    mbq_ring<T::WS> ring;
    if (T::dense && (at.warp > 8 || at.lane > 0)) {
        return;
    }
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int k = w4a8.matrix(work.tile / args.n_tiles);
        const mbq_w4a8_gemm_matrix & m = w4a8.of[k];
        const int row_first = ((work.tile / args.n_tiles - m.tile)*T::CL + at.rank)*T::BM;
        int rows_of_warp[T::WARPS];
#pragma unroll
        for (int i = 0; T::heads && i < T::WARPS; ++i) {
            rows_of_warp[i] = mbq_w4a8_tile_rows<T>::row(row_first, i, 0, w4a8.angles.n_dims);
        }
        for (int step = work.first; step < (int) work.last; ++step, ring.next()) {
            const uint32_t stage = smem.w + ring.stage*T::W_BYTES;
            const uint32_t full  = smem.full_w + ring.stage*8;
            mbq_barrier_wait(smem.empty_w + ring.stage*8, ring.phase ^ 1);
            if constexpr (T::dense) {
                mbq_barrier_expect(full, T::W_BYTES, true);
                if constexpr (T::heads) {
#pragma unroll
                    for (int i = 0; i < T::BM/8; ++i) { // a warp's first rows, and the rows that they are rotated with
                        mbq_box_copy(stage + i*8*T::ROW_BYTES, maps.of[k], step*(L::group_bytes/4), rows_of_warp[i/2] + i%2*w4a8.angles.n_dims, full);
                    }
                } else if constexpr (T::codes) {
                    mbq_box_copy_5d(stage, maps.of[k], step*(L::group_bytes/4), row_first%256/64, row_first/256*4, full);
                } else {
                    mbq_box_copy_3d(stage, maps.of[k], step*(L::group_bytes/4), row_first/2, full);
                }
            } else {
                constexpr int lanes = T::bits == 4 ? 16 : 32; // lanes per row
                constexpr int rows  = 32/lanes;               // rows per warp at a time
                const int column = at.lane % lanes*16;
                const int bytes  = min(w4a8.blocks - step*8, 8)*L::block_bytes;
#pragma unroll 4
                for (int i = (at.warp - 8)*rows + at.lane/lanes; i < T::BM; i += 3*rows) {
                    const char * row   = m.w + (int64_t) min(row_first + i, m.M - 1)*args.row_bytes;
                    const int    shift = (int) (uintptr_t) row & 15;
                    if (column < bytes + shift) {
                        const uint32_t to = stage + mbq_w4a8_slot<T>(i)*T::ROW_BYTES + column;
                        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"(to), "l"(row - shift + step*L::group_bytes + column) : "memory");
                    }
                }
                asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(full) : "memory");
            }
        }
    }
}

template <typename T>
static __device__ __forceinline__ void mbq_w4a8_consume(const mbq_w4a8_args & w4a8, const mbq_gemm_thread & at, const mbq_w4a8_smem<T> & smem) {
    using L = mbq_w4a8_layout<T::bits>;
    using P = mbq_w4a8_pair<T::bits, T::dense>;
    const mbq_gemm_args & args = w4a8.gemm;
    const int g = at.lane / 4;
    const int t = at.lane % 4;
    const int steps = args.K/128;
    using R = mbq_w4a8_tile_rows<T>;
    const int group = at.warp / 4;
    mbq_ring<T::WS> w_ring;
    mbq_ring<T::XS> x_ring;
    const uint32_t empty_there = mbq_in_cta<T::CL>(smem.empty_x, at.lane % T::CL);
    float range = 0.0f; // of the codes
    if constexpr (T::codes) {
        ggml_cuda_pdl_sync();
        range = *w4a8.codes.range;
    }
    uint32_t before = 0; // empty barrier of the previous stage of x_ring
    int part = -1;
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        if (T::turns) {
            ++part;
            if (part % 2 != group) {
                w_ring.skip(work.last - work.first);
                x_ring.skip(2*(work.last - work.first));
                continue;
            }
            if (part > 0) { // otherwise this group could wait for stages two rounds ahead, which a barrier's parity cannot distinguish
                mbq_barrier_wait(smem.turn + group*8, (part - 1)/2 % 2);
            }
        }
        const int n_tile = work.tile % args.n_tiles;
        const mbq_w4a8_gemm_matrix & m = w4a8.of[w4a8.matrix(work.tile / args.n_tiles)];
        const int first_row = ((work.tile / args.n_tiles - m.tile)*T::CL + at.rank)*T::BM;
        const int row    = R::row(first_row, at.warp, g, w4a8.angles.n_dims); // the first of the thread's two rows
        const auto row_of = [&](const int r) { return min(row + r*R::apart(w4a8.angles.n_dims), m.M - 1); };
        const auto pair_of = [&](const int r) {
            const int shift = T::dense ? 0 : (int) ((uintptr_t) m.w + (uintptr_t) row_of(r)*args.row_bytes) & 15;
            return P(smem.w + R::slot(at.warp, g, r)*T::ROW_BYTES + shift + t*(2*L::block_bytes));
        };
        const P pairs[2] = { pair_of(0), pair_of(1) };
        int   d[T::BN/2];
        mbq_w4a8_end end = { m, {}, {} }; // the rows' scales and, for codes or heads, biases
#pragma unroll
        for (int i = 0; i < T::BN/2; ++i) {
            d[i] = 0;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            end.d_w[r] = __half2float(*(const half *) (m.w + (int64_t) row_of(r)*args.row_bytes));
            if ((T::codes || T::heads) && m.bias) {
                end.bias[r] = m.bias[row_of(r)];
            }
        }
        mbq_w4a8_words<T::bits> words[2];
        const auto load = [&](const uint32_t stage, const int second) {
            words[0] = pairs[0].load(stage, second);
            words[1] = pairs[1].load(stage, second);
        };
        uint32_t a[2][4][4];
        constexpr bool ahead = T::bits == 4; // words are loaded while products run; with 8 bits, the assembler would wait after each product
        if (ahead) {
            mbq_barrier_wait(smem.full_w + w_ring.stage*8, w_ring.phase);
            load(w_ring.stage*T::W_BYTES, 0);
        }
#pragma unroll 1
        for (uint32_t step = work.first; step < work.last; ++step) {
            const uint32_t stage = w_ring.stage*T::W_BYTES;
            if (!ahead) {
                mbq_barrier_wait(smem.full_w + w_ring.stage*8, w_ring.phase);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) { // 128 weights: the first or the second block of each lane's pair
                if (!ahead) {
                    load(stage, h);
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        pairs[r].unpack(words[r], h, i, a[h][i][r], a[h][i][r + 2]);
                    }
                }
                mbq_barrier_wait(smem.full_x + x_ring.stage*8, x_ring.phase);
                // descriptor: start address, a stride of 1024 bytes between groups of 8 columns, 128-byte swizzle
                const uint64_t b = (uint64_t) ((smem.x + x_ring.stage*T::X_BYTES) >> 4) | (uint64_t) 1 << 16 | (uint64_t) (1024 >> 4) << 32 | (uint64_t) 1 << 62;
                asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mbq_wgmma_s8(d, a[h][i], b + 2*i);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
                if (ahead && h == 0) {
                    load(stage, 1);
                }
                if (h == 1) { // the products above have all words of the stage; some just loaded may still be in flight, behind the other group's stores
                    mbq_barrier_arrive<1>(smem.empty_w + w_ring.stage*8);
                    w_ring.next();
                }
                if (ahead && h == 1 && step + 1 < work.last) {
                    mbq_barrier_wait(smem.full_w + w_ring.stage*8, w_ring.phase);
                    load(w_ring.stage*T::W_BYTES, 0);
                }
                asm volatile("wgmma.wait_group.sync.aligned 1;" : : : "memory");
                if ((h == 1 || step != work.first) && at.lane < T::CL) {
                    mbq_barrier_arrive<T::CL>(before);
                }
                before = empty_there + x_ring.stage*8;
                x_ring.next();
            }
        }
        if (T::turns) {
            mbq_barrier_arrive<1>(smem.turn + (group ^ 1)*8);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
        if (at.lane < T::CL) {
            mbq_barrier_arrive<T::CL>(before);
        }

        if (work.first > 0) {
            mbq_w4a8_leave<T>(mbq_w4a8_part<T>(args, at, at.worker), d);
            __syncwarp();
            if (at.lane == 0) {
                mbq_signal(mbq_w4a8_done<T>(args, at, at.worker));
            }
            continue;
        }
        for (int s = at.worker + 1; (int) work.last < steps && mbq_stream_k::begin(args, s, at.workers) < (work.tile + 1)*steps; ++s) {
            mbq_await(mbq_w4a8_done<T>(args, at, s));
            __syncwarp();
            if (at.lane == 0) {
                *mbq_w4a8_done<T>(args, at, s) = 0; // for the next product with these activations
            }
            mbq_w4a8_add<T>(mbq_w4a8_part<T>(args, at, s), d);
        }
        if constexpr (T::codes) {
            mbq_w4a8_store_codes<T>(w4a8, end, n_tile, row, at, mbq_w4a8_column_scale(__float_as_int(range)), d);
        } else if constexpr (T::heads) {
            mbq_w4a8_store_heads<T>(w4a8, end, n_tile, first_row, row, at, d);
        } else {
            mbq_w4a8_store<T>(w4a8, end, n_tile, row, t, d);
        }
    }
}

#endif // MBQ_WGMMA

template <typename T>
static __global__ void MBQ_CLUSTER(T::CL) __launch_bounds__(MBQ_GEMM_THREADS, 1) mbq_w4a8_gemm(const mbq_w4a8_args args, MBQ_W4A8_MAPS maps) {
#ifdef MBQ_WGMMA
    extern __shared__ char mbq_gemm_dynamic[];
    __shared__ uint64_t mbq_barriers[T::BARRIERS]; // the host detects the sm_90a code by its size
    ggml_cuda_pdl_lc();
    mbq_gemm_thread at;
    at.rank    = T::CL == 1 ? 0 : blockIdx.x % T::CL;
    at.warp    = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); // tells the compiler that it is uniform in the warp
    at.lane    = threadIdx.x % 32;
    at.workers = gridDim.x/T::CL;
    at.worker  = gridDim.x/T::CL - 1 - blockIdx.x/T::CL; // waits only for higher workers, which are lower CTAs and so are already running
    const mbq_w4a8_smem<T> smem(mbq_gemm_dynamic, mbq_barriers);
    if (threadIdx.x == 0) {
        smem.init_barriers();
    }
    mbq_cluster_sync<T::CL>();
    if (at.warp >= 8) {
        if constexpr (T::BN > 128) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        }
        if (at.warp == 11) {
            mbq_w4a8_produce_activations<T>(args, at, smem);
        } else {
            mbq_w4a8_produce_weights<T>(args, maps, at, smem);
        }
    } else {
        if constexpr (T::BN > 128) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        }
        mbq_w4a8_consume<T>(args, at, smem);
    }
    if constexpr (T::CL > 1) {
        mbq_cluster_sync<T::CL>(); // no CTA exits while another one copies into it or arrives at its barriers
    }
#else
    GGML_UNUSED_VARS(args, maps);
    NO_DEVICE_CODE;
#endif // MBQ_WGMMA
}
