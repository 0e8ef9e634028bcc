#pragma once

// W4A8 with many columns on Hopper: int8 wgmma, weights unpacked in the registers of its A operand. The shape of mbq_gemm (mbq-gemm.cuh), with
// these differences: a tile of activations holds 128 of K (a byte each), a step is 256 of K, sums are integers, and rows are scaled at the end.
//
//     warps  0 to 7   consumers, 64 rows a group of four; each unpacks 128 weights of its rows while the tensor cores multiply the 128 before
//     warps  8 to 10  producers of weights: a stage is 128 rows times 256 of K, rows with the misalignment that they have in memory
//     warp  11        producer of activations: a stage is BN columns times 128 of K
//
// 16 * code * q summed over K stays below 2^31 for K up to 132,000.

#include "mbq-gemm.cuh"
#include "mbq-w4a8-block.cuh"

struct mbq_w4a8_args {
    mbq_gemm_args gemm;   // x_tiles: int8; parts: integers; K in pairs of activations (2 bytes, as fp16 there), of rows padded to 256 activations
    const float * scale;  // of each column
    int blocks;           // of a row
};

template <int bits, int BN> struct mbq_w4a8_smem {
    static constexpr int CLUSTER   = BN/MBQ_GEMM_TILE_N;
    static constexpr int X_STAGES  = 8/CLUSTER;
    static constexpr int W_STAGES  = bits == 4 ? 4 : 2;
    static constexpr int X_BYTES   = CLUSTER*MBQ_GEMM_TILE_BYTES;
    static constexpr int ROW_BYTES = bits == 4 ? 176 : 304; // 8 blocks, up to 15 bytes of misalignment; 12 banks from row to row: no conflicts
    static constexpr int W_BYTES   = MBQ_GEMM_TILE_M*ROW_BYTES;
    static constexpr int BYTES     = 1024 + X_STAGES*X_BYTES + W_STAGES*W_BYTES;
    static constexpr int BARRIERS  = 2*X_STAGES + 2*W_STAGES;
#ifdef MBQ_WGMMA
    uint32_t x, w, full_x, empty_x, full_w, empty_w; // addresses in shared memory

    __device__ __forceinline__ mbq_w4a8_smem(const char * dynamic, const uint64_t * barriers) {
        asm volatile("add.u32 %0, %1, 1023;\nand.b32 %0, %0, 0xFFFFFC00;" : "=r"(x) : "r"((uint32_t) __cvta_generic_to_shared(dynamic)));
        w       = x + X_STAGES*X_BYTES;
        full_x  = __cvta_generic_to_shared(barriers);
        empty_x = full_x  + 8*X_STAGES;
        full_w  = empty_x + 8*X_STAGES;
        empty_w = full_w  + 8*W_STAGES;
    }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < X_STAGES; ++i) {
            mbq_barrier_init(full_x  + 8*i, 1);
            mbq_barrier_init(empty_x + 8*i, 8*CLUSTER);
        }
        for (int i = 0; i < W_STAGES; ++i) {
            mbq_barrier_init(full_w  + 8*i, 96);
            mbq_barrier_init(empty_w + 8*i, 256);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    }
#endif
};

#ifdef MBQ_WGMMA

#define D8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
static __device__ __forceinline__ void mbq_wgmma_s8(int (&d)[64], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void mbq_wgmma_s8(int (&d)[128], const uint32_t (&a)[4], const uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, 1;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56),
          D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef D8

template <int bits, int BN>
static __device__ __forceinline__ void mbq_w4a8_produce_activations(const mbq_gemm_args & args, const mbq_gemm_thread & at, const mbq_w4a8_smem<bits, BN> & smem) {
    using S = mbq_w4a8_smem<bits, BN>;
    ggml_cuda_pdl_sync();
    const int k_tiles = args.K/MBQ_GEMM_TILE_K;
    mbq_ring<S::X_STAGES> ring;
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int n_tile = work.tile % args.n_tiles*S::CLUSTER;
        const int tiles  = min((args.N + MBQ_GEMM_TILE_N - 1)/MBQ_GEMM_TILE_N - n_tile, S::CLUSTER);
        for (int k_tile = 2*work.first; k_tile < 2*(int) work.last; ++k_tile, ring.next()) {
            if (at.lane == 0) {
                const char *   from = (const char *) args.x_tiles + ((int64_t) (n_tile + at.rank)*k_tiles + k_tile)*MBQ_GEMM_TILE_BYTES;
                const uint32_t to   = smem.x + ring.stage*S::X_BYTES + at.rank*MBQ_GEMM_TILE_BYTES;
                const uint32_t full = smem.full_x + ring.stage*8;
                mbq_barrier_wait(smem.empty_x + ring.stage*8, ring.phase ^ 1);
                mbq_barrier_expect(full, tiles*MBQ_GEMM_TILE_BYTES, true);
                if constexpr (S::CLUSTER == 1) {
                    mbq_bulk_copy(to, from, MBQ_GEMM_TILE_BYTES, full);
                } else if (at.rank < tiles) {
                    mbq_multicast(to, from, MBQ_GEMM_TILE_BYTES, full, (1 << S::CLUSTER) - 1);
                }
            }
        }
    }
}

// Three warps, 8 of the 128 rows in turn: a step is 256 of K
template <int bits, int BN>
static __device__ __forceinline__ void mbq_w4a8_produce_weights(const mbq_w4a8_args & w4a8, const mbq_gemm_thread & at, const mbq_w4a8_smem<bits, BN> & smem) {
    using S = mbq_w4a8_smem<bits, BN>;
    constexpr int block_bytes = mbq_w4a8_layout<bits>::block_bytes;
    constexpr int lanes = bits == 4 ? 16 : 32; // that copy a row
    constexpr int rows  = 32/lanes;            // that a warp copies at a time
    const mbq_gemm_args & args = w4a8.gemm;
    const int column = at.lane % lanes*16;
    mbq_ring<S::W_STAGES> ring;
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int m_tile = work.tile / args.n_tiles*S::CLUSTER + at.rank;
        for (int step = work.first; step < (int) work.last; ++step, ring.next()) {
            const int bytes = min(w4a8.blocks - step*8, 8)*block_bytes;
            mbq_barrier_wait(smem.empty_w + ring.stage*8, ring.phase ^ 1);
            const uint32_t stage = smem.w + ring.stage*S::W_BYTES + column;
#pragma unroll 4
            for (int i = (at.warp - 8)*rows + at.lane/lanes; i < MBQ_GEMM_TILE_M; i += 3*rows) {
                // rows 2i and 2i + 1 of 16 become rows i and i + 8 of the A operand: results are stored two by two
                const int    slot  = i/16*16 + i%2*8 + i%16/2;
                const char * row   = args.w + (int64_t) min(m_tile*MBQ_GEMM_TILE_M + i, args.M - 1)*args.row_bytes;
                const int    shift = (int) (uintptr_t) row & 15;
                if (column < bytes + shift) {
                    const uint32_t to = stage + slot*S::ROW_BYTES;
                    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"(to), "l"(row - shift + step*(8*block_bytes) + column) : "memory");
                }
            }
            asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(smem.full_w + ring.stage*8) : "memory");
        }
    }
}

// A row of a stage: words lie at multiples of 2 bytes, at multiples of 4 in every second block.
struct mbq_w4a8_row {
    uint32_t even, odd;         // the aligned words around word t of blocks 0 and 1
    uint32_t pick_even, pick_odd;

    __device__ __forceinline__ mbq_w4a8_row(const uint32_t address, const int block_bytes) {
        even = address & ~3u;
        odd  = (address + block_bytes) & ~3u;
        pick_even = address & 2                 ? 0x5432 : 0x3210;
        pick_odd  = (address + block_bytes) & 2 ? 0x5432 : 0x3210;
    }

    template <int block_bytes> __device__ __forceinline__ uint32_t load(const uint32_t stage, const int b, const int word) const {
        const uint32_t at = stage + (b % 2 ? odd : even) + b/2*(2*block_bytes) + 4*word;
        return __byte_perm(mbq_load_shared(at), mbq_load_shared(at + 4), b % 2 ? pick_odd : pick_even);
    }
};

template <int bits, int BN>
static __device__ __forceinline__ void mbq_w4a8_consume(const mbq_w4a8_args & w4a8, const mbq_gemm_thread & at, const mbq_w4a8_smem<bits, BN> & smem) {
    using S = mbq_w4a8_smem<bits, BN>;
    using L = mbq_w4a8_layout<bits>;
    const mbq_gemm_args & args = w4a8.gemm;
    const int g = at.lane / 4;
    const int t = at.lane % 4;
    const int steps = args.K/128;
    mbq_ring<S::W_STAGES> w_ring;
    mbq_ring<S::X_STAGES> x_ring;
    const uint32_t empty_there = mbq_in_cta<S::CLUSTER>(smem.empty_x, at.lane % S::CLUSTER);
    uint32_t before = 0; // empty barrier of the stage before x_ring's
    for (mbq_stream_k work(args, at.worker, at.workers); work.next(args, at.workers);) {
        const int n_tile = work.tile % args.n_tiles;
        const int m_tile = work.tile / args.n_tiles*S::CLUSTER + at.rank;
        const int row    = m_tile*MBQ_GEMM_TILE_M + at.warp*16 + 2*g;
        const auto begin = [&](const int r) {
            const int shift = (int) ((uintptr_t) args.w + (uintptr_t) min(row + r, args.M - 1)*args.row_bytes) & 15;
            return mbq_w4a8_row(smem.w + (at.warp*16 + g + 8*r)*S::ROW_BYTES + shift + 2 + 4*t, L::block_bytes);
        };
        const mbq_w4a8_row rows[2] = { begin(0), begin(1) };
        int d[BN/2];
#pragma unroll
        for (int i = 0; i < BN/2; ++i) {
            d[i] = 0;
        }
        uint32_t a[2][4][4];
#pragma unroll 1
        for (uint32_t step = work.first; step < work.last; ++step) {
            mbq_barrier_wait(smem.full_w + w_ring.stage*8, w_ring.phase);
            const uint32_t stage = w_ring.stage*S::W_BYTES;
#pragma unroll
            for (int h = 0; h < 2; ++h) { // of 128 weights
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        uint32_t word[L::words];
#pragma unroll
                        for (int j = 0; j < L::words; ++j) {
                            word[j] = rows[r].template load<L::block_bytes>(stage, 4*h + i, 4*j);
                        }
                        mbq_w4a8_unpack<bits>(word, a[h][i][r], a[h][i][r + 2]);
                    }
                }
                if (h == 1) {
                    mbq_barrier_arrive<1>(smem.empty_w + w_ring.stage*8);
                    w_ring.next();
                }
                mbq_barrier_wait(smem.full_x + x_ring.stage*8, x_ring.phase);
                // start address, 1024 bytes from 8 columns to the next 8, 128-byte swizzle
                const uint64_t b = (uint64_t) ((smem.x + x_ring.stage*S::X_BYTES) >> 4) | (uint64_t) 1 << 16 | (uint64_t) (1024 >> 4) << 32 | (uint64_t) 1 << 62;
                asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mbq_wgmma_s8(d, a[h][i], b + 2*i);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" : : : "memory");
                if ((h == 1 || step != work.first) && at.lane < S::CLUSTER) {
                    mbq_barrier_arrive<S::CLUSTER>(before);
                }
                before = empty_there + x_ring.stage*8;
                x_ring.next();
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
        if (at.lane < S::CLUSTER) {
            mbq_barrier_arrive<S::CLUSTER>(before);
        }

        const auto part = [&](const int worker) { return (int4 *) mbq_gemm_part<BN>(args, at, worker); };
        if (work.first > 0) {
#pragma unroll
            for (int i = 0; i < BN/8; ++i) {
                part(at.worker)[i*256] = make_int4(d[4*i], d[4*i + 1], d[4*i + 2], d[4*i + 3]);
            }
            __syncwarp();
            if (at.lane == 0) {
                mbq_signal(mbq_gemm_done<BN>(args, at, at.worker));
            }
            continue;
        }
        for (int s = at.worker + 1; (int) work.last < steps && mbq_stream_k::begin(args, s, at.workers) < (work.tile + 1)*steps; ++s) {
            mbq_await(mbq_gemm_done<BN>(args, at, s));
#pragma unroll
            for (int i = 0; i < BN/8; ++i) {
                const int4 v = part(s)[i*256];
                d[4*i] += v.x; d[4*i + 1] += v.y; d[4*i + 2] += v.z; d[4*i + 3] += v.w;
            }
        }

        float scale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            scale[r] = __half2float(*(const half *) (args.w + (int64_t) min(row + r, args.M - 1)*args.row_bytes));
        }
        float * dst = args.dst + row;
        const bool pairs = ((uintptr_t) args.dst | args.dst_column*4) % 8 == 0 && row + 1 < args.M;
#pragma unroll
        for (int i = 0; i < BN/8; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int column = n_tile*BN + 8*i + 2*t + c;
                if (column < args.N) {
                    const float s  = w4a8.scale[column];
                    const float y0 = mbq_w4a8_scale(d[4*i + c]     >> L::shift, scale[0], s);
                    const float y1 = mbq_w4a8_scale(d[4*i + 2 + c] >> L::shift, scale[1], s);
                    float * to = dst + column*args.dst_column;
                    if (pairs) {
                        *(float2 *) to = make_float2(y0, y1);
                    } else if (row < args.M) {
                        to[0] = y0;
                        if (row + 1 < args.M) {
                            to[1] = y1;
                        }
                    }
                }
            }
        }
    }
}

#endif // MBQ_WGMMA

template <int bits, int BN>
static __global__ void MBQ_CLUSTER(BN/MBQ_GEMM_TILE_N) __launch_bounds__(MBQ_GEMM_THREADS, 1) mbq_w4a8_gemm(const mbq_w4a8_args args) {
#ifdef MBQ_WGMMA
    using S = mbq_w4a8_smem<bits, BN>;
    extern __shared__ char mbq_gemm_dynamic[];
    __shared__ uint64_t mbq_barriers[S::BARRIERS]; // its size tells the host that this is the code for sm_90a
    ggml_cuda_pdl_lc();
    mbq_gemm_thread at;
    at.rank    = S::CLUSTER == 1 ? 0 : blockIdx.x % S::CLUSTER;
    at.warp    = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); // so that the compiler knows what all lanes have in common
    at.lane    = threadIdx.x % 32;
    at.workers = gridDim.x/S::CLUSTER;
    at.worker  = gridDim.x/S::CLUSTER - 1 - blockIdx.x/S::CLUSTER; // waits for higher workers only, which are lower CTAs and so run already
    const S smem(mbq_gemm_dynamic, mbq_barriers);
    if (threadIdx.x == 0) {
        smem.init_barriers();
    }
    mbq_cluster_sync<S::CLUSTER>();
    if (at.warp >= 8) {
        if constexpr (S::CLUSTER > 1) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        }
        if (at.warp == 11) {
            mbq_w4a8_produce_activations<bits, BN>(args.gemm, at, smem);
        } else {
            mbq_w4a8_produce_weights<bits, BN>(args, at, smem);
        }
    } else {
        if constexpr (S::CLUSTER > 1) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        }
        mbq_w4a8_consume<bits, BN>(args, at, smem);
    }
    if constexpr (S::CLUSTER > 1) {
        mbq_cluster_sync<S::CLUSTER>(); // no CTA leaves while another copies into it or arrives at its barriers
    }
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // MBQ_WGMMA
}
