#pragma once

// Distributes mbq_gemm's product (mbq-gemm.cuh) over workers, each of which is a CTA or a cluster of two.
//
// dst[N][M] = w[M][K] * x[K][N] has output tiles of 128 x 128 (256 x 256 for a cluster), which rarely fill all multiprocessors evenly. So the K steps of the first
// tiles, concatenated, are divided into equal shares (stream-K); whole tiles follow, the same number for each worker. For example, four tiles of 6 steps, of which the
// first three use stream-K, and 4 workers:
//
//   step     0           6           12          18          24
//   tile     |     0     |     1     |     2     |     3     |
//   worker   |   0   .   1   .   2   .   3   |                  the fourth tile is whole: one worker computes it in a later round
//                    ^ worker 1's first part is the end of tile 0: it stores its sums, and worker 0, which has the start, adds them
//
// A worker computes the end of a tile first and the start of one last, so that others' sums are available when it needs them; they are added in order.

#include "mbq-plan.cuh"

struct mbq_gemm_args {
    const char  * w;
    const float * x;
    half        * x_tiles;  // x as fp16: see mbq_store_f16
    int         * ready;    // [n tile][k tile]: chunks that mbq_convert_late has written
    float       * dst;
    float       * parts;    // [CTA][BN/8][256 lanes][4]: sums of a part of a tile that is not its start
    int         * done;     // [CTA][warp]: whether they are stored
    int64_t x_column, dst_column;    // elements
    int x_aligned;                   // columns may be read 16 bytes at a time
    int M, row_bytes, N, K;          // rows of w and their bytes; columns of x; weights of a row, a multiple of 128
    int converters, early;           // CTAs that convert activations, all but the k tiles before `early`
    int m_tiles, n_tiles;            // number of output tiles of a worker's size
    int streamk_tiles;               // the first output tiles, in order of n, whose steps all workers share
};

struct mbq_gemm_plan {
    int cluster, workers, streamk_tiles; // CTAs per worker, number of workers, and output tiles that they share (see mbq_gemm_args)
    int converters, early;               // see mbq_gemm_args
};

// The number of CTAs that convert activations while the others multiply, and of k tiles that must be converted before. Workers with whole tiles need k tiles in order,
// one every 0.41 us (0.72 us for 256 columns), and so do those with the last of several equal parts of a tile, from its first k tile on. A converter writes 128
// columns of a k tile in 0.91 us.
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

// Minimises the estimated time, in units of 10 ns. On an H100, a step of 128 weights takes 0.8 to 0.9 us with 128 columns and 1.45 us with a cluster's 256 if workers
// are at the same weights of their rows, and 0.92 and 1.6 us otherwise, because they find each other's activations in the L2 cache less often. Starting and
// ending a part of a tile takes about two steps, as does storing sums or adding those of another worker; converting takes 0.03 us per step and 128 columns.
static mbq_gemm_plan mbq_plan_gemm(const int64_t m_tiles, const int64_t n_tiles, const int64_t steps, const int64_t multiprocessors) {
    mbq_gemm_plan best = {};
    int64_t best_cost = INT64_MAX;
    for (int64_t cluster = 2; cluster >= 1; --cluster) {
        const int64_t least = cluster == 1 ? 83 : 145;
        const int64_t tiles = (m_tiles + cluster - 1)/cluster*((n_tiles + cluster - 1)/cluster);
        for (int64_t workers = std::min(tiles*steps, multiprocessors/cluster); workers >= 1; --workers) {
            if (best.workers > 0 && tiles*steps*least >= best_cost*workers) {
                break; // fewer do not fit either
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

// The work of one worker, one part at a time: steps of 128 weights, first to last - 1, of an output tile
struct mbq_stream_k {
    int step, end, whole; // remaining range of the concatenated steps of all tiles; the next whole tile
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
