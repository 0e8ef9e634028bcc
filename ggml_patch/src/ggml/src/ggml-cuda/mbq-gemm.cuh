#pragma once

// Many columns on Hopper: weights are dequantised to fp16 in the registers that wgmma takes its A operand from, and never stored.
//
//   block: 128 rows, N = 128 or 256 columns: twice the columns take half the dequantising, but leave half as many units. With 256, two
//   blocks with the same columns are a cluster, of which each copies one half of the columns for both: else reading L2 would be the limit.
//     warps 0 to 7:  two groups of 64 rows; each dequantises 64 weights of its rows while the tensor cores multiply the 64 before
//     warps 8 to 10: copies of weights, ring of 2 stages, 128 rows times 512 weights. Two are enough for 256 columns.
//     warp 11:       copies of columns, ring of 10 or 5 stages, N columns times 64 halves. A warp of its own: where it copied weights too, the
//                    ring ran dry now and then (29568 x 8192 by 512: 413 us, 376 since).
//
// Blocks without rows, where some are left, make fp16 of the activations while the others multiply: 133 and 120 us at 3584 x 18944 by 512.
//
// The order of the products in a sum is free. In a group of 16 weights lane t of the A operand wants slots 2t, 2t + 1 and 2t + 8, 2t + 9;
// it gets bytes 0, 2 and 1, 3 of a word: even weights first, odd ones behind. mbq-halves.cuh writes activations in that order.

#include "mbq-halves.cuh"

static constexpr int MBQ_GEMM_ROWS    = 128; // of a block
static constexpr int MBQ_GEMM_STAGES  = 10;  // of a tile; 8 are equal with 128 columns, 4 % slower with 256
static constexpr int MBQ_GEMM_ROW     = 240; // bytes of a row in a stage: see mbq_stage_row

static constexpr int MBQ_GEMM_TILE_BYTES = MBQ_GEMM_COLUMNS*MBQ_GEMM_CHUNK*2;
static constexpr int MBQ_GEMM_SHARED     = 1024 + MBQ_GEMM_STAGES*MBQ_GEMM_TILE_BYTES + 2*MBQ_GEMM_ROWS*MBQ_GEMM_ROW;

#if defined(MBQ_USE_TMA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER)
#define MBQ_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define MBQ_CLUSTER(blocks)
#endif

// A stage of a ring and the parity of its barrier's phase
template <int stages> struct mbq_ring {
    uint32_t stage = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage  = 0;
            phase ^= 1;
        }
    }
};

#ifdef MBQ_WGMMA

// Columns of a share's work into a block's ring, by one warp
template <int N>
static __device__ __forceinline__ void mbq_copy_columns(const mbq_gemm_args & args, const int share, const int shares, const int rank,
        const int lane, const uint32_t x_tiles, const uint32_t full_x, const uint32_t empty_x) {
    constexpr int TILES = N/MBQ_GEMM_COLUMNS;
    ggml_cuda_pdl_sync();
    const int chunks = args.k/MBQ_GEMM_CHUNK;
    mbq_ring<MBQ_GEMM_STAGES/TILES> ring;
    for (mbq_gemm_work work(args, share, shares); work.next(args, shares);) {
        const int column_tile = work.tile % args.column_tiles*TILES;
        const int tiles = min((args.columns + MBQ_GEMM_COLUMNS - 1)/MBQ_GEMM_COLUMNS - column_tile, TILES);
        int known = args.early; // chunks before it are there
        for (int chunk = 2*work.first; chunk < 2*(int) work.last; ++chunk, ring.next()) {
            if (chunk >= known && rank < tiles) {
                const int * count = args.ready + (column_tile + rank)*chunks + chunk;
                known = chunk + mbq_await_counts(count, chunks - chunk, MBQ_GEMM_COLUMNS/MBQ_GEMM_UNIT);
            }
            if (lane == 0) {
                const char *   from = (const char *) args.tiles + ((int64_t) (column_tile + rank)*chunks + chunk)*MBQ_GEMM_TILE_BYTES;
                const uint32_t to   = x_tiles + ring.stage*(TILES*MBQ_GEMM_TILE_BYTES) + rank*MBQ_GEMM_TILE_BYTES;
                const uint32_t full = full_x + ring.stage*8;
                mbq_barrier_wait(empty_x + ring.stage*8, ring.phase ^ 1);
                mbq_barrier_expect(full, tiles*MBQ_GEMM_TILE_BYTES, true);
                if constexpr (TILES == 1) {
                    mbq_bulk_copy(to, from, MBQ_GEMM_TILE_BYTES, full);
                } else if (rank < tiles) {
                    mbq_multicast(to, from, MBQ_GEMM_TILE_BYTES, full, (1 << TILES) - 1);
                }
            }
        }
    }
}

template <int N> static constexpr int mbq_weight_warps = N == 128 ? 3 : 2; // that copy weights

// Weights of a share's work into a block's ring, by warps from 8 on: 16 rows in turn
template <typename L, int N>
static __device__ __forceinline__ void mbq_copy_weights(const mbq_gemm_args & args, const int share, const int shares, const int rank,
        const int warp, const int lane, char * w_tiles, const uint32_t full_w, const uint32_t empty_w) {
    constexpr int TILES = N/MBQ_GEMM_COLUMNS;
    constexpr int turns = (MBQ_GEMM_ROWS/16 + mbq_weight_warps<N> - 1)/mbq_weight_warps<N>;
    mbq_ring<2> ring;
    for (mbq_gemm_work work(args, share, shares); work.next(args, shares);) {
        const int row_tile  = work.tile / args.column_tiles*TILES + rank;
        const int row_first = row_tile*MBQ_GEMM_ROWS + (warp - 8)*16 + lane/16;
        for (int piece = work.first/4; piece*4 < (int) work.last; ++piece, ring.next()) {
            const int n = min(args.k - piece*MBQ_PIECE, MBQ_PIECE);
            mbq_barrier_wait(empty_w + ring.stage*8, ring.phase ^ 1);
            char * stage = w_tiles + (ring.stage*MBQ_GEMM_ROWS + (warp - 8)*16 + lane/16*8)*MBQ_GEMM_ROW + lane%16*16;
#pragma unroll (N == 128 ? 24 : 4) // more would take more registers than the copying warps have
            for (int i = 0; i < 8*turns; ++i) {
                const int skip = i/8*mbq_weight_warps<N>*16;
                if (warp - 8 + skip/16 >= MBQ_GEMM_ROWS/16) {
                    break;
                }
                // rows 2i and 2i + 1 become rows i and i + 8 of the A operand: results are stored two by two
                const char * row  = args.w + (int64_t) min(row_first + skip + i%8*2, args.rows - 1)*args.row_bytes;
                const int   shift = (int) (uintptr_t) row & 15;
                if (lane%16*16 < n/L::QK*(4*L::block_words) + shift) {
                    mbq_copy_16(stage + (skip + i%8)*MBQ_GEMM_ROW, row - shift + piece*L::piece_bytes + lane%16*16);
                }
            }
            asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(full_w + ring.stage*8) : "memory");
        }
    }
}

#endif // MBQ_WGMMA

// dst = w * x
template <typename L, int N>
static __global__ void MBQ_CLUSTER(N/MBQ_GEMM_COLUMNS) __launch_bounds__(MBQ_GEMM_THREADS, 1) mbq_gemm(const mbq_gemm_args args) {
#ifdef MBQ_WGMMA
    constexpr int TILES       = N/MBQ_GEMM_COLUMNS;
    constexpr int S           = MBQ_GEMM_STAGES/TILES;
    constexpr int STAGE_BYTES = TILES*MBQ_GEMM_TILE_BYTES;
    extern __shared__ char mbq_gemm_shared[];
    __shared__ uint64_t mbq_barriers[2*S + 4]; // its size tells the host that this is the code for sm_90a
    ggml_cuda_pdl_lc();
    if (blockIdx.x < args.converters) { // the first blocks: others wait for them
        mbq_convert(args);
        return;
    }

    const int rank = TILES == 1 ? 0 : blockIdx.x % TILES; // in the cluster
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); // so that the compiler knows what all lanes have in common
    const int lane = threadIdx.x % 32;
    const int shares = (gridDim.x - args.converters)/TILES;
    const int share  = gridDim.x/TILES - 1 - blockIdx.x/TILES; // waits for higher shares only, which are lower blocks and so run already

    uint32_t x_tiles; // volatile: kept, not computed again and again
    asm volatile("add.u32 %0, %1, 1023;\nand.b32 %0, %0, 0xFFFFFC00;" : "=r"(x_tiles) : "r"((uint32_t) __cvta_generic_to_shared(mbq_gemm_shared)));
    char * const   w_tiles = mbq_gemm_shared + (x_tiles - (uint32_t) __cvta_generic_to_shared(mbq_gemm_shared)) + S*STAGE_BYTES;
    const uint32_t full_x  = __cvta_generic_to_shared(mbq_barriers);
    const uint32_t empty_x = full_x  + 8*S;
    const uint32_t full_w  = empty_x + 8*S;
    const uint32_t empty_w = full_w  + 8*2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S; ++i) {
            mbq_barrier_init(full_x  + 8*i, 1);
            mbq_barrier_init(empty_x + 8*i, 8*TILES);
        }
        for (int i = 0; i < 2; ++i) {
            mbq_barrier_init(full_w  + 8*i, 32*mbq_weight_warps<N>);
            mbq_barrier_init(empty_w + 8*i, 256); // all lanes arrive: as fast as one a warp, and racecheck can follow it
        }
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    }
    mbq_cluster_sync<TILES>();

    if (warp >= 8) {
        if constexpr (TILES > 1) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        }
        if (warp == 11) {
            mbq_copy_columns<N>(args, share, shares, rank, lane, x_tiles, full_x, empty_x);
        } else if (warp < 8 + mbq_weight_warps<N>) {
            mbq_copy_weights<L, N>(args, share, shares, rank, warp, lane, w_tiles, full_w, empty_w);
        }
    } else {
        if constexpr (TILES > 1) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        }
        const int g = lane / 4;
        const int t = lane % 4;
        mbq_ring<2> w_ring;
        mbq_ring<S> x_ring;
        const uint32_t w_shared = x_tiles + S*STAGE_BYTES;
        const uint32_t empty_there = mbq_in_block<TILES>(empty_x, lane % TILES);
        uint32_t before = 0; // barrier of the stage before x_ring's
        const auto release_before = [&] {
            if (lane < TILES) {
                mbq_barrier_arrive<TILES>(before);
            }
        };
        for (mbq_gemm_work work(args, share, shares); work.next(args, shares);) {
            const int column_tile = work.tile % args.column_tiles;
            const int row_tile    = work.tile / args.column_tiles*TILES + rank;
            const int row         = row_tile*MBQ_GEMM_ROWS + warp*16 + 2*g;
            uint32_t base[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int shift = (int) ((uintptr_t) args.w + (uintptr_t) (min(row + r, args.rows - 1))*args.row_bytes) & 15;
                base[r] = (warp*16 + g + 8*r)*MBQ_GEMM_ROW + shift;
            }
            float d[N/2];
#pragma unroll
            for (int i = 0; i < N/2; ++i) {
                d[i] = 0.0f;
            }
            half2 a[2][4][4];
            const auto multiply = [&](half2 (&a)[4][4], const bool begin) {
                mbq_barrier_wait(full_x + x_ring.stage*8, x_ring.phase);
                // start address, 1024 bytes from 8 columns to the next 8, 128-byte swizzle
                const uint64_t b = (uint64_t) ((x_tiles + x_ring.stage*STAGE_BYTES) >> 4) | (uint64_t) 1 << 16 | (uint64_t) (1024 >> 4) << 32 |
                    (uint64_t) 1 << 62;
                asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mbq_wgmma(d, a[i], b + 2*i);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" : : : "memory");
                if (!begin) {
                    release_before();
                }
                before = empty_there + x_ring.stage*8;
                x_ring.next();
            };
#pragma unroll 1
            for (uint32_t i = work.first; i < work.last; ++i) {
                if (i % 4 == 0 || i == work.first) {
                    mbq_barrier_wait(full_w + w_ring.stage*8, w_ring.phase);
                }
                const uint32_t stage = w_shared + w_ring.stage*(MBQ_GEMM_ROWS*MBQ_GEMM_ROW) + i%4*(128/L::QK*4*L::block_words);
                const mbq_words<L::QK> w0 = mbq_load_words<L::QK>(stage + base[0], t);
                const mbq_words<L::QK> w1 = mbq_load_words<L::QK>(stage + base[1], t);
                if (i % 4 == 3 || i == work.last - 1) {
                    mbq_barrier_arrive<1>(empty_w + w_ring.stage*8);
                    w_ring.next();
                }
                mbq_dequantize_64<L, 0>(w0, 0, a[0]);
                mbq_dequantize_64<L, 0>(w1, 1, a[0]);
                multiply(a[0], i == work.first);
                mbq_dequantize_64<L, 1>(w0, 0, a[1]);
                mbq_dequantize_64<L, 1>(w1, 1, a[1]);
                multiply(a[1], false);
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
            release_before();

            const auto part = [&](const int share) { return (float4 *) args.parts + (int64_t) (share*TILES + rank)*(N/8*256) + threadIdx.x; };
            const auto done = [&](const int share) { return args.done + (share*TILES + rank)*8 + warp; };
            if (work.first > 0) {
#pragma unroll
                for (int i = 0; i < N/8; ++i) {
                    part(share)[i*256] = make_float4(d[4*i], d[4*i + 1], d[4*i + 2], d[4*i + 3]);
                }
                __syncwarp();
                if (lane == 0) {
                    mbq_signal(done(share));
                }
                continue;
            }
            const int tile_end = (work.tile + 1)*(args.k/128);
            for (int s = share + 1; work.last < args.k/128 && mbq_gemm_work::begin(args, s, shares) < tile_end; ++s) {
                mbq_await(done(s));
#pragma unroll
                for (int i = 0; i < N/8; ++i) {
                    const float4 v = part(s)[i*256];
                    d[4*i] += v.x; d[4*i + 1] += v.y; d[4*i + 2] += v.z; d[4*i + 3] += v.w;
                }
            }

            float * dst = args.dst + row;
            const bool pairs = ((uintptr_t) args.dst | args.dst_column*4) % 8 == 0 && row + 1 < args.rows;
#pragma unroll
            for (int i = 0; i < N/8; ++i) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int column = column_tile*N + 8*i + 2*t + c;
                    float * to = dst + column*args.dst_column;
                    if (column < args.columns) {
                        if (pairs) {
                            *(float2 *) to = make_float2(d[4*i + c], d[4*i + 2 + c]);
                        } else if (row < args.rows) {
                            to[0] = d[4*i + c];
                            if (row + 1 < args.rows) {
                                to[1] = d[4*i + 2 + c];
                            }
                        }
                    }
                }
            }
        }
    }
    if constexpr (TILES > 1) {
        mbq_cluster_sync<TILES>(); // no block leaves while another copies into it or arrives at its barriers
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // MBQ_WGMMA
}
