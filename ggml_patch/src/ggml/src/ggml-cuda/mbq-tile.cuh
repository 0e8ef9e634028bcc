#pragma once

// One tile of 16 rows of mbq_mmv (mbq-gemv.cuh): multiplies its pieces by the columns, then combines and stores the sums.

#include "mbq-plan.cuh"

#ifdef TURING_MMA_AVAILABLE

// Row i of the 16 of a tile. A gated unit's tile has 8 rows of the weights, then the same 8 rows of the gate. Rows past the end repeat the last one.
static __device__ __forceinline__ const char * mbq_row(const mbq_mmv_args & args, const char * w, const char * gate, const int tile, const int i) {
    const int row = min(gate ? tile*8 + i%8 : tile*16 + i, args.M - 1);
    return (gate && i >= 8 ? gate : w) + (int64_t) row*args.row_bytes;
}

// Sums of a lane: of rows g and g + 8, each times one column (NT = 0) or two
static constexpr __host__ __device__ int mbq_sums(const int NT) {
    return NT == 0 ? 1 : NT == 1 ? 4 : NT;
}

// sum += 16 rows of one piece in `stage` times the columns; base: bytes of the lane's rows in a stage, first: the piece's first
// block in the row, n: its blocks. One column: x is what mbq_quantize_one wrote, `length` the 256s of a row.
template <typename L>
static __device__ __forceinline__ void mbq_piece_one(const char * stage, const int (&base)[2], const char * x, const int length,
        const int first, const int n, float (&sum)[2]) {
    constexpr int per = 256/L::QK;
    const uint32_t * const p[2] = { (const uint32_t *) (stage + base[0]), (const uint32_t *) (stage + base[1]) };
    const char * words = x + first/per*256;
    const char * sums  = x + length*256 + first/per*64;
    if (n == L::piece_blocks) {
#pragma unroll
        for (int i = 0; i < MBQ_PIECE/256; ++i) {
            mbq_dot_one<L>(p, i*per, n - 1, words + i*256, sums + i*64, sum);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i*per < n; ++i) {
            mbq_dot_one<L>(p, i*per, n - 1, words + i*256, sums + i*64, sum);
        }
    }
}

// 8*NT columns. NT = 1: their records are in the stage, and there are four sums, like those of lane t with one column: groups 2t and 2t + 1 of each 256 weights.
// Otherwise x points at all records.
template <typename L, int NT>
static __device__ __forceinline__ void mbq_piece_many(const char * stage, const int (&base)[2], const char * x, const char * records,
        const int first, const int n, float (&sum)[mbq_sums(NT)][4]) {
    constexpr int bytes = mbq_record<L>::bytes;
    constexpr int per   = 256/L::QK;
    const int lane = threadIdx.x % 32;
    const auto one = [&](const int b, const int u) { // the u-th of its 256
        const int at = b*L::block_words;
        const uint32_t * const p[2] = { (const uint32_t *) (stage + base[0]) + at, (const uint32_t *) (stage + base[1]) + at };
        float2 scale[2][L::scales];
#pragma unroll
        for (int i = 0; i < 2*L::scales; ++i) {
            scale[i/L::scales][i%L::scales] = mbq_scale<L>(*p[i/L::scales], i%L::scales);
        }
        int a[L::QK/32][4];
        mbq_unpack<L::QK>(p, lane % 4, a);
#pragma unroll
        for (int i = 0; i < NT; ++i) {
            const char * record = NT == 1 ? records + b*L::QK/128*bytes : x + ((int64_t) (first + b)*L::QK/128*NT + i)*bytes;
            mbq_dot<L, NT == 1>(a, scale, mbq_load_record<L>(record, L::QK == 128 ? 0 : u % 2, lane), sum, NT == 1 ? u*4/per : i);
        }
    };
    if (n == L::piece_blocks) {
#pragma unroll
        for (int b = 0; b < L::piece_blocks; ++b) {
            one(b, b % per);
        }
    } else {
#pragma unroll 1
        for (int b = 0; b < n; b += per) {
#pragma unroll
            for (int u = 0; u < per; ++u) {
                if (b + u < n) {
                    one(b + u, u);
                }
            }
        }
    }
}

// Stores a slot's sums of a tile, for the warps of the group; with up to 8 columns (s0 + s1) + (s2 + s3) of the four
template <int NT>
static __device__ __forceinline__ void mbq_leave_sums(const float (&sum)[mbq_sums(NT)][NT == 0 ? 2 : 4], float * slot, const int lane) {
    if constexpr (NT == 0) {
        const int g = lane / 4;
        const int t = lane % 4;
        float v = t % 2 ? sum[0][1] : sum[0][0]; // of row g + t % 2 * 8
        v += __shfl_xor_sync(0xFFFFFFFF, t % 2 ? sum[0][0] : sum[0][1], 1);
        v += __shfl_xor_sync(0xFFFFFFFF, v, 2);
        if (t < 2) {
            slot[g + 8*t] = v;
        }
    } else if constexpr (NT == 1) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
        }
        ((float4 *) slot)[lane] = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (int i = 0; i < NT; ++i) {
            ((float4 *) slot)[i*32 + lane] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        }
    }
}

static __device__ __forceinline__ float mbq_glu(const mbq_mmv_args & args, const float gate, const float up) {
    switch (args.glu_op) {
        case GGML_GLU_OP_SWIGLU:       return ggml_cuda_op_silu_single(gate)*up;
        case GGML_GLU_OP_GEGLU:        return ggml_cuda_op_gelu_single(gate)*up;
        case GGML_GLU_OP_SWIGLU_OAI:   return ggml_cuda_op_swiglu_oai_single(gate, up);
        case GGML_GLU_OP_SWIGLU_CLAMP: return ggml_cuda_op_swiglu_clamp_single(gate, up, args.glu_limit);
        default:                       return gate*up;
    }
}

// Synchronises the warps that share a tile. Barrier 0 is used by __syncthreads.
static __device__ __forceinline__ void mbq_group_sync(const int group, const int KW) {
    if (KW == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" : : "r"(group + 1), "r"(KW*32) : "memory");
    }
}

// Adds the sums of a tile's slots, then bias and gate, and stores. One column: sums[slot][row]
static __device__ __forceinline__ void mbq_store_one(const mbq_mmv_args & args, const float * sums, const int tile, float * dst,
        const int64_t bias_offset) {
    const int lane = threadIdx.x % 32;
    float v = 0.0f;
    for (int i = 0; i < args.slots; ++i) {
        v += sums[i*16 + lane % 16];
    }
    if (args.gate) { // rows 8 to 15 are the gate's rows 0 to 7
        float gate    = __shfl_down_sync(0xFFFFFFFF, v, 8);
        const int row = tile*8 + lane;
        if (lane < 8 && row < args.M) {
            v    += args.bias      ? args.bias     [bias_offset + row] : 0.0f;
            gate += args.gate_bias ? args.gate_bias[bias_offset + row] : 0.0f;
            dst[row] = mbq_glu(args, gate, v);
        }
    } else {
        const int row = tile*16 + lane;
        if (lane < 16 && row < args.M) {
            dst[row] = v + (args.bias ? args.bias[bias_offset + row] : 0.0f);
        }
    }
}

// The same for 8*NT columns, without bias and gate, by KW warps: sums[slot][n][lane][i] in the order of the C operand
template <int NT>
static __device__ __forceinline__ void mbq_store_many(const mbq_mmv_args & args, const float * sums, const int tile, float * dst, const int KW,
        const int slots) {
    constexpr int n = 128*NT;
    for (int e = threadIdx.x; e < n; e += KW*32) {
        float v = 0.0f;
        for (int i = 0; i < slots; ++i) {
            v += sums[i*n + e];
        }
        const int lane = e/4 % 32;
        const int row  = tile*16 + lane/4 + e/2%2*8;
        const int col  = e/128*8 + lane%4*2 + e%2;
        if (row < args.M && col < args.N) {
            dst[col*args.dst_column + row] = v;
        }
    }
}

#endif // TURING_MMA_AVAILABLE
