#pragma once

// Which work of mbq_gemm (mbq-gemm.cuh) goes to which block.
//
// Tiles of 128 rows (256 for a cluster) and N columns seldom fill all multiprocessors evenly. So equal shares of some tiles, in steps of 128
// weights, go to all blocks: a share is the end of one tile, whole tiles, the beginning of another. Sums of what is not the beginning are left
// in memory, early; who has the beginning has it last, and adds them in order. Then come whole tiles, the same number for each block.

#include "mbq-plan.cuh"

struct mbq_gemm_args {
    const char * w;
    const half * x;         // of mbq_halves
    float      * dst;
    float      * parts;     // [block][N/8][256 lanes][4]: sums of a part of a tile that is not its beginning
    int        * done;      // [block][warp]: whether they are there; cleared by mbq_halves
    int64_t dst_column;     // elements
    int rows, row_bytes, columns, k; // k: weights of a row, a multiple of 128
    int row_tiles, column_tiles;     // of a block, or of a cluster
    int shared;                      // the first tiles, columns first, of which all blocks or clusters get equal shares
};

struct mbq_gemm_plan {
    int blocks, shares, shared; // blocks of a cluster; such clusters; tiles of which each gets an equal share (see mbq_gemm_args)
};

// The least time, in steps of 128 weights; the ends of a part of a tile cost about two, as leaving sums and adding those of another share do.
// On an H100 a step of 128 columns takes 0.81 to 0.86 us and one of a cluster's 256 columns 1.42 to 1.6, where all blocks are at the same
// weights of their rows. In shares they are not, and find each other's activations in the L2 cache less often: 0.88 to 0.91 and 1.7 to 1.9 us
// (8192 x 29568 by 512: 411 us in shares of 66 clusters, 360 us with a tile for each of 64). So tiles are shared where it saves much.
static mbq_gemm_plan mbq_plan_gemm(const int64_t row_tiles, const int64_t column_tiles, const int64_t steps, const int64_t multiprocessors) {
    mbq_gemm_plan best = {};
    int64_t best_cost = INT64_MAX;
    for (int64_t blocks = 1; blocks <= 2; ++blocks) {
        const int64_t tiles = (row_tiles + blocks - 1)/blocks*((column_tiles + blocks - 1)/blocks);
        for (int64_t shares = 1; shares <= std::min(tiles*steps, multiprocessors/blocks); ++shares) {
            const int64_t rounds = tiles/shares; // of whole tiles
            const bool    whole  = tiles % shares == 0;
            const int64_t shared = whole ? 0 : tiles - std::max<int64_t>(rounds - 1, 0)*shares;
            const int64_t length = whole ? rounds*(steps + 2) : (tiles*steps + shares - 1)/shares + 2*(rounds + 1) + 2*((shares + shared - 1)/shared);
            const int64_t cost   = length*(blocks == 1 ? (whole ? 20 : 21) : (whole ? 34 : 40));
            if (cost <= best_cost) {
                best_cost = cost;
                best = { (int) blocks, (int) shares, (int) shared };
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
