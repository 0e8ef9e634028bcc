#pragma once

// Columns of activations as the int8 tensor cores want them: int8 with one scale every 32, as Q8_1, in the order of mma.m16n8k32's B operand.
//
// A record holds 128 activations. Up to two columns lie in shared memory, where the kernel quantises them itself (the 8 columns of the B
// operand repeat them, so that every lane gets results of a real column), records rounded up to an even number:
//
//   [record][column][t][group][words t, t + 4 of the group], then scales [record][column][group], then sums [record][column][half]
//
// More columns are quantised by a kernel of its own, 8 columns a record:
//
//   1024 bytes: [group pair][lane 4*column + t][words t, t + 4 of the first group, then of the second]
//    128 bytes: [t][group][columns 2t, 2t + 1] scales;  64 bytes: [t][half][columns 2t, 2t + 1] sums
//
// A scale includes the power of four that takes back the codes' (mbq_layout::unscale). A sum is that of the quantised activations, over
// the record (QK = 128; both halves hold it) or over its half (QK = 64): it multiplies the minimum. The true sum would make the error
// larger: what is left over of an activation then meets d * code instead of the smaller d * code + m.

#include "mbq-block.cuh"

static constexpr int MBQ_RECORD_BYTES = 1024 + 128 + 64; // of 8 columns

// Bytes of a pair of records of NC = 1, 2 columns in shared memory
static constexpr __host__ __device__ int mbq_pair_bytes(const int NC) {
    return 2*NC*(128 + 16 + 8);
}

#ifdef TURING_MMA_AVAILABLE

// Lane 4q + t of a warp loads 4t..4t+3 and 16+4t..16+4t+3 of group q of 256 activations: x points at the first of them, and `left`
// (a multiple of 32) tells how many there are from this group's begin; zeros behind the end.
static __device__ __forceinline__ void mbq_load_8(float (&v)[8], const float * x, const int left, const bool aligned) {
    if (left <= 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = 0.0f;
        }
    } else if (aligned) {
        *(float4 *) (v + 0) = *(const float4 *) (x);
        *(float4 *) (v + 4) = *(const float4 *) (x + 16);
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            v[j]     = x[j];
            v[j + 4] = x[j + 16];
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

// Quantises what mbq_load_8 loaded: the lane's two words; in all four lanes of a group its scale (without the power of four); in the
// lanes of a record (QK = 128) or its half (QK = 64) the sum of the scaled int8.
template <int QK>
static __device__ __forceinline__ int2 mbq_quantize_8(const float (&v)[8], float & scale, float & sum) {
    float amax = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) {
        amax = fmaxf(amax, fabsf(v[i]));
    }
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, 2));
    scale = amax*(1.0f/127.0f);
    const float inverse = __fdividef(127.0f, fmaxf(amax, 1e-30f)); // smaller ones would overflow, and are nothing
    const int2 words = make_int2(mbq_pack_4(v, inverse), mbq_pack_4(v + 4, inverse));
    sum = scale*(float) ggml_cuda_dp4a(words.x, 0x01010101, ggml_cuda_dp4a(words.y, 0x01010101, 0));
#pragma unroll
    for (int i = 1; i < QK/8; i *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, i);
    }
    return words;
}

// All columns of a product with NC = 1, 2, by all warps of the block.
template <int QK, int NC>
static __device__ __forceinline__ void mbq_quantize_shared(const float * x, const int k, const int64_t x_column, const bool aligned, char * xs, const int warp, const int warps) {
    constexpr int ahead = 4; // loads of so many rounds are started together: a round's latency is most of its time
    const int lane  = threadIdx.x % 32;
    const int group = lane/4 % 4;
    const int pairs = (k + 255)/256;
    int   * words  = (int   *) xs + lane/16*(NC*32) + lane%4*8 + group*2;
    float * scales = (float *) xs + pairs*(NC*64) + lane/16*(NC*4) + group;
    float * sums   = (float *) xs + pairs*(NC*72) + lane/16*(NC*2) + group/2;
    const float unscale = mbq_layout<QK>::unscale(group);
#pragma unroll
    for (int c = 0; c < NC; ++c) {
        const float * from = x + c*x_column + warp*256 + lane/4*32 + lane%4*4;
        int left = k - warp*256 - lane/4*32;
        for (int p0 = warp; p0 < pairs; p0 += ahead*warps) {
            float v[ahead][8];
#pragma unroll
            for (int a = 0; a < ahead; ++a) {
                mbq_load_8(v[a], from, left, aligned);
                from += warps*256;
                left -= warps*256;
            }
#pragma unroll
            for (int a = 0; a < ahead; ++a) {
                const int p = p0 + a*warps;
                if (p >= pairs) {
                    break;
                }
                float scale, sum;
                *(int2 *) (words + p*(NC*64) + c*32) = mbq_quantize_8<QK>(v[a], scale, sum);
                if (lane % 4 == 0) {
                    scales[p*(NC*8) + c*4] = scale*unscale;
                }
                if (lane % 8 == 0) {
                    sums[p*(NC*4) + c*2] = sum;
                }
            }
        }
    }
}

#endif // TURING_MMA_AVAILABLE

// Records of 8 columns each in global memory. One block of 8 warps writes two of them: grid (pairs, columns/8, channels*samples).
template <int QK>
static __global__ void mbq_quantize_columns(const float * x, char * records, const int k, const int columns, const int64_t x_column,
        const int64_t x_channel, const int64_t x_sample, const int channels, const int aligned) {
#ifdef TURING_MMA_AVAILABLE
    ggml_cuda_pdl_lc();
    const int lane  = threadIdx.x % 32;
    const int group = lane/4 % 4;
    const int c     = threadIdx.x / 32;
    const int col   = blockIdx.y*8 + c;
    const int n     = (k + 127)/128;
    const int rec   = blockIdx.x*2 + lane/16;
    const int first = blockIdx.x*256 + lane/4*32;
    x += blockIdx.z/channels*x_sample + blockIdx.z%channels*x_channel + col*x_column + first + lane%4*4;
    ggml_cuda_pdl_sync();

    float v[8], scale, sum;
    mbq_load_8(v, x, col < columns ? k - first : 0, aligned);
    const int2 words = mbq_quantize_8<QK>(v, scale, sum);
    if (rec >= n) {
        return;
    }
    char * record = records + (((int64_t) blockIdx.z*n + rec)*gridDim.y + blockIdx.y)*MBQ_RECORD_BYTES;
    ((int2 *) record)[group/2*64 + (4*c + lane%4)*2 + group%2] = words;
    if (lane % 4 == 0) {
        ((float *) (record + 1024))[c/2*8 + group*2 + c%2] = scale*mbq_layout<QK>::unscale(group);
    }
    if (lane % 8 == 0) {
        ((float *) (record + 1152))[c/2*4 + group/2*2 + c%2] = sum;
    }
#else
    GGML_UNUSED_VARS(x, records, k, columns, x_column, x_channel, x_sample, channels, aligned);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}

#ifdef TURING_MMA_AVAILABLE

// What a lane needs of 8 columns for one block of weights: B operands, scales and sums of the columns of its C operand.
template <int QK, int cols> struct mbq_columns {
    int   b[QK/32][2];
    float s[QK/32][cols];
    float m[cols];
};

// NC = 1, 2: from what mbq_quantize_shared wrote, for the block of weights with this index in the row
template <int QK, int NC>
static __device__ __forceinline__ mbq_columns<QK, NC> mbq_columns_shared(const char * xs, const int pairs, const int block, const int g, const int t) {
    constexpr int G = QK/32;
    const int rec  = block*G/4;
    const int half = G == 4 ? 0 : block % 2;
    const int4   * words  = (const int4   *) xs + ((rec*NC + g%NC)*4 + t)*2 + half;
    const float2 * scales = (const float2 *) ((const float *) xs + pairs*(NC*64)) + rec*(NC*2) + half;
    const float  * sums   = (const float  *) xs + pairs*(NC*72) + rec*(NC*2) + half;
    mbq_columns<QK, NC> c;
#pragma unroll
    for (int j = 0; j < G/2; ++j) {
        const int4 v = words[j];
        c.b[2*j][0] = v.x; c.b[2*j][1] = v.y; c.b[2*j + 1][0] = v.z; c.b[2*j + 1][1] = v.w;
    }
#pragma unroll
    for (int j = 0; j < NC; ++j) {
        if constexpr (G == 4) {
            const float4 s = *(const float4 *) (scales + 2*j);
            c.s[0][j] = s.x; c.s[1][j] = s.y; c.s[2][j] = s.z; c.s[3][j] = s.w;
        } else {
            const float2 s = scales[2*j];
            c.s[0][j] = s.x; c.s[1][j] = s.y;
        }
        c.m[j] = sums[2*j];
    }
    return c;
}

// From a record of mbq_quantize_columns; half: of the record, for QK = 64
template <int QK>
static __device__ __forceinline__ mbq_columns<QK, 2> mbq_columns_record(const char * record, const int half, const int lane) {
    constexpr int G = QK/32;
    const int t = lane % 4;
    mbq_columns<QK, 2> c;
#pragma unroll
    for (int j = 0; j < G/2; ++j) {
        const int4   v = ((const int4 *) record)[(j + half)*32 + lane];
        const float4 s = ((const float4 *) (record + 1024))[t*2 + j + half];
        c.b[2*j][0] = v.x; c.b[2*j][1] = v.y; c.b[2*j + 1][0] = v.z; c.b[2*j + 1][1] = v.w;
        c.s[2*j][0] = s.x; c.s[2*j][1] = s.y; c.s[2*j + 1][0] = s.z; c.s[2*j + 1][1] = s.w;
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

#endif // TURING_MMA_AVAILABLE
