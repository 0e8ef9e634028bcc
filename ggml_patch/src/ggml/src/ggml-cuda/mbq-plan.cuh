#pragma once

// The launch of mbq_mmv (mbq-gemv.cuh): its arguments, and the distribution of warps, tiles and shared memory.

#include "mbq-activations-q8.cuh"

#include <algorithm>

struct mbq_mmv_args {
    const char    * w;         // weights, and those of the gate for a gated unit (otherwise nullptr)
    const char    * gate;
    const void    * x;         // a column of floats (NT = 0) or records of mbq_quantize_records
    float         * dst;
    const float   * bias;      // one value per row, shaped like dst, or nullptr
    const float   * gate_bias;
    const int32_t * ids;       // expert of (slot, token), or nullptr
    int64_t w_channel, w_sample;              // bytes
    int64_t x_column, x_channel, x_sample;    // elements, or records
    int64_t dst_column, dst_channel, dst_sample, bias_channel; // elements
    int M, row_bytes, blocks, N;              // of one matrix: rows, their bytes and quantised blocks; columns of dst
    int w_channels, w_samples;                // of the weights
    int channel_ratio, sample_ratio;          // broadcast of the weights over channels and samples
    int x_channels, ids_stride;               // only with ids
    int stage_row;                            // see mbq_stage_row
    int slots;                                // of sums, see mbq_slots
    int x_aligned;                            // columns may be read 16 bytes at a time
    int glu_op;
    float glu_limit;
};

// Tensor maps of all rows of the weights and of the gate, in bytes, with boxes of 8 rows of a stage
struct mbq_mmv_maps {
#ifdef MBQ_USE_TMA
    CUtensorMap w, gate;
#endif
};

#if defined(MBQ_USE_TMA) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA)
#define MBQ_MAPS const __grid_constant__ mbq_mmv_maps
#else
#define MBQ_MAPS const mbq_mmv_maps
#endif

static constexpr int MBQ_MAX_WARPS  = 16; // per CTA; more, with fewer registers each, were slower for every shape
static constexpr int MBQ_MAX_GROUPS = 15; // barriers 1 to 15
static constexpr int MBQ_STAGES     = 2;  // of a warp's ring: one is being multiplied while the next arrives

// Row stride of a stage. With 52 or 60 words the 32 lanes' loads (g, t) fall into different banks (20g or 28g mod 32: multiples of 4).
template <typename L>
static constexpr int mbq_stage_row(const bool aligned) {
    return L::QK == 128 && aligned ? 208 : 240; // 240: up to 12 bytes of misalignment; 224 would have bank conflicts
}

// Weights of 16 rows and, for up to 8 columns, the records of their activations: more would leave too few warps.
template <typename L>
static constexpr __host__ __device__ int mbq_stage_bytes(const int NT, const int stage_row) {
    return 16*stage_row + (NT == 1 ? MBQ_PIECE/128*mbq_record<L>::bytes : 0);
}

// The number of partial sums of a tile, which are added at its end: slot s has pieces s, s + slots, ... For up to 8 columns it depends only on the rows' length,
// so that no sum depends on the number of columns, warps or multiprocessors. There are at most as many slots as warps, because one column is fastest if each warp
// has one slot of a tile. With more columns, each warp has one slot.
static constexpr __host__ __device__ int64_t mbq_slots(const int NT, const int64_t pieces, const int64_t kw) {
    return NT > 1 ? kw : pieces < MBQ_MAX_WARPS ? pieces : MBQ_MAX_WARPS;
}

// Sets of partial sums: one tile's are read while the next one's are written, unless all warps read (and 8 columns need the memory for warps).
static constexpr __host__ __device__ int mbq_sum_sets(const int NT) {
    return NT == 1 ? 1 : 2;
}

// Floats of a slot
static constexpr __host__ __device__ int mbq_sum_floats(const int NT) {
    return NT == 0 ? 16 : 128*NT;
}

struct mbq_mmv_plan {
    int     kw, groups, ctas, slots; // warps that share a tile, groups of them per CTA, CTAs that share the tiles; kw = 0: does not fit
    int64_t smem;                    // bytes of shared memory: activations, rings, partial sums
};

// Minimises the number of consecutive pieces. One more warp per group is preferred up to 1 % more pieces (both fitted to all splits of nine shapes on an
// H100), and half a piece is added if a warp has only one piece of a tile, since nothing then hides the end of the tile.
template <typename L>
static mbq_mmv_plan mbq_plan_mmv(const int NT, const bool gate, const bool aligned, const int64_t M, const int64_t blocks,
        const int multiprocessors, const int64_t smem_limit) {
    const int64_t pieces   = (blocks*L::QK + MBQ_PIECE - 1)/MBQ_PIECE;
    const int64_t tiles    = gate ? (M + 7)/8 : (M + 15)/16;
    const int64_t fixed    = NT == 0 ? (blocks*L::QK + 255)/256*MBQ_ONE_BYTES : 0;
    const int64_t per_warp = MBQ_STAGES*mbq_stage_bytes<L>(NT, mbq_stage_row<L>(aligned));
    mbq_mmv_plan best = { 0, 0, 0, 0, 0 };
    int64_t best_cost = INT64_MAX;
    for (int64_t kw = 1; kw <= std::min<int64_t>(MBQ_MAX_WARPS, pieces); ++kw) {
        const int64_t slots     = mbq_slots(NT, pieces, kw);
        const int64_t per_group = kw*per_warp + slots*mbq_sum_sets(NT)*4*mbq_sum_floats(NT);
        const int64_t groups    = std::min({ MBQ_MAX_WARPS/kw, (smem_limit - fixed)/per_group, (tiles + multiprocessors - 1)/multiprocessors,
            (int64_t) MBQ_MAX_GROUPS });
        if (groups <= 0) {
            break;
        }
        const int64_t rounds = (tiles + multiprocessors*groups - 1)/(multiprocessors*groups);
        int64_t turns = 0; // pieces of the first warp, which has the most
        for (int64_t slot = 0; slot < slots; slot += kw) {
            turns += (pieces - slot + slots - 1)/slots;
        }
        const int64_t cost = rounds*turns*(100 - kw) + (turns == 1 ? 50 : 0);
        if (cost <= best_cost) {
            best_cost = cost;
            best = { (int) kw, (int) groups, (int) std::min<int64_t>(multiprocessors, tiles), (int) slots, fixed + groups*per_group };
        }
    }
    return best;
}
