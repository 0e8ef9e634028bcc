#pragma once

// Columns of activations in shared memory: int8 with one scale every 32, as Q8_1, in the order of the B operands of mma.m16n8k32.
//
// A record holds 128 activations of NC columns. With one or two columns (the 8 of the B operand then repeat them, so that every lane gets
// results of a real column) all records' words [record][column][t][word t, t + 4 of groups 0 to 3] come first, then the
// scales [record][column][4], then the sums [record][column][2]. With 8, 16 or 32 columns each 8 have a record of their own:
//
//   1024 bytes: [group pair][lane 4*column + t][words t, t + 4 of the first group, then of the second]
//    128 bytes: [t][group][columns 2t, 2t + 1] scales;  64 bytes: [t][half][columns 2t, 2t + 1] sums
//
// A scale includes the power of four that takes back the codes' (mbq_layout::unscale). A sum is that of the quantised activations, over
// the record (QK = 128; both halves hold it) or over its half (QK = 64): it multiplies the minimum. The true sum would double the error:
// that of d * code + m is as large as w, that of d * code alone is larger by the mean code.

#include "mbq-block.cuh"

static constexpr __host__ __device__ int mbq_record_bytes(const int NC) {
    return NC < 8 ? NC*(128 + 16 + 8) : NC/8*(1024 + 128 + 64);
}

#ifdef TURING_MMA_AVAILABLE

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
// power of four), sum of the scaled int8 over the record of 128 (QK = 128) or over its half (QK = 64).
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

// Writes what mbq_quantize_lane made of a pair of records to its places; rec and col are the lane's.
template <int QK, int NC>
static __device__ __forceinline__ void mbq_write_record(char * xs, const int records, const int rec, const int col, const int (&words)[2], const float scale, const float sum) {
    const int lane  = threadIdx.x % 32;
    const int group = lane/4 % 4;
    const int w     = lane%4 * 2; // the lane's words w, w + 1 of the group
    const float unscaled = scale*mbq_layout<QK>::unscale(group);
    if constexpr (NC < 8) {
        const int j = rec*NC + col;
        int * out = (int *) xs + j*32 + w%4*8 + group*2 + w/4;
        out[0] = words[0];
        out[8] = words[1];
        float * scales = (float *) xs + records*NC*32;
        if (lane % 4 == 0) {
            scales[j*4 + group] = unscaled;
        }
        if (lane % 8 == 0) {
            scales[records*NC*4 + j*2 + group/2] = sum;
        }
    } else {
        char * record = xs + (rec*(NC/8) + col/8)*mbq_record_bytes(8);
        const int c = col % 8;
        int * out = (int *) record + group/2*128 + (4*c + w%4)*4 + group%2*2 + w/4;
        out[0] = words[0];
        out[4] = words[1];
        if (lane % 4 == 0) {
            ((float *) (record + 1024))[c/2*8 + group*2 + c%2] = unscaled;
        }
        if (lane % 8 == 0) {
            ((float *) (record + 1152))[c/2*4 + group/2*2 + c%2] = sum;
        }
    }
}

// Activations first.. of all columns, quantised into `records` records of shared memory by all warps of the block. k: length of a column,
// x_column: their distance; columns behind the last are zeros.
template <int QK, int NC>
static __device__ __forceinline__ void mbq_quantize(const float * x, const int first, const int k, const int columns, const int64_t x_column, const bool aligned,
        char * xs, const int records, const int warp, const int warps) {
    constexpr int ahead = 4; // loads of so many rounds are started together: a round's latency is most of its time
    const int lane = threadIdx.x % 32;
    const int n    = (records + 1)/2*NC;
    for (int i0 = warp; i0 < n; i0 += ahead*warps) {
        float v[ahead][8];
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            const int i = i0 + a*warps;
            if (i < n) {
                const int col = i % NC;
                mbq_load_8(v[a], x + col*x_column, first + i/NC*256 + 8*lane, NC <= 2 || col < columns ? k : 0, aligned);
            }
        }
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            const int i = i0 + a*warps;
            if (i < n) {
                int words[2];
                float scale, sum;
                mbq_quantize_lane<QK>(v[a], words, scale, sum);
                const int rec = i/NC*2 + lane/16;
                if (rec < records) {
                    mbq_write_record<QK, NC>(xs, records, rec, i % NC, words, scale, sum);
                }
            }
        }
    }
}

// What a lane needs of 8 columns for one block of weights: B operands, scales and sums of the columns of its C operand.
template <int QK, int cols> struct mbq_columns {
    int   b[QK/32][2];
    float s[QK/32][cols];
    float m[cols];
};

// Columns 8i.. (NC >= 8) for the block of weights with this index in the slice.
template <int QK, int NC>
static __device__ __forceinline__ mbq_columns<QK, NC == 1 ? 1 : 2> mbq_load_columns(const char * xs, const int records, const int block, const int i, const int lane) {
    constexpr int G = QK/32;
    const int g    = lane / 4;
    const int t    = lane % 4;
    const int rec  = block*G/4;
    const int half = G == 4 ? 0 : block % 2;
    mbq_columns<QK, NC == 1 ? 1 : 2> c;
    const char * record = xs + (rec*(NC/8) + i)*mbq_record_bytes(8);
    const int4 * words  = NC < 8 ? (const int4 *) xs + ((rec*NC + g % NC)*4 + t)*2 + half : (const int4 *) record + half*32 + lane;
#pragma unroll
    for (int j = 0; j < G/2; ++j) {
        const int4 v = words[NC < 8 ? j : 32*j];
        c.b[2*j][0] = v.x; c.b[2*j][1] = v.y; c.b[2*j + 1][0] = v.z; c.b[2*j + 1][1] = v.w;
    }
    if constexpr (NC < 8) {
        const float * scales = (const float *) xs + records*NC*32 + rec*NC*4;
        const float * sums   = (const float *) xs + records*NC*36 + rec*NC*2;
#pragma unroll
        for (int j = 0; j < NC; ++j) {
#pragma unroll
            for (int k = 0; k < G/2; ++k) {
                const float2 s = ((const float2 *) scales)[2*j + half + k];
                c.s[2*k][j] = s.x; c.s[2*k + 1][j] = s.y;
            }
            c.m[j] = sums[2*j + half];
        }
    } else {
#pragma unroll
        for (int k = 0; k < G/2; ++k) {
            const float4 s = ((const float4 *) (record + 1024))[t*2 + half + k];
            c.s[2*k][0] = s.x; c.s[2*k][1] = s.y; c.s[2*k + 1][0] = s.z; c.s[2*k + 1][1] = s.w;
        }
        const float2 m = ((const float2 *) (record + 1152))[t*2 + half];
        c.m[0] = m.x; c.m[1] = m.y;
    }
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

#endif // TURING_MMA_AVAILABLE
