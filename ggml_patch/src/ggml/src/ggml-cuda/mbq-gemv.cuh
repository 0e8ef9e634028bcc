#pragma once

// Matrix times up to 32 columns for the MBQ types: codes stay codes until the int8 tensor cores have multiplied them.
//
//   block of warps (one a multiprocessor): tiles of 16 rows, blockIdx.x + group*gridDim.x, ...
//     group of KW warps: one tile at a time
//       warp kw: pieces kw, kw + KW, ... of 512 weights of all rows of the tile
//
// Each warp streams its pieces through its own ring of shared-memory stages, with the tensor memory accelerator (one lane names a box of 8
// rows) or cp.async: no barrier but __syncwarp in the main loop, and about 100 KB are on their way to each multiprocessor, first of all
// while the kernel before still runs (programmatic dependent launch): weights do not depend on it. Then the block quantises the
// activations, and at the end of each tile the warps of a group add their sums in shared memory.

#include "mbq-tile.cuh"

// dst = w * x. NT = 0: one column of floats, quantised here, with bias and gate; else up to 8*NT columns of mbq_quantize_columns.
// Block: (32*KW, groups). Grid: (blocks that share the tiles, channels or slots, samples or tokens).
// tma: rows are multiples of 16 bytes and one behind the other, and the maps stand for them; pieces behind a row's end are zeros.
template <typename L, int NT, bool tma>
static __global__ void __launch_bounds__(32*MBQ_MAX_WARPS, 1) mbq_mmv(const mbq_mmv_args args, MBQ_MAPS maps) {
#ifdef TURING_MMA_AVAILABLE
#ifndef MBQ_TMA_AVAILABLE
    if constexpr (tma) {
        NO_DEVICE_CODE;
    }
#endif
    constexpr int piece_blocks = L::piece_blocks;
    extern __shared__ __align__(128) char mbq_shared[];
#ifdef MBQ_TMA_AVAILABLE
    __shared__ uint64_t mbq_ready[MBQ_MAX_WARPS][MBQ_STAGES];
#endif
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
    const int length      = (args.blocks*L::QK + 255)/256;
    const int stage_bytes = mbq_stage_bytes<L>(NT, args.stage_row);

    const char * x   = (const char *) args.x;
    float      * dst = args.dst + blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    int64_t w_offset = 0, x_offset, bias_offset;
    int w_row = 0; // of a map
    if (args.ids) { // y is the slot and z the token; the ids may come from the kernel before
        ggml_cuda_pdl_sync();
        const int expert = args.ids[blockIdx.y + blockIdx.z*args.ids_stride];
        w_offset    = expert*args.w_channel;
        w_row       = expert*args.rows;
        x_offset    = blockIdx.y % args.x_channels*args.x_channel + blockIdx.z*args.x_sample;
        bias_offset = expert*args.bias_channel;
    } else {
        if (gridDim.y*gridDim.z > 1) { // divisions are slow
            const int channel = blockIdx.y/args.channel_ratio;
            const int sample  = blockIdx.z/args.sample_ratio;
            w_offset = channel*args.w_channel + sample*args.w_sample;
            w_row    = (sample*args.w_channels + channel)*args.rows;
        }
        x_offset    = blockIdx.y*args.x_channel + blockIdx.z*args.x_sample;
        bias_offset = blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    }
    x += x_offset*(NT == 0 ? (int) sizeof(float) : mbq_record<L>::bytes);
    const char * w    = args.w + w_offset;
    const char * gate = args.gate ? args.gate + w_offset : nullptr;

    char  * ring = mbq_shared + warp*(MBQ_STAGES*stage_bytes);
    char  * one  = mbq_shared + warps*(MBQ_STAGES*stage_bytes); // quantised column
    float * sums = (float *) (one + (NT == 0 ? length*MBQ_ONE_BYTES : 0)) + group*KW*2*mbq_sum_floats(NT);

    // What is filled next. Weights never depend on the kernel before, so the first copies start while it still runs.
    int fill_tile  = kw < pieces ? tile_first : tiles;
    int fill_piece = kw;
    const auto fill_next = [&]() {
        fill_piece += KW;
        if (fill_piece >= pieces) {
            fill_piece = kw;
            fill_tile += tile_step;
        }
    };
    const auto record_bytes = [&]() {
        return min(args.blocks*L::QK/128 - fill_piece*(MBQ_PIECE/128) + (args.blocks*L::QK%128 != 0), MBQ_PIECE/128)*mbq_record<L>::bytes;
    };
    const auto fill = [&](const int stage, const bool rows, const bool records) {
        char       * to   = ring + stage*stage_bytes;
        const char * from = x + fill_piece*(MBQ_PIECE/128*mbq_record<L>::bytes);
#ifdef MBQ_TMA_AVAILABLE
        if constexpr (tma) {
            if (lane == 0 && fill_tile < tiles) {
                const uint32_t dst = __cvta_generic_to_shared(to);
                const uint32_t barrier = __cvta_generic_to_shared(&mbq_ready[warp][stage]);
                const int row = w_row + fill_tile*tile_rows;
                mbq_barrier_expect(barrier, (rows ? 16*args.stage_row : 0) + (NT == 1 && records ? record_bytes() : 0), NT != 1 || records);
                if (rows) {
                    mbq_box_copy(dst, maps.w, fill_piece*L::piece_bytes, row, barrier);
                    mbq_box_copy(dst + 8*args.stage_row, args.gate ? maps.gate : maps.w, fill_piece*L::piece_bytes,
                        args.gate ? row : row + 8, barrier);
                }
                if (NT == 1 && records) {
                    mbq_bulk_copy(dst + 16*args.stage_row, from, record_bytes(), barrier);
                }
            }
            __syncwarp();
            return;
        }
#endif
        // A half of the warp copies a row. Copies start at multiples of 16 bytes and may reach up to 12 bytes behind the row, never behind the
        // tensor: rows of a multiple of 512 weights are multiples of 16 bytes, and after others the CUDA backend pads.
        if (fill_tile < tiles) {
            const int bytes = min(args.blocks - fill_piece*piece_blocks, piece_blocks)*L::block_words*4;
#pragma unroll
            for (int i = 0; i < 16 && rows; i += 2) {
                const char * row   = mbq_row(args, w, gate, fill_tile, i + lane/16) + fill_piece*L::piece_bytes;
                const int    shift = (int) (uintptr_t) row & 15;
                if (lane%16*16 < bytes + shift) {
                    mbq_copy_16(to + (i + lane/16)*args.stage_row + lane%16*16, row - shift + lane%16*16);
                }
            }
            if (NT == 1 && records) {
                for (int i = lane*16; i < record_bytes(); i += 32*16) {
                    mbq_copy_16(to + 16*args.stage_row + i, from + i);
                }
            }
        }
        mbq_copy_commit();
    };
#ifdef MBQ_TMA_AVAILABLE
    if constexpr (tma) {
        if (lane == 0) {
            for (int i = 0; i < MBQ_STAGES; ++i) {
                mbq_barrier_init(__cvta_generic_to_shared(&mbq_ready[warp][i]), 1);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
        }
        __syncwarp();
    }
#endif
    fill(0, true, false);
    if constexpr (NT != 1) {
        fill_next();
#pragma unroll
        for (int i = 1; i < MBQ_STAGES; ++i) {
            fill(i, true, false);
            fill_next();
        }
    }

    ggml_cuda_pdl_sync();
    if constexpr (NT == 0) {
        mbq_quantize_one<L>((const float *) x, args.blocks*L::QK, args.x_aligned, one, warp, warps);
        __syncthreads();
        x = one;
    } else if constexpr (NT == 1) { // the first stage's records, then the second stage
#pragma unroll
        for (int i = 0; i < MBQ_STAGES; ++i) {
            fill(i, i > 0, true);
            fill_next();
        }
    }

    int count  = 0; // of pieces
    int parity = 0;
    for (int tile = tile_first; tile < tiles; tile += tile_step) {
        int base[2]; // of the lane's rows in a stage
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            base[r] = (8*r + g)*args.stage_row + (tma ? 0 : (int) (uintptr_t) mbq_row(args, w, gate, tile, g + 8*r) & 15);
        }
        float sum[NT == 0 ? 1 : NT][NT == 0 ? 2 : 4] = {};
        for (int piece = kw; piece < pieces; piece += KW) {
            const int stage   = count % MBQ_STAGES;
            const char * here = ring + stage*stage_bytes;
            const int first = piece*piece_blocks;
            const int n     = min(args.blocks - first, piece_blocks);
#ifdef MBQ_TMA_AVAILABLE
            if constexpr (tma) {
                mbq_barrier_wait(__cvta_generic_to_shared(&mbq_ready[warp][stage]), count/MBQ_STAGES%2);
            } else
#endif
            {
                mbq_copy_wait<MBQ_STAGES - 1>();
            }
            __syncwarp(); // all lanes' copies are there
            if constexpr (NT == 0) {
                mbq_piece_one<L>(here, base, x, length, first, n, sum[0]);
            } else {
                mbq_piece_many<L, NT>(here, base, x, here + 16*args.stage_row, first, n, sum);
            }
            __syncwarp(); // all lanes are done with the stage
            fill(stage, true, true);
            fill_next();
            count++;
        }

        // Two buffers of sums: a warp that is ahead writes the next tile's while this tile's are read.
        constexpr int n = mbq_sum_floats(NT);
        float * all  = sums + parity*KW*n;
        float * mine = all + kw*n;
        if constexpr (NT == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                sum[0][r] += __shfl_xor_sync(0xFFFFFFFF, sum[0][r], 1);
                sum[0][r] += __shfl_xor_sync(0xFFFFFFFF, sum[0][r], 2);
            }
            if (t < 2) {
                mine[g + 8*t] = t == 0 ? sum[0][0] : sum[0][1];
            }
        } else {
#pragma unroll
            for (int i = 0; i < NT; ++i) {
                ((float4 *) mine)[i*32 + lane] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
            }
        }
        mbq_group_sync(group, KW);
        if constexpr (NT > 0) {
            mbq_store_many<NT>(args, all, tile, dst, KW);
        } else if (kw == 0) {
            mbq_store_one(args, all, tile, dst, bias_offset, KW);
        }
        parity ^= 1;
    }
#else
    GGML_UNUSED_VARS(args, maps);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}
