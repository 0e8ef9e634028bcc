#pragma once

// Matrix times up to 32 columns for the MBQ types: codes stay codes until the int8 tensor cores have multiplied them.
//
//   cluster of C blocks (one elsewhere than on Hopper and later): 16-row tiles cluster, cluster + clusters, ...
//     block `rank`: its slice of a row, a C-th of the pieces of 512 weights; quantises the activations of this slice only
//       group: every groups-th of the cluster's tiles
//         warp kw of KW: pieces kw, kw + KW, ... of the slice, for all 16 rows of a tile
//
// Each warp streams its pieces through its own ring of shared-memory stages with cp.async: no barrier but __syncwarp in the main
// loop, and 100 KB are on their way to each multiprocessor. The sums of 16 rows go to the block of the cluster that owns the tile; after a
// chunk of tiles one barrier of the cluster, then the owners add C*KW partial sums, bias, gate, and store.

#include "mbq-columns.cuh"

#include <algorithm>

static constexpr int MBQ_PIECE     = 512; // weights of one row in a stage: 208 bytes (QK = 128) or 224 (QK = 64), both multiples of 16
static constexpr int MBQ_MAX_WARPS = 16;

struct mbq_mmv_args {
    const char    * w;         // weights, and the gate's for a gated unit (else nullptr)
    const char    * gate;
    const float   * x;
    float         * dst;
    const float   * bias;      // one value a row, shaped like dst, or nullptr
    const float   * gate_bias;
    const int32_t * ids;       // expert of (slot, token), or nullptr
    int64_t row_bytes, w_channel, w_sample;   // bytes
    int64_t x_column, x_channel, x_sample;    // elements
    int64_t dst_column, dst_channel, dst_sample, bias_channel;
    int rows, blocks, columns;                // of one matrix: rows, blocks a row; columns of dst
    int channel_ratio, sample_ratio;          // broadcast of the weights over channels and samples
    int x_channels, ids_stride;               // only with ids
    int clusters, chunk_rounds, stage_row;    // from mbq_mmv_plan
    int x_aligned;                            // columns may be read 16 bytes at a time
    int glu_op;
    float glu_limit;
};

// Stages of a ring, one of them being computed. The activations of many columns leave less room.
static constexpr __host__ __device__ int mbq_stages(const int NC) {
    return NC <= 2 ? 3 : 2;
}

// Row stride of a stage. With 52 or 60 words the 32 lanes' loads (g, t) fall into different banks (20g or 28g mod 32: multiples of 4).
static constexpr int mbq_stage_row(const int QK, const bool aligned) {
    return QK == 128 && aligned ? 208 : 240; // 240: up to 12 bytes of misalignment, and 224 would not be free of conflicts
}

struct mbq_mmv_plan {
    int     cluster, clusters, kw, groups; // blocks of a cluster, clusters, warps that share a tile, tiles at a time in a cluster
    int     chunk_rounds;                  // tiles of a group between two barriers
    int64_t shared;                        // bytes of shared memory
};

// The plan with the fewest instructions on the longest way, kw = 0 if none fits. Counted in SASS: 420 for a piece, 130 for 256 activations
// of a column, 80 for a tile's end, 150 for a cluster's barriers. clusters[i]: how many clusters of 2^i blocks run at once (0: none).
static mbq_mmv_plan mbq_plan_mmv(const int QK, const int NC, const bool gate, const bool aligned, const int64_t rows, const int64_t blocks,
        const int columns, const int (&clusters)[4], const int64_t shared_limit) {
    const int64_t pieces = (blocks*QK + MBQ_PIECE - 1)/MBQ_PIECE;
    const int64_t tiles  = gate ? (rows + 7)/8 : (rows + 15)/16;
    mbq_mmv_plan best = { 0, 0, 0, 0, 0, 0 };
    int64_t best_cost = INT64_MAX;
    for (int i = 0; i < 4; ++i) {
        const int64_t slice = (pieces + (1 << i) - 1) >> i; // pieces of the longest slice
        const int64_t n     = std::min((int64_t) clusters[i], tiles);
        for (int kw = 1; n > 0 && kw <= std::min<int64_t>(slice, MBQ_MAX_WARPS); ++kw) {
            for (int groups = MBQ_MAX_WARPS/kw; groups > 0; --groups) {
                const int64_t rounds = (tiles + n*groups - 1)/(n*groups);
                const int64_t chunk  = std::min<int64_t>(rounds, NC == 1 ? 8 : NC <= 8 ? 2 : 1);
                const int64_t owned  = (groups*chunk + (1 << i) - 1) >> i; // tiles of a chunk that one block finishes
                const int64_t shared = slice*(MBQ_PIECE/128)*mbq_record_bytes(NC) + 16 + (int64_t) kw*groups*mbq_stages(NC)*16*mbq_stage_row(QK, aligned)
                    + (rounds > chunk ? 2 : 1)*owned*(kw << i)*16*NC*4;
                if (shared > shared_limit) {
                    continue;
                }
                const int64_t passes = (2*slice*columns + kw*groups - 1)/(kw*groups);
                const int64_t cost   = rounds*((slice + kw - 1)/kw*420 + 80) + passes*130 + (i > 0 ? 150 : 0);
                if (cost < best_cost) {
                    best_cost = cost;
                    best = { 1 << i, (int) n, kw, groups, (int) chunk, shared };
                }
                break; // fewer groups are never better
            }
        }
    }
    return best;
}

#ifdef TURING_MMA_AVAILABLE

// Where a warp's copies come from: rows g, g + 8 of its present tile.
template <int QK> struct mbq_rows {
    const char * row[2]; // 16-byte aligned
    int shift[2];        // bytes from there to the row

    // A gated unit's tile is 8 rows of the weights above the same 8 rows of the gate. Rows behind the end repeat the last.
    __device__ __forceinline__ mbq_rows(const mbq_mmv_args & args, const char * w, const char * gate, const int tile, const int g) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = gate ? tile*8 + g : tile*16 + g + 8*r;
            const char * p = (gate && r == 1 ? gate : w) + min(i, args.rows - 1)*args.row_bytes;
            shift[r] = (int) ((uintptr_t) p % 16);
            row[r]   = p - shift[r];
        }
    }

    // Starts the copies of a piece into a stage. The 16 bytes that hold its last ones may reach behind the row, never behind
    // the tensor: rows of a multiple of 512 weights are multiples of 16 bytes, and after others ggml_backend_cuda pads.
    __device__ __forceinline__ void copy(const mbq_mmv_args & args, const int piece, char * stage, const int g, const int t) const {
        constexpr int n = mbq_layout<QK>::piece_blocks;
        const int bytes = min(args.blocks - piece*n, n)*mbq_layout<QK>::block_words*4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const char * src = row[r] + piece*mbq_layout<QK>::piece_bytes + 16*t;
            char       * dst = stage + (g + 8*r)*args.stage_row + 16*t;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (16*t + 64*i < bytes + shift[r]) {
                    mbq_copy_16(dst + 64*i, src + 64*i);
                }
            }
        }
    }
};

// sum[i][...] += 16 rows of one piece in `stage` times the columns; first: the piece's first block in the slice, n: its blocks
template <int QK, int NC>
static __device__ __forceinline__ void mbq_piece(const mbq_mmv_args & args, const mbq_rows<QK> & at, const char * stage, const char * xs, const int records,
        const int first, const int n, float (&sum)[NC < 8 ? 1 : NC/8][NC == 1 ? 2 : 4]) {
    const int lane = threadIdx.x % 32;
    const int g = lane / 4;
    const int t = lane % 4;
    const auto one = [&](const int b) {
        const uint32_t * p[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            p[r] = (const uint32_t *) (stage + (g + 8*r)*args.stage_row + at.shift[r]) + b*mbq_layout<QK>::block_words;
        }
        int    a[QK/32][4];
        float2 dm[2];
        mbq_unpack<QK>(p, t, a, dm);
#pragma unroll
        for (int i = 0; i < (NC < 8 ? 1 : NC/8); ++i) {
            mbq_dot<QK>(a, dm, mbq_load_columns<QK, NC>(xs, records, first + b, i, lane), sum[i]);
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

// Hands the warp's sums of a tile to its owner: NC < 8: part[row*NC + column], else part[(8 columns)*128 + lane*4 + i]
template <int NC>
static __device__ __forceinline__ void mbq_hand_over(float * part, const float (&sum)[NC < 8 ? 1 : NC/8][NC == 1 ? 2 : 4], const int owner) {
    const int lane = threadIdx.x % 32;
    if constexpr (NC < 8) {
        if (lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2*NC; ++i) {
                mbq_cluster_store<1>(part + (lane/4 + i/NC*8)*NC + i % NC, sum[0] + i, owner);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < NC/8; ++i) {
            mbq_cluster_store<4>(part + i*128 + lane*4, sum[i], owner);
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

// Adds the n partial sums of each tile that this block owns, then bias and gate, and stores. Tile j of the chunk is tile first + j*step.
template <int NC>
static __device__ __forceinline__ void mbq_finish(const mbq_mmv_args & args, const float * parts, const int n, const int first, const int step, const int chunk,
        const int tiles, const int rank, const int C, float * dst, const int64_t bias_offset, const int thread, const int threads) {
    constexpr int size = 16*NC;
    const auto total = [&](const int slot, const int i) {
        float v = 0.0f;
        for (int s = 0; s < n; ++s) {
            v += parts[(slot*n + s)*size + i];
        }
        return v;
    };
    const int values = args.gate ? 8 : size; // of a tile
    for (int e = thread; ; e += threads) {
        const int slot = e / values;
        const int i    = e % values;
        const int j    = slot*C + rank;
        const int tile = first + j*step;
        if (j >= chunk || tile >= tiles) {
            return;
        }
        float v = total(slot, i);
        if (args.gate) { // NC = 1: rows 8 to 15 are the gate's rows 0 to 7
            const int row = tile*8 + i;
            if (row < args.rows) {
                const float gate = total(slot, i + 8) + (args.gate_bias ? args.gate_bias[bias_offset + row] : 0.0f);
                dst[row] = mbq_glu(args, gate, v + (args.bias ? args.bias[bias_offset + row] : 0.0f));
            }
            continue;
        }
        const int lane = i/4 % 32;
        const int row  = tile*16 + (NC < 8 ? i/NC : lane/4 + i/2%2*8);
        const int col  = NC < 8 ? i % NC : i/128*8 + lane%4*2 + i%2;
        if (row < args.rows && col < args.columns) {
            dst[col*args.dst_column + row] = v + (args.bias ? args.bias[bias_offset + row] : 0.0f);
        }
    }
}

#endif // TURING_MMA_AVAILABLE

// dst = w * x. NC = 1, 2, or up to NC = 8, 16, 32 columns; bias only with one. Block: (32*KW, groups), grid: (clusters*C, channels or slots,
// samples or tokens).
template <int QK, int NC>
static __global__ void __launch_bounds__(32*MBQ_MAX_WARPS, 1) mbq_mmv(const mbq_mmv_args args) {
#ifdef TURING_MMA_AVAILABLE
    constexpr int stages = mbq_stages(NC);
    constexpr int n_part = 16*NC;
    extern __shared__ __align__(16) char mbq_shared[];
    ggml_cuda_pdl_lc();
    mbq_cluster_arrive();

    const int lane = threadIdx.x % 32;
    const int g    = lane / 4;
    const int t    = lane % 4;
    const int kw   = threadIdx.x / 32;
    const int KW   = blockDim.x / 32;
    const int warp = threadIdx.y*KW + kw;
    const int C    = mbq_cluster_size(); // a power of two
    const int log  = __ffs(C) - 1;
    const int rank = blockIdx.x & (C - 1);
    const int warps = blockDim.y*KW;
    const int step  = args.clusters*blockDim.y; // tiles of all clusters in one round
    const int tiles = args.gate ? (args.rows + 7)/8 : (args.rows + 15)/16;
    const int first_tile = (blockIdx.x >> log) + threadIdx.y*args.clusters;

    constexpr int piece_blocks = mbq_layout<QK>::piece_blocks;
    const int pieces  = (args.blocks + piece_blocks - 1)/piece_blocks;
    const int begin   = rank*pieces >> log;  // of the slice
    const int end     = (rank + 1)*pieces >> log;
    const int records = min((end - begin)*(MBQ_PIECE/128), (args.blocks*QK + 127)/128 - begin*(MBQ_PIECE/128));

    float * dst = args.dst + blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    int64_t w_offset, x_offset, bias_offset;
    if (args.ids) { // y is the slot and z the token; the ids may come from the kernel before
        ggml_cuda_pdl_sync();
        const int expert = args.ids[blockIdx.y + blockIdx.z*args.ids_stride];
        w_offset    = expert*args.w_channel;
        x_offset    = blockIdx.y % args.x_channels*args.x_channel + blockIdx.z*args.x_sample;
        bias_offset = expert*args.bias_channel;
    } else {
        w_offset    = (blockIdx.y ? blockIdx.y/args.channel_ratio*args.w_channel : 0) + (blockIdx.z ? blockIdx.z/args.sample_ratio*args.w_sample : 0);
        x_offset    = blockIdx.y*args.x_channel + blockIdx.z*args.x_sample;
        bias_offset = blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
    }
    const char * w    = args.w + w_offset;
    const char * gate = args.gate ? args.gate + w_offset : nullptr;

    // Shared memory: activations of the slice, rings, partial sums of the tiles that this block owns (of two chunks in turn)
    const int stage_bytes = 16*args.stage_row;
    char  * ring  = mbq_shared + (records*mbq_record_bytes(NC) + 15)/16*16 + warp*(stages*stage_bytes);
    const int longest = (pieces + C - 1) >> log; // the same offset in every block of the cluster
    float * parts = (float *) (mbq_shared + longest*(MBQ_PIECE/128)*mbq_record_bytes(NC) + 16 + warps*(stages*stage_bytes));
    const int chunk  = blockDim.y*args.chunk_rounds;
    const int n_src  = KW << log;
    int other        = ((chunk + C - 1) >> log)*n_src*n_part; // floats to the other chunk's buffer

    // Weights never depend on the kernel before, so the first copies start while it still runs.
    int fill_tile  = begin + kw < end ? first_tile : tiles;
    int fill_piece = begin + kw;
    int filled     = 0;
    mbq_rows<QK> from(args, w, gate, fill_tile, g);
    const auto fill = [&]() {
        if (fill_tile < tiles) {
            from.copy(args, fill_piece, ring + filled*stage_bytes, g, t);
            fill_piece += KW;
            if (fill_piece >= end) {
                fill_piece = begin + kw;
                fill_tile += step;
                from = mbq_rows<QK>(args, w, gate, fill_tile, g);
            }
        }
        filled = filled + 1 == stages ? 0 : filled + 1;
        mbq_copy_commit();
    };
#pragma unroll
    for (int i = 0; i < stages - 1; ++i) {
        fill();
    }

    ggml_cuda_pdl_sync();
    mbq_quantize<QK, NC>(args.x + x_offset, begin*MBQ_PIECE, args.blocks*QK, args.columns, args.x_column, args.x_aligned, mbq_shared, records, warp, warps);
    __syncthreads();
    mbq_cluster_wait(); // the blocks of the cluster run: their shared memory may be written

    int stage = 0;
    for (int base = blockIdx.x >> log; base < tiles; base += args.chunk_rounds*step) {
        int tile = base + threadIdx.y*args.clusters;
        for (int j = threadIdx.y; j < chunk && tile < tiles; j += blockDim.y, tile += step) {
            const mbq_rows<QK> at(args, w, gate, tile, g);
            float sum[NC < 8 ? 1 : NC/8][NC == 1 ? 2 : 4] = {};
            for (int piece = begin + kw; piece < end; piece += KW) {
                mbq_copy_wait<stages - 2>();
                __syncwarp(); // all lanes' copies are there, and all lanes are done with the stage that is filled next
                fill();
                mbq_piece<QK, NC>(args, at, ring + stage*stage_bytes, mbq_shared, records, (piece - begin)*piece_blocks,
                    min(args.blocks - piece*piece_blocks, piece_blocks), sum);
                stage = stage + 1 == stages ? 0 : stage + 1;
            }
            mbq_hand_over<NC>(parts + ((j >> log)*n_src + (kw << log) + rank)*n_part, sum, j & (C - 1));
        }
        mbq_cluster_arrive();
        mbq_cluster_wait();
        mbq_finish<NC>(args, parts, n_src, base, args.clusters, chunk, tiles, rank, C, dst, bias_offset, warp*32 + lane, warps*32);
        // A block that is ahead writes the next chunk's sums while this chunk's are added.
        parts  += other;
        other   = -other;
    }
    mbq_copy_wait<0>();
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}
