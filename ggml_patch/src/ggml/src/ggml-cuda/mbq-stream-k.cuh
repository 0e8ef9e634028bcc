#pragma once

// Which part of mbq_gemm's product (mbq-gemm.cuh) goes to which worker: a CTA, or a cluster of two.
//
// dst[N][M] = w[M][K] * x[K][N] in output tiles of 128 x 128 (256 x 256 for a cluster), which seldom fill all multiprocessors evenly. So the K steps
// of the first tiles, laid end to end, are cut into equal shares (stream-K), and whole tiles follow, the same number for each worker. Four tiles of 6
// steps, the first three as stream-K, and 4 workers:
//
//   step     0           6           12          18          24
//   tile     |     0     |     1     |     2     |     3     |
//   worker   |   0   .   1   .   2   .   3   |                  the fourth tile is whole: for one worker, or for a later round
//                    ^ worker 1's first part is the end of tile 0: its sums go to memory, and worker 0, which has the beginning, adds them
//
// A worker does the end of a tile first and the beginning of one last, so that sums of others are there when it needs them; they are added in order.

#include "mbq-plan.cuh"

struct mbq_gemm_args {
    const char  * w;
    const float * x;
    half        * x_tiles;  // x as fp16: see mbq_store_f16
    int         * ready;    // [n tile][k tile]: chunks that mbq_convert_late has written
    float       * dst;
    float       * parts;    // [CTA][BN/8][256 lanes][4]: sums of a part of a tile that is not its beginning
    int         * done;     // [CTA][warp]: whether they are there
    int64_t x_column, dst_column;    // elements
    int x_aligned;                   // columns may be read 16 bytes at a time
    int M, row_bytes, N, K;          // rows of w and their bytes; columns of x; weights of a row, a multiple of 128
    int converters, early;           // CTAs that convert activations, all but the k tiles before `early`
    int m_tiles, n_tiles;            // of a worker's output tiles
    int streamk_tiles;               // the first output tiles, n first, whose steps all workers share
};

struct mbq_gemm_plan {
    int cluster, workers, streamk_tiles; // CTAs of a worker, workers, and output tiles that they share (see mbq_gemm_args)
    int converters, early;               // see mbq_gemm_args
};

// CTAs that convert activations while the others multiply, and the k tiles that must be there before. Workers with whole tiles want k tiles in
// order, one in 0.41 us (0.72 us for 256 columns), as do those with the last of some equal parts of tiles, from its first k tile on; a
// converter writes 128 columns of a k tile in 0.91 us.
static void mbq_plan_converters(mbq_gemm_plan & plan, const int64_t n_tiles, const int64_t first, const int64_t k_tiles,
        const int64_t multiprocessors) {
    const int64_t spare   = std::min<int64_t>(multiprocessors - plan.cluster*plan.workers, 20); // more were not measured
    const int64_t convert = 91*n_tiles;
    const int64_t use     = (plan.cluster == 1 ? 41 : 72)*spare;
    plan.converters = spare/plan.cluster*plan.cluster;
    plan.early      = std::min(k_tiles, first + 16 + (k_tiles - first)*std::max<int64_t>(convert - use, 0)/convert);
    if (plan.converters == 0 || plan.early == k_tiles) {
        plan.converters = 0;
        plan.early      = k_tiles;
    }
}

// The least time, in 10 ns. On an H100 a step of 128 weights takes 0.8 to 0.9 us with 128 columns and 1.45 us with a cluster's 256, where workers are
// at the same weights of their rows, and 0.92 and 1.6 us in other shares, where they find each other's activations in the L2 cache less
// often. The ends of a part of a tile take about two steps, as leaving sums and adding those of another worker do, and converting 0.03 us a step
// and 128 columns.
static mbq_gemm_plan mbq_plan_gemm(const int64_t m_tiles, const int64_t n_tiles, const int64_t steps, const int64_t multiprocessors) {
    mbq_gemm_plan best = {};
    int64_t best_cost = INT64_MAX;
    for (int64_t cluster = 2; cluster >= 1; --cluster) {
        const int64_t least = cluster == 1 ? 83 : 145;
        const int64_t tiles = (m_tiles + cluster - 1)/cluster*((n_tiles + cluster - 1)/cluster);
        for (int64_t workers = std::min(tiles*steps, multiprocessors/cluster); workers >= 1; --workers) {
            if (best.workers > 0 && tiles*steps*least >= best_cost*workers) {
                break; // so do fewer
            }
            const int64_t rounds = tiles/workers; // of whole tiles
            const bool    whole  = tiles % workers == 0;
            const bool    same   = whole || workers % tiles == 0;
            const int64_t streamk = whole ? 0 : tiles - std::max<int64_t>(rounds - 1, 0)*workers;
            const int64_t length = whole ? rounds*(steps + 2) :
                (tiles*steps + workers - 1)/workers + 2*(rounds + 1) + 2*((workers + streamk - 1)/streamk);
            mbq_gemm_plan plan = { (int) cluster, (int) workers, (int) streamk, 0, 0 };
            mbq_plan_converters(plan, n_tiles, whole ? 0 : same ? 2*(steps - steps*tiles/workers) : 2*steps, 2*steps, multiprocessors);
            const int64_t step = same ? least : cluster == 1 ? 92 : 160;
            const int64_t cost = length*step + 3*n_tiles*plan.early/2 + (plan.converters > 0 ? 60 : 0);
            if (cost < best_cost) {
                best_cost = cost;
                best = plan;
            }
        }
    }
    return best;
}

// The work of one worker, part after part: steps of 128 weights, first to last - 1, of an output tile
struct mbq_stream_k {
    int step, end, whole; // still to do, all tiles' steps laid end to end; the next whole tile
    int tile;
    uint32_t first, last;

    static __host__ __device__ __forceinline__ int begin(const mbq_gemm_args & args, const int worker, const int workers) {
        return worker*(args.streamk_tiles*(args.K/128))/workers;
    }

    __host__ __device__ __forceinline__ mbq_stream_k(const mbq_gemm_args & args, const int worker, const int workers) :
        step(begin(args, worker, workers)), end(begin(args, worker + 1, workers)), whole(args.streamk_tiles + worker) {}

    __host__ __device__ __forceinline__ bool next(const mbq_gemm_args & args, const int workers) {
        const int steps = args.K/128;
        if (step == end) {
            if (whole >= args.m_tiles*args.n_tiles) {
                return false;
            }
            step   = whole*steps;
            end    = step + steps;
            whole += workers;
        }
        tile  = step/steps;
        first = step - tile*steps;
        last  = min(first + (uint32_t) (end - step), (uint32_t) steps);
        step += last - first;
        return true;
    }
};
