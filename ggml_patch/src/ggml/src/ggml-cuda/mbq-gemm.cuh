#pragma once

// Products with many columns on Hopper: weights are dequantised to fp16 in the registers of wgmma's A operand, and never stored.
//
//   A CTA computes an output tile of 128 rows (M) and BN = 128 or 256 columns (N). Twice the columns need half the dequantising, but there are half as
//   many tiles. With 256, two CTAs with the same columns form a cluster, and each copies one half of the columns for both; otherwise L2 reads would
//   be the bottleneck. A worker is such a CTA or cluster.
//
//     warps  0 to 3   consumers of rows  0 to 63  \ each dequantises 64 weights per row while the tensor cores
//     warps  4 to 7   consumers of rows 64 to 127 / multiply the previous 64
//     warps  8 to 10  producers of weights, ring of 2 stages, 128 rows times 512 of K. Two are enough for 256 columns.
//     warp  11        producer of activations, ring of 10 or 5 stages, BN columns times 64 of K. It does nothing else: when it also copied weights,
//                     the ring ran dry occasionally (29568 x 8192 by 512 took 413 us instead of 376).
//
// mbq-stream-k.cuh shows how output tiles are distributed. CTAs without a tile, if any, convert activations to fp16 while the others multiply: 120 us
// instead of 133 for 3584 x 18944 by 512.
//
// The products in a sum may be in any order. In a group of 16 weights, lane t of the A operand needs slots 2t, 2t + 1 and 2t + 8, 2t + 9; it gets bytes 0, 2
// and 1, 3 of a word: even weights first, then odd ones. mbq-activations-f16.cuh stores activations in that order.

#include "mbq-activations-f16.cuh"

static constexpr int MBQ_GEMM_TILE_M    = 128;
static constexpr int MBQ_GEMM_STAGES    = 10;  // of 128 columns; 8 are as fast with BN = 128, and 4 % slower with 256
static constexpr int MBQ_GEMM_ROW_BYTES = 240; // per row of weights in a stage: see mbq_stage_row

static constexpr int MBQ_GEMM_TILE_BYTES = MBQ_GEMM_TILE_N*MBQ_GEMM_TILE_K*2;
static constexpr int MBQ_GEMM_SMEM       = 1024 + MBQ_GEMM_STAGES*MBQ_GEMM_TILE_BYTES + 2*MBQ_GEMM_TILE_M*MBQ_GEMM_ROW_BYTES;

#if defined(MBQ_USE_TMA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER)
#define MBQ_CLUSTER(size) __cluster_dims__(size, 1, 1)
#else
#define MBQ_CLUSTER(size)
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
    __device__ __forceinline__ void skip(const uint32_t n) {
        phase ^= (stage + n)/stages & 1;
        stage  = (stage + n)%stages;
    }
};

#ifdef MBQ_WGMMA

// A thread's place in the hierarchy
struct mbq_gemm_thread {
    int rank;            // of its CTA in the cluster
    int worker, workers; // its index, and the number of workers
    int warp, lane;
};

// Shared memory of a CTA: rings of activations (x) and weights (w), with a full and an empty barrier per stage
template <int BN> struct mbq_gemm_smem {
    static constexpr int CLUSTER     = BN/MBQ_GEMM_TILE_N;
    static constexpr int STAGES      = MBQ_GEMM_STAGES/CLUSTER;
    static constexpr int STAGE_BYTES = CLUSTER*MBQ_GEMM_TILE_BYTES;
    uint32_t x;          // addresses in shared memory
    uint32_t full_x, empty_x, full_w, empty_w;
    char *   w;

    __device__ __forceinline__ mbq_gemm_smem(char * dynamic, uint64_t * barriers) {
        // volatile: keeps the compiler from computing it repeatedly
        asm volatile("add.u32 %0, %1, 1023;\nand.b32 %0, %0, 0xFFFFFC00;" : "=r"(x) : "r"((uint32_t) __cvta_generic_to_shared(dynamic)));
        w       = dynamic + (x - (uint32_t) __cvta_generic_to_shared(dynamic)) + STAGES*STAGE_BYTES;
        full_x  = __cvta_generic_to_shared(barriers);
        empty_x = full_x  + 8*STAGES;
        full_w  = empty_x + 8*STAGES;
        empty_w = full_w  + 8*2;
    }
};

template <int BN> static constexpr int mbq_weight_producers = BN == 128 ? 3 : 2; // warps

template <int BN>
static __device__ __forceinline__ void mbq_gemm_init_barriers(const mbq_gemm_smem<BN> & smem) {
    for (int i = 0; i < smem.STAGES; ++i) {
        mbq_barrier_init(smem.full_x  + 8*i, 1);
        mbq_barrier_init(smem.empty_x + 8*i, 8*smem.CLUSTER);
    }
    for (int i = 0; i < 2; ++i) {
        mbq_barrier_init(smem.full_w  + 8*i, 32*mbq_weight_producers<BN>);
        mbq_barrier_init(smem.empty_w + 8*i, 256); // all lanes arrive: as fast as one per warp, and racecheck understands it
    }
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

// One warp copies the activations of a worker's parts into its CTAs' rings
template <int BN>
static __device__ __forceinline__ void mbq_produce_activations(const mbq_gemm_args & args, const mbq_gemm_thread & at, const mbq_gemm_smem<BN> & smem) {
    constexpr int CLUSTER = mbq_gemm_smem<BN>::CLUSTER;
    ggml_cuda_pdl_sync();
    const int k_tiles = args.K/MBQ_GEMM_TILE_K;
    mbq_ring<mbq_gemm_smem<BN>::STAGES> ring;
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int n_tile = work.tile % args.n_tiles*CLUSTER;
        const int tiles  = min((args.N + MBQ_GEMM_TILE_N - 1)/MBQ_GEMM_TILE_N - n_tile, CLUSTER);
        int known = args.early; // k tiles before this one are converted
        for (int k_tile = 2*work.first; k_tile < 2*(int) work.last; ++k_tile, ring.next()) {
            if (k_tile >= known && at.rank < tiles) {
                const int * count = args.ready + (n_tile + at.rank)*k_tiles + k_tile;
                known = k_tile + mbq_await_counts(count, k_tiles - k_tile, MBQ_GEMM_TILE_N/MBQ_CONVERT_N);
            }
            if (at.lane == 0) {
                const char *   from = (const char *) args.x_tiles + ((int64_t) (n_tile + at.rank)*k_tiles + k_tile)*MBQ_GEMM_TILE_BYTES;
                const uint32_t to   = smem.x + ring.stage*smem.STAGE_BYTES + at.rank*MBQ_GEMM_TILE_BYTES;
                const uint32_t full = smem.full_x + ring.stage*8;
                mbq_barrier_wait(smem.empty_x + ring.stage*8, ring.phase ^ 1);
                mbq_barrier_expect(full, tiles*MBQ_GEMM_TILE_BYTES, true);
                if constexpr (CLUSTER == 1) {
                    mbq_bulk_copy(to, from, MBQ_GEMM_TILE_BYTES, full);
                } else if (at.rank < tiles) {
                    mbq_multicast(to, from, MBQ_GEMM_TILE_BYTES, full, (1 << CLUSTER) - 1);
                }
            }
        }
    }
}

// Warps from 8 on copy the weights of a worker's parts into a CTA's ring, 16 rows at a time
template <typename L, int BN>
static __device__ __forceinline__ void mbq_produce_weights(const mbq_gemm_args & args, const mbq_gemm_thread & at, const mbq_gemm_smem<BN> & smem) {
    constexpr int producers = mbq_weight_producers<BN>;
    constexpr int turns     = (MBQ_GEMM_TILE_M/16 + producers - 1)/producers;
    mbq_ring<2> ring;
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int m_tile    = work.tile / args.n_tiles*smem.CLUSTER + at.rank;
        const int row_first = m_tile*MBQ_GEMM_TILE_M + (at.warp - 8)*16 + at.lane/16;
        for (int piece = work.first/4; piece*4 < (int) work.last; ++piece, ring.next()) {
            const int n = min(args.K - piece*MBQ_PIECE, MBQ_PIECE);
            mbq_barrier_wait(smem.empty_w + ring.stage*8, ring.phase ^ 1);
            char * stage = smem.w + (ring.stage*MBQ_GEMM_TILE_M + (at.warp - 8)*16 + at.lane/16*8)*MBQ_GEMM_ROW_BYTES + at.lane%16*16;
#pragma unroll (BN == 128 ? 24 : 4) // more would need more registers than the producers have
            for (int i = 0; i < 8*turns; ++i) {
                const int skip = i/8*producers*16;
                if (at.warp - 8 + skip/16 >= MBQ_GEMM_TILE_M/16) {
                    break;
                }
                // rows 2i and 2i + 1 become rows i and i + 8 of the A operand, so that results are stored in pairs
                const char * row  = args.w + (int64_t) min(row_first + skip + i%8*2, args.M - 1)*args.row_bytes;
                const int   shift = (int) (uintptr_t) row & 15;
                if (at.lane%16*16 < n/L::QK*(4*L::block_words) + shift) {
                    mbq_copy_16(stage + (skip + i%8)*MBQ_GEMM_ROW_BYTES, row - shift + piece*L::piece_bytes + at.lane%16*16);
                }
            }
            asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(smem.full_w + ring.stage*8) : "memory");
        }
    }
}

// A consumer's side of the ring of activations: at most one product of 64 of K is in flight, and the stage of the previous one is released.
template <int BN> struct mbq_gemm_products {
    static constexpr int CLUSTER = BN/MBQ_GEMM_TILE_N;
    mbq_ring<mbq_gemm_smem<BN>::STAGES> ring;
    uint32_t empty_there; // for this lane: the empty barriers of one CTA of the cluster
    uint32_t before = 0;  // barrier of the stage before the ring's

    __device__ __forceinline__ void release_before(const int lane) const {
        if (lane < CLUSTER) {
            mbq_barrier_arrive<CLUSTER>(before);
        }
    }

    // d += 64 of K; begin: the start of a part, when no product is in flight
    __device__ __forceinline__ void multiply(const mbq_gemm_smem<BN> & smem, const int lane, const half2 (&a)[4][4], const bool begin, float (&d)[BN/2]) {
        mbq_barrier_wait(smem.full_x + ring.stage*8, ring.phase);
        // start address, 1024 bytes from 8 columns to the next 8, 128-byte swizzle
        const uint64_t b = (uint64_t) ((smem.x + ring.stage*smem.STAGE_BYTES) >> 4) | (uint64_t) 1 << 16 | (uint64_t) (1024 >> 4) << 32 | (uint64_t) 1 << 62;
        asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            mbq_wgmma(d, a[i], b + 2*i);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" : : : "memory");
        if (!begin) {
            release_before(lane);
        }
        before = empty_there + ring.stage*8;
        ring.next();
    }
};

// The sums of a CTA's part of a tile: 4*N/8 floats per consumer, at N/8 positions among 256 lanes
template <int BN>
static __device__ __forceinline__ float4 * mbq_gemm_part(const mbq_gemm_args & args, const mbq_gemm_thread & at, const int worker) {
    return (float4 *) args.parts + (int64_t) (worker*(BN/MBQ_GEMM_TILE_N) + at.rank)*(BN/8*256) + threadIdx.x;
}

template <int BN>
static __device__ __forceinline__ int * mbq_gemm_done(const mbq_gemm_args & args, const mbq_gemm_thread & at, const int worker) {
    return args.done + (worker*(BN/MBQ_GEMM_TILE_N) + at.rank)*8 + at.warp;
}

// Stores the sums of a part that is not the start of its tile, for the worker that has the start.
template <int BN>
static __device__ __forceinline__ void mbq_leave_part(const mbq_gemm_args & args, const mbq_gemm_thread & at, const float (&d)[BN/2]) {
#pragma unroll
    for (int i = 0; i < BN/8; ++i) {
        mbq_gemm_part<BN>(args, at, at.worker)[i*256] = make_float4(d[4*i], d[4*i + 1], d[4*i + 2], d[4*i + 3]);
    }
    __syncwarp();
    if (at.lane == 0) {
        mbq_signal(mbq_gemm_done<BN>(args, at, at.worker));
    }
}

// Adds what the next workers left of the rest of the tile, in order.
template <int BN>
static __device__ __forceinline__ void mbq_add_parts(const mbq_gemm_args & args, const mbq_gemm_thread & at, const mbq_stream_k & work, float (&d)[BN/2]) {
    const int tile_end = (work.tile + 1)*(args.K/128);
    for (int s = at.worker + 1; work.last < args.K/128 && mbq_stream_k::begin(args, s, at.workers) < tile_end; ++s) {
        mbq_await(mbq_gemm_done<BN>(args, at, s));
#pragma unroll
        for (int i = 0; i < BN/8; ++i) {
            const float4 v = mbq_gemm_part<BN>(args, at, s)[i*256];
            d[4*i] += v.x; d[4*i + 1] += v.y; d[4*i + 2] += v.z; d[4*i + 3] += v.w;
        }
    }
}

// Products seldom come back through L1: W4A8's of 5120 x 1280 by 4096, 84 MB, take 57 us so, and 71 with plain stores.
static __device__ __forceinline__ void mbq_store_past_l1(float * to, const float2 v, const bool really = true) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p st.global.L1::no_allocate.v2.f32 [%0], {%1, %2};\n}" : : "l"(to), "f"(v.x), "f"(v.y), "r"((int) really) : "memory");
}

static __device__ __forceinline__ void mbq_store_past_l1(half * to, const float2 v, const bool really = true) {
    const half2 h = __float22half2_rn(v);
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.global.L1::no_allocate.b32 [%0], %1;\n}" : : "l"(to), "r"(*(const uint32_t *) &h), "r"((int) really) : "memory");
}

static __device__ __forceinline__ void mbq_store_past_l1(half * to, const int4 v) {
    asm volatile("st.global.L1::no_allocate.v4.s32 [%0], {%1, %2, %3, %4};" : : "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Rows `row` and row + 1 of the tile's columns
template <int BN>
static __device__ __forceinline__ void mbq_store_tile(const mbq_gemm_args & args, const int n_tile, const int row, const int t, const float (&d)[BN/2]) {
    float * dst = args.dst + row;
    const bool pairs = ((uintptr_t) args.dst | args.dst_column*4) % 8 == 0 && row + 1 < args.M;
#pragma unroll
    for (int i = 0; i < BN/8; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int column = n_tile*BN + 8*i + 2*t + c;
            float * to = dst + column*args.dst_column;
            if (column < args.N) {
                if (pairs) {
                    mbq_store_past_l1(to, make_float2(d[4*i + c], d[4*i + 2 + c]));
                } else if (row < args.M) {
                    to[0] = d[4*i + c];
                    if (row + 1 < args.M) {
                        to[1] = d[4*i + 2 + c];
                    }
                }
            }
        }
    }
}

// A consumer's work: 16 rows of each of its CTA's tiles, two of them in each lane
template <typename L, int BN>
static __device__ __forceinline__ void mbq_consume(const mbq_gemm_args & args, const mbq_gemm_thread & at, const mbq_gemm_smem<BN> & smem) {
    constexpr int CLUSTER = mbq_gemm_smem<BN>::CLUSTER;
    const int g = at.lane / 4;
    const int t = at.lane % 4;
    mbq_ring<2> w_ring;
    mbq_gemm_products<BN> products;
    const uint32_t w_smem = smem.x + smem.STAGES*smem.STAGE_BYTES;
    products.empty_there = mbq_in_cta<CLUSTER>(smem.empty_x, at.lane % CLUSTER);
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int n_tile = work.tile % args.n_tiles;
        const int m_tile = work.tile / args.n_tiles*CLUSTER + at.rank;
        const int row    = m_tile*MBQ_GEMM_TILE_M + at.warp*16 + 2*g;
        uint32_t base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int shift = (int) ((uintptr_t) args.w + (uintptr_t) (min(row + r, args.M - 1))*args.row_bytes) & 15;
            base[r] = (at.warp*16 + g + 8*r)*MBQ_GEMM_ROW_BYTES + shift;
        }
        float d[BN/2];
#pragma unroll
        for (int i = 0; i < BN/2; ++i) {
            d[i] = 0.0f;
        }
        half2 a[2][4][4];
#pragma unroll 1
        for (uint32_t i = work.first; i < work.last; ++i) {
            if (i % 4 == 0 || i == work.first) {
                mbq_barrier_wait(smem.full_w + w_ring.stage*8, w_ring.phase);
            }
            const uint32_t stage = w_smem + w_ring.stage*(MBQ_GEMM_TILE_M*MBQ_GEMM_ROW_BYTES) + i%4*(128/L::QK*4*L::block_words);
            const mbq_words<L::QK> w0 = mbq_load_words<L::QK>(stage + base[0], t);
            const mbq_words<L::QK> w1 = mbq_load_words<L::QK>(stage + base[1], t);
            mbq_dequantize_64<L, 0>(w0, 0, a[0]);
            mbq_dequantize_64<L, 0>(w1, 1, a[0]);
            products.multiply(smem, at.lane, a[0], i == work.first, d);
            mbq_dequantize_64<L, 1>(w0, 0, a[1]);
            mbq_dequantize_64<L, 1>(w1, 1, a[1]);
            products.multiply(smem, at.lane, a[1], false, d);
            if (i % 4 == 3 || i == work.last - 1) { // all words of the stage have come, since these products have them
                mbq_barrier_arrive<1>(smem.empty_w + w_ring.stage*8);
                w_ring.next();
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
        products.release_before(at.lane);

        if (work.first > 0) {
            mbq_leave_part<BN>(args, at, d);
            continue;
        }
        mbq_add_parts<BN>(args, at, work, d);
        mbq_store_tile<BN>(args, n_tile, row, t, d);
    }
}

#endif // MBQ_WGMMA

// dst = w * x
template <typename L, int BN>
static __global__ void MBQ_CLUSTER(BN/MBQ_GEMM_TILE_N) __launch_bounds__(MBQ_GEMM_THREADS, 1) mbq_gemm(const mbq_gemm_args args) {
#ifdef MBQ_WGMMA
    constexpr int CLUSTER = BN/MBQ_GEMM_TILE_N;
    extern __shared__ char mbq_gemm_dynamic[];
    __shared__ uint64_t mbq_barriers[2*(MBQ_GEMM_STAGES/CLUSTER) + 4]; // the host recognises the code for sm_90a by its size
    ggml_cuda_pdl_lc();
    if (blockIdx.x < args.converters) { // the first CTAs, because others wait for them
        mbq_convert_late(args);
        return;
    }

    mbq_gemm_thread at;
    at.rank    = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
    at.warp    = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); // tells the compiler that all lanes have the same value
    at.lane    = threadIdx.x % 32;
    at.workers = (gridDim.x - args.converters)/CLUSTER;
    at.worker  = gridDim.x/CLUSTER - 1 - blockIdx.x/CLUSTER; // a worker only waits for higher ones, which are lower CTAs and therefore already running

    const mbq_gemm_smem<BN> smem(mbq_gemm_dynamic, mbq_barriers);
    if (threadIdx.x == 0) {
        mbq_gemm_init_barriers(smem);
    }
    mbq_cluster_sync<CLUSTER>();

    if (at.warp >= 8) {
        if constexpr (CLUSTER > 1) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        }
        if (at.warp == 11) {
            mbq_produce_activations<BN>(args, at, smem);
        } else if (at.warp < 8 + mbq_weight_producers<BN>) {
            mbq_produce_weights<L, BN>(args, at, smem);
        }
    } else {
        if constexpr (CLUSTER > 1) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        }
        mbq_consume<L, BN>(args, at, smem);
    }
    if constexpr (CLUSTER > 1) {
        mbq_cluster_sync<CLUSTER>(); // no CTA leaves while another copies into it or arrives at its barriers
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // MBQ_WGMMA
}
