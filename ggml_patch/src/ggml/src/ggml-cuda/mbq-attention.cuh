#pragma once

// Attention of vision towers on Hopper: one pass over all keys with an online softmax, scheduled as in FlashAttention-3 (arXiv 2407.08608).
//
//   CTA: 128 queries of one head of one picture; it loops over the keys and values that they attend to, in tiles of 128.
//
//     warps 0 to 3   queries  0 to  63 \ S = Q K of a tile and O += P V of the previous tile, then the softmax of S while the tensor cores
//     warps 4 to 7   queries 64 to 127 / work for the other four warps: the two groups alternate (named barriers 1 and 2).
//     warp  8        producer: copies keys and values to ring buffers of 2 stages each (warps 9 to 11 only donate their registers)
//
// Queries are read as floats, scaled such that exp2 replaces exp, and stay in registers as F16. S, O and the softmax are F32, P is F16. The tensor memory
// accelerator pads heads of 72 to 80 with zeros. The order of sums is fixed: a picture gets the same bits in each run, alone or in a batch.
//
// 4096 queries and keys of 16 heads of 80 take 0.18 ms on an H200, 474 TFLOP/s (upstream's kernel: 0.97 ms). Alternatives: copies with cp.async by one or
// two warps, 0.50 and 0.34 ms; three groups of 64 queries with tiles of 96 keys, 0.19 ms (and 0.022 instead of 0.016 ms at 1024); tiles of 176 keys, 0.19 ms.

#include "mbq-attention-rows.cuh"

struct mbq_attention_maps {
    CUtensorMap k, v;
};

// A tile of a mask: all keys masked, none masked and no bias, or anything else
enum : uint8_t { MBQ_MASK_NONE, MBQ_MASK_ALL, MBQ_MASK_SOME };

// Grid: (tiles of keys, tiles of queries, samples of the mask)
static __global__ void mbq_attention_seen(const mbq_attention_args args, uint8_t * seen) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const int key = blockIdx.x*MBQ_ATTENTION_KEYS + threadIdx.x%64*2;
    bool any = false, all = key < args.keys;
    for (int i = threadIdx.x/64; i < MBQ_ATTENTION_Q && key < args.keys; i += blockDim.x/64) {
        const int query = min(blockIdx.y*MBQ_ATTENTION_Q + i, args.queries - 1);
        const float2 m = __half22float2(*(const half2 *) (args.mask + blockIdx.z*args.mask_sample + query*args.mask_row + key*2));
        any = any || m.x != -INFINITY || m.y != -INFINITY;
        all = all && m.x == 0.0f && m.y == 0.0f;
    }
    any = __syncthreads_or(any);
    all = __syncthreads_and(all);
    if (threadIdx.x == 0) {
        seen[(blockIdx.z*gridDim.y + blockIdx.y)*gridDim.x + blockIdx.x] = all ? MBQ_MASK_ALL : any ? MBQ_MASK_SOME : MBQ_MASK_NONE;
    }
}

#ifdef MBQ_WGMMA

// The tiles that a CTA processes: all, or with a mask those in a list, where bit 15 means that the mask's values must be added
template <bool masked> struct mbq_attention_tiles {
    const uint16_t * list;
    int n;
    __device__ __forceinline__ int  key(const int i) const { return (masked ? list[i] & 0x7FFF : i)*MBQ_ATTENTION_KEYS; }
    __device__ __forceinline__ bool add(const int i) const { return masked && list[i] & 0x8000; }
};

// Builds the list, in one warp. If all keys are masked, it has one tile, whose mask is added.
static __device__ __forceinline__ int mbq_attention_list(const mbq_attention_args & args, uint16_t * list) {
    const int tiles = (args.keys + MBQ_ATTENTION_KEYS - 1)/MBQ_ATTENTION_KEYS;
    const uint8_t * seen = args.seen + (int64_t) (blockIdx.z%args.mask_samples*gridDim.x + blockIdx.x)*tiles;
    const int lane = threadIdx.x % 32;
    int n = 0;
    for (int first = 0; first < tiles; first += 32) {
        const int what = first + lane < tiles ? seen[first + lane] : MBQ_MASK_NONE;
        const uint32_t some = __ballot_sync(0xFFFFFFFF, what != MBQ_MASK_NONE);
        if (what != MBQ_MASK_NONE) {
            list[n + __popc(some & ((1u << lane) - 1))] = (first + lane) | (what == MBQ_MASK_SOME ? 0x8000 : 0);
        }
        n += __popc(some);
    }
    if (n == 0 && lane == 0) {
        list[0] = 0x8000;
    }
    return max(n, 1);
}

// Shared memory of a CTA: stages of keys and values, with a full and an empty barrier for each stage
template <int D> struct mbq_attention_smem {
    uint32_t k, v, full_k, empty_k, full_v, empty_v; // addresses in shared memory

    __device__ __forceinline__ mbq_attention_smem(const char * dynamic, const uint64_t * barriers) {
        asm volatile("add.u32 %0, %1, 1023;\nand.b32 %0, %0, 0xFFFFFC00;" : "=r"(k) : "r"((uint32_t) __cvta_generic_to_shared(dynamic)));
        v       = k + 2*mbq_attention_shape<D>::TILE_BYTES;
        full_k  = __cvta_generic_to_shared(barriers);
        empty_k = full_k  + 16;
        full_v  = empty_k + 16;
        empty_v = full_v  + 16;
    }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < 2; ++i) {
            mbq_barrier_init(full_k  + 8*i, 1);
            mbq_barrier_init(full_v  + 8*i, 1);
            mbq_barrier_init(empty_k + 8*i, 256); // all lanes arrive, so that racecheck can track it
            mbq_barrier_init(empty_v + 8*i, 256);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    }
};

template <int D, bool masked>
static __device__ __forceinline__ void mbq_attention_produce(const mbq_attention_args & args, const mbq_attention_maps & maps, const mbq_attention_smem<D> & smem,
        const mbq_attention_tiles<masked> & tiles) {
    using shape = mbq_attention_shape<D>;
    const auto copy = [&](const uint32_t to, const CUtensorMap & map, const int row, const uint32_t empty, const uint32_t full, const int phase) {
        mbq_barrier_wait(empty, phase ^ 1);
        mbq_barrier_expect(full, shape::TILE_BYTES, true);
#pragma unroll
        for (int i = 0; i < shape::SLICES; ++i) {
            mbq_box_copy_4d(to + i*shape::SLICE_BYTES, map, 16*i, row, blockIdx.y, blockIdx.z, full);
        }
    };
    for (int i = 0; i < tiles.n; ++i) {
        const int stage = i % 2, phase = i/2 % 2;
        copy(smem.k + stage*shape::TILE_BYTES, maps.k, tiles.key(i), smem.empty_k + 8*stage, smem.full_k + 8*stage, phase);
        copy(smem.v + stage*shape::TILE_BYTES, maps.v, tiles.key(i), smem.empty_v + 8*stage, smem.full_v + 8*stage, phase);
    }
}

template <int D, bool masked>
static __device__ __forceinline__ void mbq_attention_consume(const mbq_attention_args & args, const mbq_attention_smem<D> & smem,
        const mbq_attention_tiles<masked> & tiles) {
    constexpr int bytes = mbq_attention_shape<D>::TILE_BYTES;
    const int half = threadIdx.x/128; // which half of the CTA's queries
    const auto turn = [&] { asm volatile("bar.sync %0, 256;"   : : "r"(1 + half) : "memory"); };
    const auto pass = [&] { asm volatile("bar.arrive %0, 256;" : : "r"(2 - half) : "memory"); };
    mbq_attention_rows<D, masked> rows;
    float less[2];
    const float range = !masked && args.codes.q ? *args.codes.range : 0.0f; // loaded early: at the end, its latency would exceed the time of the stores
    rows.load(args);
    if (half == 1) {
        pass();
    }
    mbq_barrier_wait(smem.full_k, 0);
    turn();
    rows.scores(smem.k);
    pass();
    mbq_wgmma_wait<0>();
    mbq_barrier_arrive<1>(smem.empty_k);
    rows.soften(args, tiles.key(0), tiles.add(0), less);
    rows.to_f16();
#pragma unroll 1
    for (int i = 1; i < tiles.n; ++i) {
        const int stage = i % 2, before = (i - 1) % 2;
        mbq_barrier_wait(smem.full_k + 8*stage, i/2 % 2);
        turn();
        rows.scores(smem.k + stage*bytes);
        mbq_barrier_wait(smem.full_v + 8*before, (i - 1)/2 % 2);
        rows.values(smem.v + before*bytes);
        pass();
        mbq_wgmma_wait<1>();
        mbq_barrier_arrive<1>(smem.empty_k + 8*stage);
        rows.soften(args, tiles.key(i), tiles.add(i), less);
        mbq_wgmma_wait<0>();
        mbq_settled(rows.o);
        mbq_barrier_arrive<1>(smem.empty_v + 8*before);
#pragma unroll
        for (int j = 0; j < mbq_attention_shape<D>::SLICES*8; ++j) {
            rows.o[j] *= less[j/2 % 2];
        }
        rows.to_f16();
    }
    const int last = (tiles.n - 1) % 2;
    mbq_barrier_wait(smem.full_v + 8*last, (tiles.n - 1)/2 % 2);
    mbq_settled(rows.o);
    rows.values(smem.v + last*bytes);
    mbq_wgmma_wait<0>();
    mbq_settled(rows.o);
    rows.store(args, range);
}

#endif // MBQ_WGMMA

// Grid: (tiles of queries, heads, samples)
template <int D, bool masked>
static __global__ void __launch_bounds__(MBQ_ATTENTION_THREADS, 1) mbq_attention(const mbq_attention_args args, const __grid_constant__ mbq_attention_maps maps) {
#ifdef MBQ_WGMMA
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[8];
    __shared__ uint16_t list[masked ? MBQ_ATTENTION_TILES : 1];
    __shared__ int n_list;
    const mbq_attention_smem<D> smem(dynamic, barriers);
    ggml_cuda_pdl_lc();
    if (threadIdx.x == 0) {
        smem.init_barriers();
    }
    ggml_cuda_pdl_sync();
    if (masked && threadIdx.x < 32) {
        const int n = mbq_attention_list(args, list);
        if (threadIdx.x == 0) {
            n_list = n;
        }
    }
    __syncthreads();
    const mbq_attention_tiles<masked> tiles = { list, masked ? n_list : (args.keys + MBQ_ATTENTION_KEYS - 1)/MBQ_ATTENTION_KEYS };
    if (threadIdx.x >= 256) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) {
            mbq_attention_produce(args, maps, smem, tiles);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        mbq_attention_consume(args, smem, tiles);
    }
#else
    GGML_UNUSED_VARS(args, maps);
    NO_DEVICE_CODE;
#endif
}
