#pragma once

// Matrix times a few columns for the MBQ types: codes stay codes until the int8 tensor cores have multiplied them.
//
// A block of QK weights, as ggml-mbq-common.h stores it (32-bit words; QK = 128 | 64):
//
//   word    0        1 ...  8 | 4             9 ... 12 | 5, 6
//         | d   m  | ql: byte i holds, at    | qh: byte i % (QK/8) holds, at bit
//         |        | bits 2j, the low bits   | (2j + 2) % 8 + i / (QK/8), the high
//         |        | of weight QK/4 * j + i  | bit of weight QK/4 * j + i            (j = 0..3: the plane)
//
//   so (ql & 3 << 2j) | (qh & 4 << 2j) is 4^j times the code for planes 0 to 2, in bytes that fit int8.
//
// mma.m16n8k32 wants, in lane 4g + t, bytes 4t..4t+3 and 16+4t..16+4t+3 of rows g and g + 8 of a 32-weight group: for QK = 128 these are
// words t and t + 4 of ql in one plane and word t of qh; for QK = 64 word t of ql in two planes. Every lane loads each word once and
// uses all of it. The B operand holds 8 columns of activations, quantised to int8 with one scale every 32 values, as Q8_1 does.
//
// One warp owns 16 rows (an MT-th of them) and every KW-th piece of 512 weights of these rows; KW warps share a tile, their sums meet in
// shared memory. Each warp streams its pieces through its own ring of MBQ_STAGES shared-memory stages with cp.async: no barrier but
// __syncwarp in the main loop, and 100 KB and more are on their way to each multiprocessor. With the row stride of 60 words the
// loads of (g, t) fall into 32 different banks (60 g mod 32 = 28 g mod 32: all multiples of 4).

#include <algorithm>
#include <cstdint>

#ifndef MBQ_STAGES
#define MBQ_STAGES 2
#endif
#ifndef MBQ_MAX_WARPS
#define MBQ_MAX_WARPS 16
#endif
#ifndef MBQ_MIN_BLOCKS
#define MBQ_MIN_BLOCKS 1
#endif
static constexpr int MBQ_PIECE = 512; // weights of one row in a stage: 208 bytes (QK = 128) or 224 (QK = 64), both multiples of 16
static constexpr int MBQ_RECORD_BYTES = 1024 + 128 + 64; // 128 activations of 8 columns, see mbq_quantize_columns
static constexpr int MBQ_MAGIC        = 0x4B400000;      // 1.5 * 2^23 as float: integers below 2^22 added to its bits are added to its value

struct mbq_mmv_args {
    const char    * w;         // weights, and the gate's for a gated unit (else nullptr)
    const char    * gate;
    const void    * x;         // float columns (NC > 0) or records of mbq_quantize_columns
    float         * dst;
    const float   * bias;      // one value a row, shaped like dst, or nullptr
    const float   * gate_bias;
    const int32_t * ids;       // expert of (slot, token), or nullptr
    int64_t row_bytes, w_channel, w_sample;   // bytes
    int64_t x_column, x_channel, x_sample;    // elements (NC > 0) or records
    int64_t dst_column, dst_channel, dst_sample, bias_channel; // elements
    int rows, blocks, columns;                // of one matrix: rows, blocks a row; columns of dst
    int channel_ratio, sample_ratio;          // broadcast of the weights over channels and samples
    int x_channels, ids_stride;               // only with ids
    int stage_row;                            // bytes of one row of a stage, see mbq_stage_row
    int x_aligned;                            // columns may be read 16 bytes at a time
    int glu_op;
    float glu_limit;
};

template <int QK> struct mbq_layout {
    static constexpr int block_words  = 1 + 3*QK/32;
    static constexpr int piece_blocks = MBQ_PIECE/QK;
    static constexpr int piece_bytes  = 4*block_words*piece_blocks;
    static constexpr int groups       = QK/32;
    // The power of four that the codes of a group carry through the tensor core, undone by the activation scale.
    static __device__ __forceinline__ float unscale(const int group) {
        if constexpr (QK == 128) {
            return group == 1 ? 0.25f : group == 2 ? 0.0625f : 1.0f; // plane 3 does not fit in place and is shifted down
        } else {
            return group % 2 == 0 ? 0.25f : 0.0625f;                 // planes 0, 1 times 4 and planes 2, 3 times 16
        }
    }
};

// 16 bytes from global to shared memory, asynchronously where the hardware can.
static __device__ __forceinline__ void mbq_copy_16(void * dst, const void * src) {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src) : "memory");
#else
    *(int4 *) dst = *(const int4 *) src;
#endif
}

static __device__ __forceinline__ void mbq_copy_commit() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until all but the n newest groups of copies have arrived.
template <int n> static __device__ __forceinline__ void mbq_copy_wait() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory");
#endif
}

// d = a * b + MBQ_MAGIC: 16 rows, 8 columns, 32 int8 products each. Turing does it in quarters.
static __device__ __forceinline__ void mbq_mma(int (&d)[4], const int (&a)[4], const int (&b)[2]) {
#if defined(AMPERE_MMA_AVAILABLE)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(MBQ_MAGIC));
#elif defined(TURING_MMA_AVAILABLE)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        d[2*i] = d[2*i + 1] = MBQ_MAGIC;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+r"(d[2*i]), "+r"(d[2*i + 1]) : "r"(a[2*j + i]), "r"(b[j]));
        }
    }
#else
    GGML_UNUSED_VARS(d, a, b);
    NO_DEVICE_CODE;
#endif
}

// The A operands of all groups of one block for rows g and g + 8, which start at p[0] and p[1].
template <int QK>
static __device__ __forceinline__ void mbq_unpack(const uint32_t * const (&p)[2], const int t, int (&a)[QK/32][4], float2 (&dm)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        dm[r] = __half22float2(*(const half2 *) p[r]);
        if constexpr (QK == 128) {
            const uint32_t ql0 = p[r][1 + t];
            const uint32_t ql1 = p[r][5 + t];
            const uint32_t qh0 = p[r][9 + t];
            const uint32_t qh1 = qh0 >> 1;
#pragma unroll
            for (int j = 0; j < 3; ++j) {
                a[j][r]     = (ql0 & (0x03030303u << 2*j)) | (qh0 & (0x04040404u << 2*j));
                a[j][r + 2] = (ql1 & (0x03030303u << 2*j)) | (qh1 & (0x04040404u << 2*j));
            }
            a[3][r]     = ((ql0 >> 6) & 0x03030303u) | ((qh0 << 2) & 0x04040404u);
            a[3][r + 2] = ((ql1 >> 6) & 0x03030303u) | ((qh0 << 1) & 0x04040404u);
        } else {
            const uint32_t ql = p[r][1 + t];
            const uint32_t qh = p[r][5 + (t & 1)] >> (t >> 1);
            a[0][r]     = ((ql << 2) & 0x0C0C0C0Cu) | ((qh << 2) & 0x10101010u);
            a[0][r + 2] = ( ql       & 0x0C0C0C0Cu) | ( qh       & 0x10101010u);
            a[1][r]     = ( ql       & 0x30303030u) | ( qh       & 0x40404040u);
            a[1][r + 2] = ((ql >> 2) & 0x30303030u) | ((qh << 6) & 0x40404040u);
        }
    }
}

// Eight consecutive activations of a column, zeros behind its end (n is a multiple of 8).
static __device__ __forceinline__ void mbq_load_8(float (&v)[8], const float * x, const int i, const int n, const bool aligned) {
    if (i >= n) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = 0.0f;
        }
    } else if (aligned) {
        *(float4 *) (v + 0) = *(const float4 *) (x + i);
        *(float4 *) (v + 4) = *(const float4 *) (x + i + 4);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = x[i + j];
        }
    }
}

// Four values times inverse as int8, rounded to nearest: adding 1.5 * 2^23 leaves the integer in the low bits of the float.
static __device__ __forceinline__ int mbq_pack_4(const float * v, const float inverse) {
    const uint32_t q0 = __float_as_uint(fmaf(v[0], inverse, 12582912.0f));
    const uint32_t q1 = __float_as_uint(fmaf(v[1], inverse, 12582912.0f));
    const uint32_t q2 = __float_as_uint(fmaf(v[2], inverse, 12582912.0f));
    const uint32_t q3 = __float_as_uint(fmaf(v[3], inverse, 12582912.0f));
    return __byte_perm(__byte_perm(q0, q1, 0x0040), __byte_perm(q2, q3, 0x0040), 0x5410);
}

// Quantises 256 activations of a column, eight in each lane: words = eight int8, scale of the lane's group of 32 (4 lanes; without the
// power of four), sum = scale * int8 summed over the record of 128 (QK = 128) or over its half (QK = 64).
template <int QK>
static __device__ __forceinline__ void mbq_quantize_lane(const float (&v)[8], int (&words)[2], float & scale, float & sum) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        amax = fmaxf(amax, fabsf(v[i]));
    }
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, 2));
    scale = amax*(1.0f/127.0f);
    const float inverse = amax > 1e-30f ? __fdividef(127.0f, amax) : 0.0f; // smaller ones would overflow, and are nothing
    words[0] = mbq_pack_4(v + 0, inverse);
    words[1] = mbq_pack_4(v + 4, inverse);
    sum = scale*(float) __dp4a(words[0], 0x01010101, __dp4a(words[1], 0x01010101, 0));
#pragma unroll
    for (int i = 1; i < QK/8; i *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, i);
    }
}

// Records for mbq_mmv with NC = 0. One block of 8 warps writes two records, each of 128 activations of 8 columns:
//   1024 bytes: [group pair][lane 4*column + t][words t, t + 4 of the first group, then of the second]
//    128 bytes: [t][group][columns 2t, 2t + 1] scales times the power of four, 64 bytes: [t][half][columns 2t, 2t + 1] sums
template <int QK>
static __global__ void mbq_quantize_columns(const float * x, char * records, const int k, const int columns, const int64_t x_column,
        const int64_t x_channel, const int64_t x_sample, const int channels, const int aligned) {
    ggml_cuda_pdl_lc();
    const int lane = threadIdx.x % 32;
    const int c    = threadIdx.x / 32;
    const int col  = blockIdx.y*8 + c;
    const int ch   = blockIdx.z % channels;
    const int sa   = blockIdx.z / channels;
    const int n    = (k + 127)/128;           // records of 8 columns
    const int rec  = blockIdx.x*2 + lane/16;
    char * record  = records + (((int64_t) blockIdx.z*n + rec)*gridDim.y + blockIdx.y)*MBQ_RECORD_BYTES;
    ggml_cuda_pdl_sync();

    x += sa*x_sample + ch*x_channel + col*x_column;
    float v[8];
    mbq_load_8(v, x, blockIdx.x*256 + 8*lane, col < columns ? k : 0, aligned);
    int words[2];
    float scale, sum;
    mbq_quantize_lane<QK>(v, words, scale, sum);
    if (rec >= n) {
        return;
    }
    const int group = lane/4 % 4;
    const int w     = lane%4 * 2; // words w, w + 1 of the group
    int * out = (int *) record + group/2*128 + (4*c + w%4)*4 + group%2*2 + w/4;
    out[0] = words[0];
    out[4] = words[1];
    if (lane % 4 == 0) {
        ((float *) (record + 1024))[c/2*8 + group*2 + c%2] = scale*mbq_layout<QK>::unscale(group);
    }
    if (lane % 8 == 0) {
        ((float *) (record + 1152))[c/2*4 + group/2*2 + c%2] = sum;
    }
}

// What a lane needs of the activations for one block of weights: B operands, scales and sums of the columns of its C operand.
template <int QK, int cols> struct mbq_columns {
    int   b[QK/32][2];
    float s[QK/32][cols];
    float m[cols];
};

// From shared memory (NC = 1, 2): words [record][column][t][8], scales [record][column][4], sums [record][column][2].
// The 8 columns of the B operand repeat the NC real ones, so every lane holds results of real columns.
template <int QK, int NC>
static __device__ __forceinline__ mbq_columns<QK, NC> mbq_columns_shared(const char * xs, const int records, const int block, const int g, const int t) {
    constexpr int G = QK/32;
    const int rec  = block*G/4;
    const int half = G == 4 ? 0 : block % 2;
    const int      * words  = (const int *) xs + ((rec*NC + g % NC)*4 + t)*8 + 4*half;
    const float    * scales = (const float *) xs + records*NC*32 + rec*NC*4 + 2*half;
    const float    * sums   = (const float *) xs + records*NC*36 + rec*NC*2 + half;
    mbq_columns<QK, NC> c;
#pragma unroll
    for (int i = 0; i < G/2; ++i) {
        const int4 v = ((const int4 *) words)[i];
        c.b[2*i][0] = v.x; c.b[2*i][1] = v.y; c.b[2*i + 1][0] = v.z; c.b[2*i + 1][1] = v.w;
    }
#pragma unroll
    for (int j = 0; j < NC; ++j) {
        if constexpr (G == 4) {
            const float4 v = *(const float4 *) (scales + 4*j);
            c.s[0][j] = v.x; c.s[1][j] = v.y; c.s[2][j] = v.z; c.s[3][j] = v.w;
        } else {
            const float2 v = *(const float2 *) (scales + 4*j);
            c.s[0][j] = v.x; c.s[1][j] = v.y;
        }
        c.m[j] = sums[2*j];
    }
    return c;
}

// From a record of mbq_quantize_columns.
template <int QK>
static __device__ __forceinline__ mbq_columns<QK, 2> mbq_columns_records(const char * record, const int half, const int lane) {
    constexpr int G = QK/32;
    const int t = lane % 4;
    mbq_columns<QK, 2> c;
#pragma unroll
    for (int i = 0; i < G/2; ++i) {
        const int4   v = ((const int4 *) record)[(i + half)*32 + lane];
        const float4 s = ((const float4 *) (record + 1024))[t*2 + i + half];
        c.b[2*i][0] = v.x; c.b[2*i][1] = v.y; c.b[2*i + 1][0] = v.z; c.b[2*i + 1][1] = v.w;
        c.s[2*i][0] = s.x; c.s[2*i][1] = s.y; c.s[2*i + 1][0] = s.z; c.s[2*i + 1][1] = s.w;
    }
    const float2 m = ((const float2 *) (record + 1152))[t*2 + half];
    c.m[0] = m.x; c.m[1] = m.y;
    return c;
}

// sum += rows g, g + 8 of one block times the columns of x. sum[r*cols + c]: row g + 8r, column c of the lane's.
template <int QK, int cols>
static __device__ __forceinline__ void mbq_dot(const int (&a)[QK/32][4], const float2 (&dm)[2], const mbq_columns<QK, cols> & x, float (&sum)[2*cols]) {
    float part[2*cols];
#pragma unroll
    for (int j = 0; j < QK/32; ++j) {
        int d[4];
        mbq_mma(d, a[j], x.b[j]);
#pragma unroll
        for (int i = 0; i < 2*cols; ++i) {
            const float f = __int_as_float(d[i/cols*2 + i % cols]) - __int_as_float(MBQ_MAGIC);
            part[i] = j == 0 ? f*x.s[j][i % cols] : part[i] + f*x.s[j][i % cols];
        }
    }
#pragma unroll
    for (int i = 0; i < 2*cols; ++i) {
        sum[i] += dm[i/cols].x*part[i];
        sum[i] += dm[i/cols].y*x.m[i % cols];
    }
}

// Reads the pieces of one warp in order: tile after tile, in each tile pieces kw, kw + KW, ...
template <int QK, int MT> struct mbq_stream {
    const char * row[MT][2]; // 16-byte aligned start of rows g, g + 8 of each 16-row tile
    int shift[MT][2];        // bytes from there to the row
    int tile, piece;

    __device__ __forceinline__ void rows_of(const mbq_mmv_args & args, const char * w, const char * gate, const int g) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                // A gated unit's tile is 8 rows of the weights above the same 8 rows of the gate. Rows behind the end repeat the last.
                const int i = gate ? (tile*MT + m)*8 + g : (tile*MT + m)*16 + g + 8*r;
                const char * p = (gate && r == 1 ? gate : w) + min(i, args.rows - 1)*args.row_bytes;
                shift[m][r] = (int) ((uintptr_t) p % 16);
                row[m][r]   = p - shift[m][r];
            }
        }
    }

    // Starts the copies of the current piece into a stage.
    __device__ __forceinline__ void copy(const mbq_mmv_args & args, char * stage, const int g, const int t) const {
        const int bytes = min(args.blocks - piece*mbq_layout<QK>::piece_blocks, mbq_layout<QK>::piece_blocks)*mbq_layout<QK>::block_words*4;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const char * src = row[m][r] + piece*mbq_layout<QK>::piece_bytes;
                char       * dst = stage + (m*16 + g + 8*r)*args.stage_row;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int offset = 16*(t + 4*i);
                    if (offset < bytes + shift[m][r]) {
                        mbq_copy_16(dst + offset, src + offset);
                    }
                }
            }
        }
    }
};

// Shared memory of one block of warps: [activations][rings][partial sums, two tiles]
static constexpr __host__ __device__ int mbq_mmv_sum_floats(const int NC, const int NT, const int MT) {
    return NC > 0 ? 16*NC*MT : 128*NT*MT; // of one tile in one warp
}

// Row stride of a stage. With 52 or 60 words the 32 lanes' loads (g, t) fall into different banks (20g or 28g mod 32: multiples of 4).
static constexpr int mbq_stage_row(const int QK, const bool aligned) {
    return QK == 128 && aligned ? 208 : 240; // 240: up to 12 bytes of misalignment, and 224 would not be free of conflicts
}

// Weights of 16*MT rows, and for up to 8 columns the records of their activations: more would leave too few warps.
static constexpr __host__ __device__ int mbq_stage_bytes(const int NC, const int NT, const int MT, const int stage_row) {
    return MT*16*stage_row + (NC == 0 && NT == 1 ? MBQ_PIECE/128*MBQ_RECORD_BYTES : 0);
}

static constexpr int64_t mbq_mmv_shared_bytes(const int NC, const int NT, const int MT, const int warps, const int64_t records, const int stage_row) {
    return NC*records*152 + 8 + (int64_t) warps*(MBQ_STAGES*mbq_stage_bytes(NC, NT, MT, stage_row) + 2*4*mbq_mmv_sum_floats(NC, NT, MT));
}

struct mbq_mmv_plan {
    int     kw, groups, blocks; // warps that share a tile, such groups in a block, blocks that share the tiles
    int64_t shared;             // bytes of shared memory; kw = 0: does not fit
};

// Fewest pieces on the longest way: (rounds of tiles) * (pieces of a tile in one warp). Ties go to more warps a tile: shorter tails.
static mbq_mmv_plan mbq_plan_mmv(const int QK, const int NC, const int NT, const int MT, const bool gate, const bool aligned, const int64_t rows,
        const int64_t blocks, const int max_blocks, const int warp_limit, const int64_t shared_limit) {
    const int64_t records = (blocks*QK + 127)/128;
    const int64_t pieces  = (blocks*QK + MBQ_PIECE - 1)/MBQ_PIECE;
    const int64_t tiles   = gate ? (rows + 8*MT - 1)/(8*MT) : (rows + 16*MT - 1)/(16*MT);
    const int stage_row   = mbq_stage_row(QK, aligned);
    int max_warps = warp_limit;
    while (max_warps > 0 && mbq_mmv_shared_bytes(NC, NT, MT, max_warps, records, stage_row) > shared_limit) {
        --max_warps;
    }
    mbq_mmv_plan best = { 0, 0, 0, 0 };
    int64_t best_cost = INT64_MAX;
    for (int kw = 1; kw <= max_warps && kw <= pieces; ++kw) {
        const int64_t groups = std::min((int64_t) (max_warps/kw), (tiles + max_blocks - 1)/max_blocks);
        const int64_t cost   = ((tiles + max_blocks*groups - 1)/(max_blocks*groups))*((pieces + kw - 1)/kw);
        if (cost <= best_cost) {
            best_cost = cost;
            best = { kw, (int) groups, (int) std::min((int64_t) max_blocks, tiles), 0 };
        }
    }
    best.shared = mbq_mmv_shared_bytes(NC, NT, MT, best.kw*best.groups, records, stage_row);
    return best;
}

// All columns of this block's channel and sample, quantised into shared memory in the order of mbq_columns_shared.
template <int QK, int NC>
static __device__ __forceinline__ void mbq_quantize_shared(const mbq_mmv_args & args, const float * x, char * xs, const int records, const int warp, const int warps) {
    constexpr int ahead = 4; // loads of so many rounds are started together: a round's latency is most of its time
    const int lane = threadIdx.x % 32;
    const int k    = args.blocks*QK;
    const int n    = (records + 1)/2*NC;
    for (int i0 = warp; i0 < n; i0 += ahead*warps) {
        float v[ahead][8];
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            const int i = i0 + a*warps;
            mbq_load_8(v[a], x + i % NC*args.x_column, i/NC*256 + 8*lane, i < n ? k : 0, args.x_aligned);
        }
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            const int i   = i0 + a*warps;
            const int rec = i/NC*2 + lane/16;
            int words[2];
            float scale, sum;
            mbq_quantize_lane<QK>(v[a], words, scale, sum);
            if (i < n && rec < records) {
                const int j     = rec*NC + i % NC;
                const int group = lane/4 % 4;
                const int w     = lane%4 * 2;
                int * out = (int *) xs + j*32 + w%4*8 + group*2 + w/4;
                out[0] = words[0];
                out[8] = words[1];
                float * scales = (float *) xs + records*NC*32;
                if (lane % 4 == 0) {
                    scales[j*4 + group] = scale*mbq_layout<QK>::unscale(group);
                }
                if (lane % 8 == 0) {
                    scales[records*NC*4 + j*2 + group/2] = sum;
                }
            }
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
static __device__ __forceinline__ void mbq_group_sync(const int group, const int kw) {
    if (kw == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" : : "r"(group + 1), "r"(kw*32) : "memory");
    }
}

// Adds the sums of the warps of a group, then bias and gate, and stores. NC = 1, 2: sums[warp][row][column]
template <int NC, int MT>
static __device__ __forceinline__ void mbq_store_few(const mbq_mmv_args & args, const float * sums, const int tile, float * dst, const int64_t bias_offset, const int kw) {
    constexpr int n = 16*NC*MT;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = lane; e < n; e += 32) { // row * NC + column
        float v = 0.0f;
        for (int i = 0; i < kw; ++i) {
            v += sums[i*n + e];
        }
        if (args.gate) { // NC = 1: rows 8 to 15 of each 16 are the gate's rows 0 to 7
            float gate    = __shfl_down_sync(n < 32 ? 0xFFFF : 0xFFFFFFFF, v, 8);
            const int row = (tile*MT + e/16)*8 + e % 8;
            if (e % 16 < 8 && row < args.rows) {
                v    += args.bias      ? args.bias     [bias_offset + row] : 0.0f;
                gate += args.gate_bias ? args.gate_bias[bias_offset + row] : 0.0f;
                dst[row] = mbq_glu(args, gate, v);
            }
        } else {
            const int row = tile*MT*16 + e/NC;
            if (row < args.rows) {
                dst[e % NC*args.dst_column + row] = v + (args.bias ? args.bias[bias_offset + row] : 0.0f);
            }
        }
    }
}

// The same for NC = 0: sums[warp][m][n][lane][i] in the order of the C operand
template <int NT, int MT>
static __device__ __forceinline__ void mbq_store_many(const mbq_mmv_args & args, const float * sums, const int tile, float * dst, const int kw) {
    constexpr int n = 128*NT*MT;
    for (int e = threadIdx.x; e < n; e += kw*32) {
        float v = 0.0f;
        for (int i = 0; i < kw; ++i) {
            v += sums[i*n + e];
        }
        const int lane = e/4 % 32;
        const int row  = (tile*MT + e/(128*NT))*16 + lane/4 + e/2 % 2*8;
        const int col  = e/128 % NT*8 + lane % 4*2 + e % 2;
        if (row < args.rows && col < args.columns) {
            dst[col*args.dst_column + row] = v;
        }
    }
}

// One tile's pieces of one warp: sum[m][n][i]
template <int QK, int NC, int NT, int MT>
static __device__ __forceinline__ void mbq_piece(const mbq_mmv_args & args, const char * stage, const mbq_stream<QK, MT> & at, const char * x,
        const int records, float (&sum)[MT][NT][NC == 1 ? 2 : 4]) {
    constexpr int cols = NC == 1 ? 1 : 2;
    const int lane = threadIdx.x % 32;
    const int g = lane / 4;
    const int t = lane % 4;
    const int first = at.piece*mbq_layout<QK>::piece_blocks;
    const int n     = min(args.blocks - first, mbq_layout<QK>::piece_blocks);
    const auto one = [&](const int b) {
        int    a[MT][QK/32][4];
        float2 dm[MT][2];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            const uint32_t * p[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                p[r] = (const uint32_t *) (stage + (m*16 + g + 8*r)*args.stage_row + at.shift[m][r]) + b*mbq_layout<QK>::block_words;
            }
            mbq_unpack<QK>(p, t, a[m], dm[m]);
        }
#pragma unroll
        for (int i = 0; i < NT; ++i) {
            mbq_columns<QK, cols> c;
            if constexpr (NC > 0) {
                c = mbq_columns_shared<QK, NC>(x, records, first + b, g, t);
            } else {
                const char * record = NT == 1 ? stage + MT*16*args.stage_row + b*QK/128*MBQ_RECORD_BYTES : x + ((int64_t) (first + b)*QK/128*NT + i)*MBQ_RECORD_BYTES;
                c = mbq_columns_records<QK>(record, QK == 128 ? 0 : b % 2, lane);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mbq_dot<QK, cols>(a[m], dm[m], c, sum[m][i]);
            }
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

// dst = w * x (NC = 1, 2: columns of float, quantised here; NC = 0: up to 8*NT columns of mbq_quantize_columns).
// Grid: (blocks that share the tiles, channels or slots, samples or tokens).
template <int QK, int NC, int NT, int MT>
static __global__ void __launch_bounds__(32*MBQ_MAX_WARPS, MBQ_MIN_BLOCKS) mbq_mmv(const mbq_mmv_args args) {
#ifdef TURING_MMA_AVAILABLE
    constexpr int cols = NC == 1 ? 1 : 2;
    constexpr int n_sum = mbq_mmv_sum_floats(NC, NT, MT);
    extern __shared__ __align__(16) char mbq_shared[];
    ggml_cuda_pdl_lc();

    const int lane  = threadIdx.x % 32;
    const int g     = lane / 4;
    const int t     = lane % 4;
    const int kw    = threadIdx.x / 32;  // of KW warps that share a tile
    const int KW    = blockDim.x / 32;
    const int group = threadIdx.y;
    const int warp  = group*KW + kw;
    const int warps = blockDim.y*KW;

    const int tile_rows = args.gate ? 8*MT : 16*MT;
    const int tiles     = (args.rows + tile_rows - 1)/tile_rows;
    const int tile_step = gridDim.x*blockDim.y;
    const int pieces    = (args.blocks + mbq_layout<QK>::piece_blocks - 1)/mbq_layout<QK>::piece_blocks;
    const int records   = (args.blocks*QK + 127)/128;
    const int stage_bytes = mbq_stage_bytes(NC, NT, MT, args.stage_row);

    const char  * x   = (const char *) args.x;
    float       * dst = args.dst + blockIdx.y*args.dst_channel + blockIdx.z*args.dst_sample;
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
    if constexpr (NC == 0) {
        x += x_offset*MBQ_RECORD_BYTES;
    }
    const char * w    = args.w + w_offset;
    const char * gate = args.gate ? args.gate + w_offset : nullptr;

    const int x_bytes = (NC*records*152 + 15)/16*16;
    char  * ring = mbq_shared + x_bytes + warp*(MBQ_STAGES*stage_bytes);
    float * sums = (float *) (mbq_shared + x_bytes + warps*(MBQ_STAGES*stage_bytes)) + group*KW*2*n_sum;

    // Weights never depend on the kernel before, so the first copies start while it still runs.
    mbq_stream<QK, MT> next;
    next.tile  = kw < pieces ? blockIdx.x + group*gridDim.x : tiles;
    next.piece = kw;
    if (next.tile < tiles) {
        next.rows_of(args, w, gate, g);
    }
    int filled = 0;
    const auto fill_records = [&](const int piece, char * stage) {
        if constexpr (NC == 0 && NT == 1) {
            const int bytes = min(records - piece*(MBQ_PIECE/128), MBQ_PIECE/128)*MBQ_RECORD_BYTES;
            const char * src = x + piece*(MBQ_PIECE/128*MBQ_RECORD_BYTES);
            for (int i = lane*16; i < bytes; i += 32*16) {
                mbq_copy_16(stage + MT*16*args.stage_row + i, src + i);
            }
        }
    };
    const auto fill = [&](const bool with_records) {
        if (next.tile < tiles) {
            char * stage = ring + filled*stage_bytes;
            next.copy(args, stage, g, t);
            if (with_records) {
                fill_records(next.piece, stage);
            }
            next.piece += KW;
            if (next.piece >= pieces) {
                next.piece = kw;
                next.tile += tile_step;
                if (next.tile < tiles) {
                    next.rows_of(args, w, gate, g);
                }
            }
        }
        filled = filled + 1 == MBQ_STAGES ? 0 : filled + 1;
        mbq_copy_commit();
    };
    const int first_piece = next.piece;
    const bool first_tile = next.tile < tiles;
    static_assert(MBQ_STAGES == 2, "the first fill brings one stage");
    fill(false);

    ggml_cuda_pdl_sync();
    if (first_tile) {
        fill_records(first_piece, ring);
    }
    mbq_copy_commit();
    if constexpr (NC > 0) {
        mbq_quantize_shared<QK, NC>(args, (const float *) x + x_offset, mbq_shared, records, warp, warps);
        __syncthreads();
        x = mbq_shared;
    }

    int stage  = 0;
    int parity = 0;
    mbq_stream<QK, MT> at;
    for (at.tile = blockIdx.x + group*gridDim.x; at.tile < tiles; at.tile += tile_step) {
        at.rows_of(args, w, gate, g);
        float sum[MT][NT][2*cols] = {};
        for (at.piece = kw; at.piece < pieces; at.piece += KW) {
            mbq_copy_wait<0>();
            __syncwarp(); // all lanes' copies are there, and all lanes are done with the stage that is filled next
            fill(true);
            mbq_piece<QK, NC, NT, MT>(args, ring + stage*stage_bytes, at, x, records, sum);
            stage = stage + 1 == MBQ_STAGES ? 0 : stage + 1;
        }

        // Two buffers of sums: a warp that is ahead writes the next tile's while this tile's are read.
        float * all  = sums + parity*KW*n_sum;
        float * mine = all + kw*n_sum;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if constexpr (NC > 0) {
                if (t == 0) {
#pragma unroll
                    for (int i = 0; i < 2*cols; ++i) {
                        mine[(m*16 + g + i/cols*8)*cols + i % cols] = sum[m][0][i];
                    }
                }
            } else {
#pragma unroll
                for (int i = 0; i < NT; ++i) {
                    ((float4 *) mine)[(m*NT + i)*32 + lane] = make_float4(sum[m][i][0], sum[m][i][1], sum[m][i][2], sum[m][i][3]);
                }
            }
        }
        mbq_group_sync(group, KW);
        if constexpr (NC > 0) {
            if (kw == 0) {
                mbq_store_few<NC, MT>(args, all, at.tile, dst, bias_offset, KW);
            }
        } else {
            mbq_store_many<NT, MT>(args, all, at.tile, dst, KW);
        }
        parity ^= 1;
    }
    mbq_copy_wait<0>();
#else
    GGML_UNUSED(args);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}
