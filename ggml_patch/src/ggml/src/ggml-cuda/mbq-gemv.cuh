#pragma once

// Matrix times up to 32 columns for the MBQ types: codes stay codes until the int8 tensor cores have multiplied them.
//
//   block of warps (one a multiprocessor): tiles of 16 rows, blockIdx.x + group*gridDim.x, ...
//     group of KW warps: one tile at a time
//       warp kw: pieces kw, kw + KW, ... of 512 weights of all rows of the tile
//
// Each warp streams its pieces through its own ring of shared-memory stages with cp.async: no barrier but __syncwarp in the main loop,
// and about 100 KB are on their way to each multiprocessor, first of all while the kernel before still runs (programmatic
// dependent launch): weights do not depend on it. Then the block quantises the activations, and at the end of each tile the warps of
// a group add their sums in shared memory.

#include "mbq-plan.cuh"

#ifdef TURING_MMA_AVAILABLE

// The rows of a lane in a tile: g, g + 8 of each 16. A gated unit's tile is 8 rows of the weights above the same 8 rows of the gate.
// Rows behind the end repeat the last.
static __device__ __forceinline__ const char * mbq_row(const mbq_mmv_args & args, const char * w, const char * gate, const int tile, const int g, const int r) {
    const int i = min(gate ? tile*8 + g : tile*16 + g + 8*r, args.rows - 1);
    return (gate && r == 1 ? gate : w) + (int64_t) i*args.row_bytes;
}

// Starts the copies of n blocks of a row: src is its 16-byte aligned start, `shift` bytes before the blocks', both with 16*t added. The
// last 16 bytes may reach behind the row, never behind the tensor: rows of a multiple of 512 weights are multiples
// of 16 bytes, and after others the CUDA backend pads.
template <int QK>
static __device__ __forceinline__ void mbq_copy_row(char * dst, const char * src, const int shift, const int n, const int t) {
    constexpr int full = mbq_layout<QK>::piece_bytes;
    if (n == mbq_layout<QK>::piece_blocks) {
#pragma unroll
        for (int i = 0; i < full/64; ++i) {
            mbq_copy_16(dst + 64*i, src + 64*i);
        }
        if (full/64*64 + 16*t < full + shift) {
            mbq_copy_16(dst + full/64*64, src + full/64*64);
        }
    } else {
#pragma unroll 1
        for (int i = 16*t; i < n*mbq_layout<QK>::block_words*4 + shift; i += 64) {
            mbq_copy_16(dst + i - 16*t, src + i - 16*t);
        }
    }
}

// sum[n][i] += 16 rows of one piece in `stage` times the columns; base: bytes of the lane's rows in a stage, first: the piece's first
// block in the row, n: its blocks
template <int QK, int NC, int NT>
static __device__ __forceinline__ void mbq_piece(const char * stage, const int (&base)[2], const char * x, const char * records, const int pairs,
        const int first, const int n, float (&sum)[NT][NC == 1 ? 2 : 4]) {
    constexpr int cols = NC == 1 ? 1 : 2;
    const int lane = threadIdx.x % 32;
    const int g = lane / 4;
    const int t = lane % 4;
    const auto one = [&](const int b) {
        const uint32_t * p[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            p[r] = (const uint32_t *) (stage + base[r]) + b*mbq_layout<QK>::block_words;
        }
        int    a[QK/32][4];
        float2 dm[2];
        mbq_unpack<QK>(p, t, a, dm);
#pragma unroll
        for (int i = 0; i < NT; ++i) {
            mbq_columns<QK, cols> c;
            if constexpr (NC > 0) {
                c = mbq_columns_shared<QK, NC>(x, pairs, first + b, g, t);
            } else if constexpr (NT == 1) {
                c = mbq_columns_record<QK>(records + b*QK/128*MBQ_RECORD_BYTES, QK == 128 ? 0 : b % 2, lane);
            } else {
                c = mbq_columns_record<QK>(x + ((int64_t) (first + b)*QK/128*NT + i)*MBQ_RECORD_BYTES, QK == 128 ? 0 : b % 2, lane);
            }
            mbq_dot<QK, cols>(a, dm, c, sum[i]);
        }
    };
    if (n == mbq_layout<QK>::piece_blocks) {
#pragma unroll
        for (int b = 0; b < mbq_layout<QK>::piece_blocks; ++b) {
            one(b);
        }
    } else {
#pragma unroll 1
        for (int b = 0; b < n; ++b) {
            one(b);
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

// Synchronises the warps that share a tile. Barrier 0 belongs to __syncthreads.
static __device__ __forceinline__ void mbq_group_sync(const int group, const int KW) {
    if (KW == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" : : "r"(group + 1), "r"(KW*32) : "memory");
    }
}

// Adds the sums of the KW warps of a group, then bias and gate, and stores. NC = 1, 2: sums[warp][row][column]
template <int NC>
static __device__ __forceinline__ void mbq_store_few(const mbq_mmv_args & args, const float * sums, const int tile, float * dst, const int64_t bias_offset, const int KW) {
    const int lane = threadIdx.x % 32; // row * NC + column
    float v = 0.0f;
    for (int i = 0; i < KW; ++i) {
        v += sums[i*16*NC + lane % (16*NC)];
    }
    if (args.gate) { // NC = 1: rows 8 to 15 are the gate's rows 0 to 7
        float gate    = __shfl_down_sync(0xFFFFFFFF, v, 8);
        const int row = tile*8 + lane;
        if (lane < 8 && row < args.rows) {
            v    += args.bias      ? args.bias     [bias_offset + row] : 0.0f;
            gate += args.gate_bias ? args.gate_bias[bias_offset + row] : 0.0f;
            dst[row] = mbq_glu(args, gate, v);
        }
    } else {
        const int row = tile*16 + lane/NC;
        if (lane < 16*NC && row < args.rows) {
            dst[lane % NC*args.dst_column + row] = v + (args.bias ? args.bias[bias_offset + row] : 0.0f);
        }
    }
}

// The same for NC = 0: sums[warp][n][lane][i] in the order of the C operand
template <int NT>
static __device__ __forceinline__ void mbq_store_many(const mbq_mmv_args & args, const float * sums, const int tile, float * dst, const int KW) {
    constexpr int n = 128*NT;
    for (int e = threadIdx.x; e < n; e += KW*32) {
        float v = 0.0f;
        for (int i = 0; i < KW; ++i) {
            v += sums[i*n + e];
        }
        const int lane = e/4 % 32;
        const int row  = tile*16 + lane/4 + e/2%2*8;
        const int col  = e/128*8 + lane%4*2 + e%2;
        if (row < args.rows && col < args.columns) {
            dst[col*args.dst_column + row] = v;
        }
    }
}

#endif // TURING_MMA_AVAILABLE

// dst = w * x. NC = 1, 2: columns of float, quantised here; NC = 0: up to 8*NT columns of mbq_quantize_columns. Bias and gate only with NC = 1.
// Block: (32*KW, groups). Grid: (blocks that share the tiles, channels or slots, samples or tokens).
template <int QK, int NC, int NT>
static __global__ void __launch_bounds__(32*MBQ_MAX_WARPS, 1) mbq_mmv(const mbq_mmv_args args) {
#ifdef TURING_MMA_AVAILABLE
    constexpr int cols         = NC == 1 ? 1 : 2;
    constexpr int piece_blocks = mbq_layout<QK>::piece_blocks;
    extern __shared__ __align__(16) char mbq_shared[];
    ggml_cuda_pdl_lc();

    const int lane  = threadIdx.x % 32;
    const int g     = lane / 4;
    const int t     = lane % 4;
    const int kw    = threadIdx.x / 32; // of KW
    const int KW    = blockDim.x / 32;
    const int group = threadIdx.y;
    const int warp  = group*KW + kw;
    const int warps = blockDim.y*KW;

    const int tile_rows   = args.gate ? 8 : 16;
    const int tiles       = (args.rows + tile_rows - 1)/tile_rows;
    const int tile_first  = blockIdx.x + group*gridDim.x;
    const int tile_step   = gridDim.x*blockDim.y;
    const int pieces      = (args.blocks + piece_blocks - 1)/piece_blocks;
    const int pairs       = (args.blocks*QK + 255)/256;
    const int stage_bytes = mbq_stage_bytes(NC, NT, args.stage_row);

    const char * x   = (const char *) args.x;
    float      * dst = args.dst + blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    int64_t w_offset = 0, x_offset, bias_offset;
    if (args.ids) { // y is the slot and z the token; the ids may come from the kernel before
        ggml_cuda_pdl_sync();
        const int expert = args.ids[blockIdx.y + blockIdx.z*args.ids_stride];
        w_offset    = expert*args.w_channel;
        x_offset    = blockIdx.y % args.x_channels*args.x_channel + blockIdx.z*args.x_sample;
        bias_offset = expert*args.bias_channel;
    } else {
        if (gridDim.y*gridDim.z > 1) { // divisions are slow
            w_offset = blockIdx.y/args.channel_ratio*args.w_channel + blockIdx.z/args.sample_ratio*args.w_sample;
        }
        x_offset    = blockIdx.y*args.x_channel + blockIdx.z*args.x_sample;
        bias_offset = blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    }
    x += x_offset*(NC > 0 ? (int) sizeof(float) : MBQ_RECORD_BYTES);
    const char * w    = args.w + w_offset;
    const char * gate = args.gate ? args.gate + w_offset : nullptr;

    char  * ring = mbq_shared + (NC > 0 ? pairs*mbq_pair_bytes(NC) : 0) + warp*(MBQ_STAGES*stage_bytes);
    float * sums = (float *) (ring + (warps - warp)*(MBQ_STAGES*stage_bytes)) + group*KW*2*mbq_sum_floats(NC, NT);

    // What is filled next. Weights never depend on the kernel before, so the first copies start while it still runs.
    int fill_tile  = kw < pieces ? tile_first : tiles;
    int fill_piece = kw;
    int fill_stage = 0;
    const char * src[2];
    int shift[2];
    const auto fill_rows = [&]() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const char * row = mbq_row(args, w, gate, fill_tile, g, r);
            shift[r] = (int) (uintptr_t) row & 15;
            src  [r] = row - shift[r] + 16*t + kw*mbq_layout<QK>::piece_bytes;
        }
    };
    const auto fill_records = [&](const int piece, char * stage) {
        const int bytes = min(args.blocks*QK/128 - piece*(MBQ_PIECE/128) + (args.blocks*QK%128 != 0), MBQ_PIECE/128)*MBQ_RECORD_BYTES;
        for (int i = lane*16; i < bytes; i += 32*16) {
            mbq_copy_16(stage + 16*args.stage_row + i, x + piece*(MBQ_PIECE/128*MBQ_RECORD_BYTES) + i);
        }
    };
    const auto fill = [&](const bool with_records) {
        if (fill_tile < tiles) {
            char * stage = ring + fill_stage*stage_bytes;
            const int n  = min(args.blocks - fill_piece*piece_blocks, piece_blocks);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                mbq_copy_row<QK>(stage + (8*r + g)*args.stage_row + 16*t, src[r], shift[r], n, t);
                src[r] += KW*mbq_layout<QK>::piece_bytes;
            }
            if constexpr (NC == 0 && NT == 1) {
                if (with_records) {
                    fill_records(fill_piece, stage);
                }
            }
            fill_piece += KW;
            if (fill_piece >= pieces) {
                fill_piece = kw;
                fill_tile += tile_step;
                fill_rows();
            }
        }
        fill_stage ^= 1;
        mbq_copy_commit();
    };
    const bool idle = fill_tile >= tiles;
    fill_rows();
    fill(false);

    ggml_cuda_pdl_sync();
    if constexpr (NC > 0) {
        mbq_quantize_shared<QK, NC>((const float *) x, args.blocks*QK, args.x_column, args.x_aligned, mbq_shared, warp, warps);
        __syncthreads();
        x = mbq_shared;
    } else if constexpr (NT == 1) {
        if (!idle) {
            fill_records(kw, ring);
        }
        mbq_copy_commit();
    }

    int stage  = 0;
    int parity = 0;
    for (int tile = tile_first; tile < tiles; tile += tile_step) {
        int base[2]; // of the lane's rows in a stage
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            base[r] = (8*r + g)*args.stage_row + ((int) (uintptr_t) mbq_row(args, w, gate, tile, g, r) & 15);
        }
        float sum[NT][2*cols] = {};
        for (int piece = kw; piece < pieces; piece += KW) {
            mbq_copy_wait();
            __syncwarp(); // all lanes' copies are there, and all lanes are done with the stage that is filled next
            fill(true);
            mbq_piece<QK, NC, NT>(ring + stage*stage_bytes, base, x, ring + stage*stage_bytes + 16*args.stage_row, pairs,
                piece*piece_blocks, min(args.blocks - piece*piece_blocks, piece_blocks), sum);
            stage ^= 1;
        }

        // Two buffers of sums: a warp that is ahead writes the next tile's while this tile's are read.
        constexpr int n = mbq_sum_floats(NC, NT);
        float * all  = sums + parity*KW*n;
        float * mine = all + kw*n;
        if constexpr (NC > 0) {
            if (t == 0) {
#pragma unroll
                for (int i = 0; i < 2*cols; ++i) {
                    mine[(g + i/cols*8)*cols + i%cols] = sum[0][i];
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < NT; ++i) {
                ((float4 *) mine)[i*32 + lane] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
            }
        }
        mbq_group_sync(group, KW);
        if constexpr (NC == 0) {
            mbq_store_many<NT>(args, all, tile, dst, KW);
        } else if (kw == 0) {
            mbq_store_few<NC>(args, all, tile, dst, bias_offset, KW);
        }
        parity ^= 1;
    }
    mbq_copy_wait();
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}
