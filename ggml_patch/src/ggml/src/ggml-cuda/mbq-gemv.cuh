#pragma once

// Matrix times up to 32 columns for the MBQ types: the int8 tensor cores multiply codes, which are only scaled afterwards.
//
//   output rows   tile 0 (16 rows)   tile 1   tile 2   ...        CTA c, group of warps g: tiles c + g*gridDim.x, then every gridDim.x*groups
//
//   K of a tile   | piece 0 | piece 1 | piece 2 | piece 3 | ...   warp kw of the group's KW: pieces kw, kw + KW, ...
//                   a piece has 512 weights of each of the 16 rows; with up to 8 columns a warp has slots of sums instead (mbq_slots): kw, kw + KW, ...
//
// One CTA per multiprocessor. Each warp streams its pieces through its own ring of shared-memory stages, with the tensor memory accelerator (one lane
// requests a box of 8 rows) or cp.async. The main loop has no barrier but __syncwarp, and about 100 KB are in flight to each multiprocessor. The first
// copies start while the previous kernel still runs (programmatic dependent launch), since weights do not depend on it. Then the CTA quantises the
// activations, and at the end of each tile the warps of a group add their sums in shared memory.

#include "mbq-tile.cuh"

#ifdef TURING_MMA_AVAILABLE

// A thread's place in the hierarchy, and its group's tiles
struct mbq_mmv_thread {
    int lane;
    int kw, KW;         // index among the KW warps that share a tile
    int group;          // of these
    int warp, warps;    // of the CTA
    int tile_rows, tiles, tile_first, tile_step;

    __device__ __forceinline__ mbq_mmv_thread(const mbq_mmv_args & args) {
        lane  = threadIdx.x % 32;
        kw    = threadIdx.x / 32;
        KW    = blockDim.x / 32;
        group = threadIdx.y;
        warp  = group*KW + kw;
        warps = blockDim.y*KW;
        tile_rows  = args.gate ? 8 : 16;
        tiles      = (args.M + tile_rows - 1)/tile_rows;
        tile_first = blockIdx.x + group*gridDim.x;
        tile_step  = gridDim.x*blockDim.y;
    }
};

// Offsets of the matrices of blockIdx.y and .z: w in bytes and in rows of a map, x in elements or records, the bias in elements
struct mbq_mmv_offsets {
    int64_t w = 0, x, bias;
    int w_row = 0;

    __device__ __forceinline__ mbq_mmv_offsets(const mbq_mmv_args & args) {
        if (args.ids) { // y is the slot and z the token; the ids may come from the previous kernel
            ggml_cuda_pdl_sync();
            const int expert = args.ids[blockIdx.y + blockIdx.z*args.ids_stride];
            w     = expert*args.w_channel;
            w_row = expert*args.M;
            x     = blockIdx.y % args.x_channels*args.x_channel + blockIdx.z*args.x_sample;
            bias  = expert*args.bias_channel;
        } else {
            if (gridDim.y*gridDim.z > 1) { // divisions are slow
                const int channel = blockIdx.y/args.channel_ratio;
                const int sample  = blockIdx.z/args.sample_ratio;
                w     = channel*args.w_channel + sample*args.w_sample;
                w_row = (sample*args.w_channels + channel)*args.M;
            }
            x    = blockIdx.y*args.x_channel + blockIdx.z*args.x_sample;
            bias = blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
        }
    }
};

// The next copy of a warp into its ring: rows of weights and, for up to 8 columns, the records of their activations. One stage at a time.
template <typename L, int NT, bool tma> struct mbq_mmv_producer {
    const mbq_mmv_args   & args;
    const mbq_mmv_maps   & maps;
    const mbq_mmv_thread & at;
    const char * w, * gate, * x;
    int w_row;              // of a map
    char     * ring;
    uint64_t * ready;       // a barrier for each stage
    int stage_bytes, pieces;
    int tile, slot, piece;

    __device__ __forceinline__ void next() {
        if constexpr (NT > 1) {
            piece += at.KW;
            if (piece >= pieces) {
                piece = at.kw;
                tile += at.tile_step;
            }
        } else {
            piece += args.slots;
            if (piece >= pieces) {
                slot += at.KW;
                if (slot >= args.slots) {
                    slot  = at.kw;
                    tile += at.tile_step;
                }
                piece = slot;
            }
        }
    }

    __device__ __forceinline__ int record_bytes() const {
        return min(args.blocks*L::QK/128 - piece*(MBQ_PIECE/128) + (args.blocks*L::QK%128 != 0), MBQ_PIECE/128)*mbq_record<L>::bytes;
    }

    __device__ __forceinline__ void fill(const int stage, const bool rows, const bool records) const {
        char       * to   = ring + stage*stage_bytes;
        const char * from = x + piece*(MBQ_PIECE/128*mbq_record<L>::bytes);
#ifdef MBQ_TMA_AVAILABLE
        if constexpr (tma) {
            if (at.lane == 0 && tile < at.tiles) {
                const uint32_t dst = __cvta_generic_to_shared(to);
                const uint32_t barrier = __cvta_generic_to_shared(&ready[stage]);
                const int row = w_row + tile*at.tile_rows;
                mbq_barrier_expect(barrier, (rows ? 16*args.stage_row : 0) + (NT == 1 && records ? record_bytes() : 0), NT != 1 || records);
                if (rows) {
                    mbq_box_copy(dst, maps.w, piece*L::piece_bytes, row, barrier);
                    mbq_box_copy(dst + 8*args.stage_row, args.gate ? maps.gate : maps.w, piece*L::piece_bytes,
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
        // Half of the warp's lanes copy a row. Copies start at multiples of 16 bytes and may extend up to 12 bytes past the row, but never past the
        // tensor: rows of a multiple of 512 weights are multiples of 16 bytes, and the CUDA backend pads others.
        if (tile < at.tiles) {
            const int bytes = min(args.blocks - piece*L::piece_blocks, L::piece_blocks)*L::block_words*4;
#pragma unroll
            for (int i = 0; i < 16 && rows; i += 2) {
                const char * row   = mbq_row(args, w, gate, tile, i + at.lane/16) + piece*L::piece_bytes;
                const int    shift = (int) (uintptr_t) row & 15;
                if (at.lane%16*16 < bytes + shift) {
                    mbq_copy_16(to + (i + at.lane/16)*args.stage_row + at.lane%16*16, row - shift + at.lane%16*16);
                }
            }
            if (NT == 1 && records) {
                for (int i = at.lane*16; i < record_bytes(); i += 32*16) {
                    mbq_copy_16(to + 16*args.stage_row + i, from + i);
                }
            }
        }
        mbq_copy_commit();
    }
};

#endif // TURING_MMA_AVAILABLE

// dst = w * x. NT = 0: one column of floats, quantised here, with bias and gate; otherwise up to 8*NT columns from mbq_quantize_records.
// CTA: (32*KW, groups). Grid: (CTAs that share the tiles, channels or slots, samples or tokens).
// tma: rows are contiguous multiples of 16 bytes, described by the maps; pieces past the end of a row are zeros.
template <typename L, int NT, bool tma>
static __global__ void __launch_bounds__(32*MBQ_MAX_WARPS, 1) mbq_mmv(const mbq_mmv_args args, MBQ_MAPS maps) {
#ifdef TURING_MMA_AVAILABLE
#ifndef MBQ_TMA_AVAILABLE
    if constexpr (tma) {
        NO_DEVICE_CODE;
    }
#endif
    extern __shared__ __align__(128) char mbq_shared[];
#ifdef MBQ_TMA_AVAILABLE
    __shared__ uint64_t mbq_ready[MBQ_MAX_WARPS][MBQ_STAGES];
#endif
    ggml_cuda_pdl_lc();

    const mbq_mmv_thread at(args);
    const int g = at.lane / 4;
    const int pieces      = (args.blocks + L::piece_blocks - 1)/L::piece_blocks;
    const int length      = (args.blocks*L::QK + 255)/256;
    const int stage_bytes = mbq_stage_bytes<L>(NT, args.stage_row);
    const int slots       = NT > 1 ? at.KW : args.slots;

    float * dst = args.dst + blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    const mbq_mmv_offsets offsets(args);
    const char * x    = (const char *) args.x + offsets.x*(NT == 0 ? (int) sizeof(float) : mbq_record<L>::bytes);
    const char * w    = args.w + offsets.w;
    const char * gate = args.gate ? args.gate + offsets.w : nullptr;

    char  * ring = mbq_shared + at.warp*(MBQ_STAGES*stage_bytes);
    char  * one  = mbq_shared + at.warps*(MBQ_STAGES*stage_bytes); // quantised column
    float * sums = (float *) (one + (NT == 0 ? length*MBQ_ONE_BYTES : 0)) + at.group*slots*mbq_sum_sets(NT)*mbq_sum_floats(NT);

    // Weights never depend on the previous kernel, so the first copies start while it still runs.
#ifdef MBQ_TMA_AVAILABLE
    uint64_t * ready = mbq_ready[at.warp];
    if constexpr (tma) {
        if (at.lane == 0) {
            for (int i = 0; i < MBQ_STAGES; ++i) {
                mbq_barrier_init(__cvta_generic_to_shared(&ready[i]), 1);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
        }
        __syncwarp();
    }
#else
    uint64_t * ready = nullptr;
#endif
    mbq_mmv_producer<L, NT, tma> producer = { args, maps, at, w, gate, x, offsets.w_row, ring, ready, stage_bytes, pieces,
        at.tile_first, at.kw, at.kw };
    producer.fill(0, true, false);
    if constexpr (NT != 1) {
        producer.next();
#pragma unroll
        for (int i = 1; i < MBQ_STAGES; ++i) {
            producer.fill(i, true, false);
            producer.next();
        }
    }

    ggml_cuda_pdl_sync();
    if constexpr (NT == 0) {
        mbq_quantize_one<L>((const float *) x, args.blocks*L::QK, args.x_aligned, one, at.warp, at.warps);
        __syncthreads();
        x = one;
    } else if constexpr (NT == 1) { // the first stage's records, then the second stage
#pragma unroll
        for (int i = 0; i < MBQ_STAGES; ++i) {
            producer.fill(i, i > 0, true);
            producer.next();
        }
    }

    constexpr int n = mbq_sum_floats(NT);
    int count  = 0; // of pieces
    int parity = 0;
    for (int tile = at.tile_first; tile < at.tiles; tile += at.tile_step) {
        int base[2]; // of the lane's rows in a stage
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            base[r] = (8*r + g)*args.stage_row + (tma ? 0 : (int) (uintptr_t) mbq_row(args, w, gate, tile, g + 8*r) & 15);
        }
        float * all = sums + parity*slots*n;
        float sum[mbq_sums(NT)][NT == 0 ? 2 : 4] = {};
        const auto multiply = [&](const int piece) {
            const int stage   = count % MBQ_STAGES;
            const char * here = ring + stage*stage_bytes;
            const int first  = piece*L::piece_blocks;
            const int blocks = min(args.blocks - first, L::piece_blocks);
#ifdef MBQ_TMA_AVAILABLE
            if constexpr (tma) {
                mbq_barrier_wait(__cvta_generic_to_shared(&ready[stage]), count/MBQ_STAGES%2);
            } else
#endif
            {
                mbq_copy_wait<MBQ_STAGES - 1>();
            }
            __syncwarp(); // all lanes' copies have arrived
            if constexpr (NT == 0) {
                mbq_piece_one<L>(here, base, x, length, first, blocks, sum[0]);
            } else {
                mbq_piece_many<L, NT>(here, base, x, here + 16*args.stage_row, first, blocks, sum);
            }
            __syncwarp(); // all lanes are done with the stage
            producer.fill(stage, true, true);
            producer.next();
            count++;
        };
        if constexpr (NT > 1) {
            for (int piece = at.kw; piece < pieces; piece += at.KW) {
                multiply(piece);
            }
            mbq_leave_sums<NT>(sum, all + at.kw*n, at.lane);
        } else {
            for (int slot = at.kw, piece = at.kw; slot < slots;) {
                multiply(piece);
                piece += slots;
                if (piece >= pieces) {
                    mbq_leave_sums<NT>(sum, all + slot*n, at.lane);
                    memset(sum, 0, sizeof(sum));
                    slot += at.KW;
                    piece = slot;
                }
            }
        }
        mbq_group_sync(at.group, at.KW);
        if constexpr (NT > 0) {
            mbq_store_many<NT>(args, all, tile, dst, at.KW, slots);
        } else if (at.kw == 0) {
            mbq_store_one(args, all, tile, dst, offsets.bias);
        }
        if constexpr (mbq_sum_sets(NT) == 2) {
            parity ^= 1; // a faster warp writes the next tile's sums while this tile's are read
        } else {
            mbq_group_sync(at.group, at.KW);
        }
    }
#else
    GGML_UNUSED_VARS(args, maps);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}
