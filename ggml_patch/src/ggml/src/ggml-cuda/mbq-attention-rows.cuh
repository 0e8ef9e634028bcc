#pragma once

// The consumer part of mbq_attention (mbq-attention.cuh): scores, softmax and output of 64 queries, in the registers of four warps.

#include "mbq-attention-wgmma.cuh"
#include "mbq-w4a8-codes.cuh"

static constexpr int MBQ_ATTENTION_Q     = 128; // queries per CTA
static constexpr int MBQ_ATTENTION_KEYS  = 128; // keys per tile
static constexpr int MBQ_ATTENTION_TILES = 512; // the maximum with a mask
static constexpr int MBQ_ATTENTION_THREADS = 384;

template <int D> struct mbq_attention_shape {
    static constexpr int SLICES = (D + 15)/16;
    static constexpr int SLICE_BYTES = MBQ_ATTENTION_KEYS*32;
    static constexpr int TILE_BYTES  = SLICES*SLICE_BYTES;
    static constexpr int SMEM = 1024 + 4*TILE_BYTES;
};

struct mbq_attention_args {
    const char * q;
    const char * mask;      // F16, or nullptr
    const uint8_t * seen;   // for each tile of the mask: MBQ_MASK_*
    float * dst;            // [D, heads, queries, samples]
    bool  f16;              // dst is F16; never with a mask, because the masked kernels have no registers left for it
    mbq_w4a8_codes codes;   // store int8 codes instead, in dst or elsewhere; never with a mask either
    bool  q_f16;            // queries are F16 and scaled (mbq-qkv.cuh), packed from the start of each head's floats; never with a mask either
    int queries, keys, heads;
    int mask_samples;
    int64_t q_row, q_head, q_sample, mask_row, mask_sample; // bytes
    float scale;            // includes log2(e)
};

#ifdef MBQ_WGMMA

// 64 queries for four warps. A lane holds rows g = lane/4 and g + 8 of its warp's 16: s[4*i + 2*r + c] is the score of row g + 8*r and key
// 8*i + lane%4*2 + c. The output has the same layout.
template <int D, bool masked> struct mbq_attention_rows {
    using shape = mbq_attention_shape<D>;
    static constexpr int N = MBQ_ATTENTION_KEYS;

    uint32_t q[shape::SLICES][4], p[N/16][4];
    float s[N/2], o[shape::SLICES*8];
    float top[2] = { -INFINITY, -INFINITY }, sum[2] = { 0.0f, 0.0f };
    int row; // index among all queries

    __device__ __forceinline__ void load(const mbq_attention_args & args) {
        row = blockIdx.x*MBQ_ATTENTION_Q + threadIdx.x/32*16 + threadIdx.x%32/4;
        const bool halves = !masked && args.q_f16;
        const char * of[2]; // rows after the last one are clamped when they are read, and not stored
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            of[r] = args.q + min(row + 8*r, args.queries - 1)*args.q_row + blockIdx.y*args.q_head + blockIdx.z*args.q_sample +
                threadIdx.x%4*2*(halves ? sizeof(half) : sizeof(float));
        }
        // q[i/4][i%4]: two elements of row i%2 from i/2*8 on. All loads are issued before the first value is used: 182 us for 4096 queries and keys of
        // 16 heads of 80, 206 us one by one.
        if (halves) {
#pragma unroll
            for (int i = 0; i < shape::SLICES*4; ++i) {
                q[i/4][i%4] = i/2*8 < D ? *(const uint32_t *) (of[i%2] + i/2*8*sizeof(half)) : 0;
            }
        } else {
            float2 x[shape::SLICES*4];
#pragma unroll
            for (int i = 0; i < shape::SLICES*4; ++i) {
                x[i] = i/2*8 < D ? *(const float2 *) (of[i%2] + i/2*8*sizeof(float)) : make_float2(0.0f, 0.0f);
            }
#pragma unroll
            for (int i = 0; i < shape::SLICES*4; ++i) {
                q[i/4][i%4] = mbq_pack_half2(x[i].x*args.scale, x[i].y*args.scale);
            }
        }
#pragma unroll
        for (int i = 0; i < shape::SLICES*8; ++i) {
            o[i] = 0.0f;
        }
    }

    // S = Q K, asynchronous
    __device__ __forceinline__ void scores(const uint32_t k) {
        mbq_settled(s);
        mbq_settled(o);
        asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
        mbq_attention_wgmma<0, 0>(s, q[0], mbq_attention_operand(k, 16));
#pragma unroll
        for (int j = 1; j < shape::SLICES; ++j) {
            mbq_attention_wgmma<1, 0>(s, q[j], mbq_attention_operand(k + j*shape::SLICE_BYTES, 16));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
    }

    // O += P V, asynchronous
    __device__ __forceinline__ void values(const uint32_t v) {
        asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#pragma unroll
        for (int j = 0; j < N/16; ++j) {
            mbq_attention_wgmma<1, 1>(o, p[j], mbq_attention_operand(v + j*512, shape::SLICE_BYTES));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
    }

    // Replaces the scores of keys from `key` on by exp2(score - maximum so far). less: the factor by which earlier sums and output must be multiplied.
    __device__ __forceinline__ void soften(const mbq_attention_args & args, const int key, const bool add, float (&less)[2]) {
        mbq_settled(s);
        const int first = key + threadIdx.x%4*2;
        if (masked && add) {
            const char * mask = args.mask + blockIdx.z%args.mask_samples*args.mask_sample;
#pragma unroll
            for (int i = 0; i < N/4; ++i) { // pairs of scores; their number is even
                const int at = first + i/2*8;
                if (at < args.keys) {
                    const float2 m = __half22float2(*(const half2 *) (mask + min(row + i%2*8, args.queries - 1)*args.mask_row + at*2));
                    s[2*i]     = fmaf(m.x, 1.44269504f, s[2*i]);
                    s[2*i + 1] = fmaf(m.y, 1.44269504f, s[2*i + 1]);
                }
            }
        }
        if (key + N > args.keys) {
#pragma unroll
            for (int i = 0; i < N/2; ++i) {
                s[i] = first + i/4*8 + i%2 < args.keys ? s[i] : -INFINITY;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float m = top[r];
#pragma unroll
            for (int i = 0; i < N/8; ++i) {
                m = fmaxf(m, fmaxf(s[4*i + 2*r], s[4*i + 2*r + 1]));
            }
            m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 1));
            m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 2));
            const float base = masked && m == -INFINITY ? 0.0f : m; // every key so far is masked
            less[r] = mbq_exp2(top[r] - base);
            top[r]  = m;
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int i = 0; i < N/8; ++i) {
                even += s[4*i + 2*r]     = mbq_exp2(s[4*i + 2*r]     - base);
                odd  += s[4*i + 2*r + 1] = mbq_exp2(s[4*i + 2*r + 1] - base);
            }
            sum[r] = sum[r]*less[r] + (even + odd);
        }
    }

    __device__ __forceinline__ void to_f16() {
#pragma unroll
        for (int j = 0; j < N/16; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[j][i] = mbq_pack_half2(s[8*j + 2*i], s[8*j + 2*i + 1]);
            }
        }
    }

    __device__ __forceinline__ void store(const mbq_attention_args & args, const float range) {
        float scale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float all = sum[r];
            all += __shfl_xor_sync(0xFFFFFFFF, all, 1);
            all += __shfl_xor_sync(0xFFFFFFFF, all, 2);
            scale[r] = all > 0.0f ? 1.0f/all : 0.0f;
        }
        if (!masked && args.codes.q) {
            store_codes(args, scale, mbq_w4a8_column_scale(__float_as_int(range)));
            return;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (row + 8*r < args.queries) {
                const int64_t at = (((int64_t) blockIdx.z*args.queries + row + 8*r)*args.heads + blockIdx.y)*D + threadIdx.x%4*2;
#pragma unroll
                for (int i = 0; i < D/8; ++i) {
                    const float2 v = make_float2(o[4*i + 2*r]*scale[r], o[4*i + 2*r + 1]*scale[r]);
                    if (!masked && args.f16) {
                        *(half2 *) ((half *) args.dst + at + 8*i) = __float22half2_rn(v);
                    } else {
                        *(float2 *) (args.dst + at + 8*i) = v;
                    }
                }
            }
        }
    }

    // A lane holds two of each 8 elements in both rows. Even lanes get the other two of the first row from their neighbour, odd lanes those of the second.
    __device__ __forceinline__ void store_codes(const mbq_attention_args & args, const float (&scale)[2], const float2 of_range) {
        const mbq_w4a8_codes & to = args.codes;
        const int t = threadIdx.x % 4, odd = t % 2, mine = row + 8*odd;
        const int column = blockIdx.z*args.queries + mine;
#pragma unroll
        for (int i = 0; i < D/8; ++i) {
            uint32_t pair[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                pair[r] = mbq_w4a8_pack_two(mbq_w4a8_code(o[4*i + 2*r]*scale[r], of_range.x), mbq_w4a8_code(o[4*i + 2*r + 1]*scale[r], of_range.x));
            }
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, odd ? pair[0] : pair[1], 1);
            if (mine < args.queries) {
                *to.word(blockIdx.y*D + 8*i + t/2*4, column) = odd ? mbq_w4a8_join(other, pair[1]) : mbq_w4a8_join(pair[0], other);
            }
        }
        if (blockIdx.y == 0 && t < 2 && mine < args.queries) {
            to.scale[column] = of_range.y;
        }
        to.clear_flags(((blockIdx.z*gridDim.y + blockIdx.y)*gridDim.x + blockIdx.x)*256 + threadIdx.x, gridDim.x*gridDim.y*gridDim.z*256);
    }
};

#endif // MBQ_WGMMA
