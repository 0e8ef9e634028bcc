#pragma once

// Which work of mbq_gemm (mbq-gemm.cuh) goes to which block.
//
// Tiles of 128 rows (256 for a cluster) and N columns seldom fill all multiprocessors evenly. So equal shares of some tiles, in steps of 128
// weights, go to all blocks: a share is the end of one tile, whole tiles, the beginning of another. Sums of what is not the beginning are left
// in memory, early; who has the beginning has it last, and adds them in order. Then come whole tiles, the same number for each block.

#include "mbq-plan.cuh"

struct mbq_gemm_args {
    const char  * w;
    const float * x;
    half        * tiles;    // x as fp16: see mbq_store_halves
    int         * ready;    // [column tile][chunk]: units that mbq_convert has written
    float       * dst;
    float       * parts;    // [block][N/8][256 lanes][4]: sums of a part of a tile that is not its beginning
    int         * done;     // [block][warp]: whether they are there
    int64_t x_column, dst_column;    // elements
    int x_aligned;                   // columns may be read 16 bytes at a time
    int rows, row_bytes, columns, k; // k: weights of a row, a multiple of 128
    int converters, early;           // blocks that convert activations, all but the chunks before early
    int row_tiles, column_tiles;     // of a block, or of a cluster
    int shared;                      // the first tiles, columns first, of which all blocks or clusters get equal shares
};

struct mbq_gemm_plan {
    int blocks, shares, shared; // blocks of a cluster; such clusters; tiles of which each gets an equal share (see mbq_gemm_args)
    int converters, early;      // see mbq_gemm_args
};

// Blocks that convert activations while the others multiply, and the chunks that must be there before. Blocks with whole tiles want chunks in
// order, one in 0.41 us (0.72 us for 256 columns), as do those with the last of some equal parts of tiles, from its first chunk on; a converter
// writes 128 columns of a chunk in 0.91 us.
static void mbq_plan_converters(mbq_gemm_plan & plan, const int64_t column_tiles, const int64_t first, const int64_t chunks,
        const int64_t multiprocessors) {
    const int64_t spare   = std::min<int64_t>(multiprocessors - plan.blocks*plan.shares, 20); // more were not measured
    const int64_t convert = 91*column_tiles;
    const int64_t use     = (plan.blocks == 1 ? 41 : 72)*spare;
    plan.converters = spare/plan.blocks*plan.blocks;
    plan.early      = std::min(chunks, first + 16 + (chunks - first)*std::max<int64_t>(convert - use, 0)/convert);
    if (plan.converters == 0 || plan.early == chunks) {
        plan.converters = 0;
        plan.early      = chunks;
    }
}

// The least time, in 10 ns. On an H100 a step of 128 weights takes 0.8 to 0.9 us with 128 columns and 1.45 us with a cluster's 256, where blocks are
// at the same weights of their rows, and 0.92 and 1.6 us in other shares, where they find each other's activations in the L2 cache less
// often. The ends of a part of a tile take about two steps, as leaving sums and adding those of another share do, and converting 0.03 us a step
// and 128 columns.
static mbq_gemm_plan mbq_plan_gemm(const int64_t row_tiles, const int64_t column_tiles, const int64_t steps, const int64_t multiprocessors) {
    mbq_gemm_plan best = {};
    int64_t best_cost = INT64_MAX;
    for (int64_t blocks = 1; blocks <= 2; ++blocks) {
        const int64_t tiles = (row_tiles + blocks - 1)/blocks*((column_tiles + blocks - 1)/blocks);
        for (int64_t shares = 1; shares <= std::min(tiles*steps, multiprocessors/blocks); ++shares) {
            const int64_t rounds = tiles/shares; // of whole tiles
            const bool    whole  = tiles % shares == 0;
            const bool    same   = whole || shares % tiles == 0;
            const int64_t shared = whole ? 0 : tiles - std::max<int64_t>(rounds - 1, 0)*shares;
            const int64_t length = whole ? rounds*(steps + 2) :
                (tiles*steps + shares - 1)/shares + 2*(rounds + 1) + 2*((shares + shared - 1)/shared);
            mbq_gemm_plan plan = { (int) blocks, (int) shares, (int) shared, 0, 0 };
            mbq_plan_converters(plan, column_tiles, whole ? 0 : same ? 2*(steps - steps*tiles/shares) : 2*steps, 2*steps, multiprocessors);
            const int64_t step = blocks == 1 ? (same ? 83 : 92) : (same ? 145 : 160);
            const int64_t cost = length*step + 3*column_tiles*plan.early/2 + (plan.converters > 0 ? 60 : 0);
            if (cost <= best_cost) {
                best_cost = cost;
                best = plan;
            }
        }
    }
    return best;
}

// The work of a block or cluster, part after part: steps of 128 weights, first to last - 1, of a tile
struct mbq_gemm_work {
    int step, end, whole; // still to do of the share, all tiles' steps one after the other; the next whole tile
    int tile;
    uint32_t first, last;

    static __host__ __device__ __forceinline__ int begin(const mbq_gemm_args & args, const int share, const int shares) {
        return share*(args.shared*(args.k/128))/shares;
    }

    __host__ __device__ __forceinline__ mbq_gemm_work(const mbq_gemm_args & args, const int share, const int shares) :
        step(begin(args, share, shares)), end(begin(args, share + 1, shares)), whole(args.shared + share) {}

    __host__ __device__ __forceinline__ bool next(const mbq_gemm_args & args, const int shares) {
        const int steps = args.k/128;
        if (step == end) {
            if (whole >= args.row_tiles*args.column_tiles) {
                return false;
            }
            step   = whole*steps;
            end    = step + steps;
            whole += shares;
        }
        tile  = step/steps;
        first = step - tile*steps;
        last  = min(first + (uint32_t) (end - step), (uint32_t) steps);
        step += last - first;
        return true;
    }
};
