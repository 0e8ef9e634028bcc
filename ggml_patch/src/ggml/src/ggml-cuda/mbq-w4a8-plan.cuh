#pragma once

// How mbq_w4a8_gemm and mbq_w4a8_mmv distribute their work.

#include <algorithm>
#include <cstdint>

// Tile shapes of mbq_w4a8_gemm: BM rows times BN columns per CTA, CL CTAs per worker; XS stages of activations and WS stages of weights, for 4 and 8 bits. Then
// their costs in units of 10 ns: a step of 256 of K with 4 and with 8 bits, the end of a tile, the start and end of a product, a tile split in two, and each
// further part (storing partial sums and adding them). Fitted to products with the shapes of Qwen2-VL-7B and its tower by 16 to 4096 columns, on an H100
// (4 bits, 64 and 128 columns) and an H200 (all others).
struct mbq_w4a8_shape {
    int BM, BN, CL, XS4, XS8, WS4, WS8, step4, step8, end, fixed, two, more;
};

static constexpr mbq_w4a8_shape MBQ_W4A8_SHAPES[] = {
    { 128,  64, 1, 12, 12, 6, 3, 60,  85, 120, 120, 190, 130 },
    { 128, 128, 2,  8,  6, 4, 3, 70,  78, 250, 400, 275, 155 },
    { 128, 160, 2,  6,  6, 5, 3, 80,  98, 200, 490, 300, 200 },
    {  64, 176, 2,  6,  6, 6, 4, 57,  60,  80, 530, 300, 200 }, // 1024 columns are six tiles: with 10 x 128 rows, 120 of 132 multiprocessors are busy
    {  64, 176, 4,  6,  6, 6, 4, 57,  52,  85, 560, 300, 200 }, // half the L2 reads of x of clusters of two: 19.2 us for 1280 x 5120 by 1024, not 20.7
    {  64, 256, 2,  5,  5, 5, 3, 70,  72, 100, 640, 300, 200 },
    {  64, 256, 4,  5,  5, 5, 3, 64,  64, 100, 620, 300, 200 }, // a GPC's multiprocessors are not a multiple of four, so some stay idle
    { 128, 128, 1,  8,  6, 4, 3, 95,  95, 250, 400, 275, 155 }, // for rows that are not multiples of 16 bytes
};
static constexpr int MBQ_W4A8_N_SHAPES = sizeof(MBQ_W4A8_SHAPES)/sizeof(MBQ_W4A8_SHAPES[0]);
static constexpr int MBQ_W4A8_COPIED   = MBQ_W4A8_N_SHAPES - 1; // the shape for rows that threads copy

struct mbq_w4a8_device {
    int64_t multiprocessors;
    int64_t fours; // how many clusters of four CTAs can run at a time
};

struct mbq_w4a8_gemm_plan {
    int shape, m_tiles, n_tiles; // in tiles of workers
    int workers, parts;          // parts of a tile, each with its own worker
};

// Whole tiles, or each tile split into equal parts if that occupies more multiprocessors. Unequal parts (stream-K as in mbq_plan_gemm) were slower almost
// everywhere, because workers at different positions in K find less of each other's data in L2: 66 us instead of 56 for 3584 x 18944 by 512.
// M: rows of each of n matrices, whose tiles are numbered consecutively. in_turns: only tiles of 64 rows, see mbq_w4a8_gemm
static mbq_w4a8_gemm_plan mbq_w4a8_plan_gemm(const int64_t * M, const int n, const int64_t N, const int64_t steps, const mbq_w4a8_device & device, const bool dense,
        const int bits, const bool in_turns) {
    mbq_w4a8_gemm_plan best = {};
    int64_t best_cost = INT64_MAX;
    for (int i = 0; i < MBQ_W4A8_N_SHAPES; ++i) {
        const mbq_w4a8_shape & s = MBQ_W4A8_SHAPES[i];
        if (dense == (i == MBQ_W4A8_COPIED) || (in_turns && s.BM != 64) || (s.CL == 4 && device.fours == 0)) {
            continue;
        }
        int64_t m_tiles = 0;
        for (int k = 0; k < n; ++k) {
            m_tiles += (M[k] + s.BM*s.CL - 1)/(s.BM*s.CL);
        }
        const int64_t n_tiles = (N + s.BN - 1)/s.BN;
        const int64_t tiles   = m_tiles*n_tiles;
        const int64_t most    = s.CL == 4 ? device.fours : std::max<int64_t>(device.multiprocessors/s.CL, 1);
        const int64_t rounds  = (tiles + most - 1)/most;
        for (int64_t parts = 1; parts == 1 || (tiles*parts <= most && parts <= std::min<int64_t>(steps, 8)); ++parts) {
            const int64_t cost = s.fixed + rounds*((steps + parts - 1)/parts*(bits == 4 ? s.step4 : s.step8) + s.end) + (parts > 1 ? s.two + (parts - 2)*s.more : 0);
            if (cost < best_cost) {
                best_cost = cost;
                best = { i, (int) m_tiles, (int) n_tiles, (int) (parts > 1 ? tiles*parts : (tiles + rounds - 1)/rounds), (int) parts };
            }
        }
    }
    return best;
}

struct mbq_w4a8_mmv_plan {
    int kw, groups, ctas, stages; // kw = 0: unsupported
};

// Chooses the number of warps that share a tile of 16 rows, and of such groups per CTA, for the fewest consecutive pieces; the end of a tile counts as one.
// units: of 16 activations that the CTA must quantise, at most `units_thread` per thread. Fitted to eleven splits of five shapes by 1 to 8 columns.
static mbq_w4a8_mmv_plan mbq_w4a8_plan_mmv(const int64_t M, const int64_t pieces, const int64_t units, const int64_t units_thread, const int64_t stage_bytes,
        const int64_t multiprocessors, const int64_t smem) {
    const int64_t tiles = (M + 15)/16;
    mbq_w4a8_mmv_plan best = {};
    int64_t best_cost = INT64_MAX;
    for (int64_t kw = 1; kw <= std::min<int64_t>(16, pieces); ++kw) {
        const int64_t groups = std::min({ 16/kw, (tiles + multiprocessors - 1)/multiprocessors, (int64_t) 15 });
        const int64_t fixed  = kw*groups*1024 + 16*units;
        const int64_t stages = std::min<int64_t>((smem - fixed)/(kw*groups*stage_bytes), 8);
        if (stages < 2 || units > units_thread*kw*groups*32) {
            continue;
        }
        const int64_t rounds = (tiles + multiprocessors*groups - 1)/(multiprocessors*groups);
        const int64_t turns  = (pieces + kw - 1)/kw;
        const int64_t cost   = rounds*(turns + 1) + (turns > 8 ? 2 : 0); // penalty for many turns: 17.7 us with 8 warps for 3584 x 18944, 16.3 with 16
        if (cost <= best_cost) {
            best_cost = cost;
            best = { (int) kw, (int) groups, (int) std::min(multiprocessors, tiles), (int) stages };
        }
    }
    return best;
}
