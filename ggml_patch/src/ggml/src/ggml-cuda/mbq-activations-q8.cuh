#pragma once

// Quantises columns of activations for the int8 tensor cores: int8 with one scale per 32, as in Q8_1, in the order of mma.m16n8k32's B operand.
//
// A single column is quantised by the multiplying kernel itself, in shared memory. 256 activations are 8 groups of 32, which become the 8 columns of the B
// operand. Each group of weights is multiplied by all of them, and lane 4g + t keeps the products of groups 2t and 2t + 1 with their own activations:
//
//   [256 activations][lane 4*group + t][words t, t + 4 of the group], then [256 activations][t][scales of groups 2t, 2t + 1, their sum, -],
//   or their two sums if each group of weights has its own minimum (MBQ3S_64)
//
// More columns are quantised by a separate kernel, in records of 8 columns and 128 activations:
//
//   1024 bytes: [group pair][lane 4*column + t][words t, t + 4 of the first group, then of the second]
//    128 bytes: [t][group][columns 2t, 2t + 1] scales;  64 bytes: [t][64][columns 2t, 2t + 1] sums, or 128: [t][group][...] (MBQ3S_64)
//
// A scale includes the inverse of the codes' power of four (mbq_layout::unscale). A group's minimum m is multiplied by a sum of 64 activations, even in groups
// of 128, or of 32 (MBQ3S_64). The sum is over rounded activations, so that the rounding error of an activation is multiplied by the whole weight, d*code + m.
// With the exact sum it would be multiplied by d*code alone, which is larger.

#include "mbq-block.cuh"

// Records of 8 columns
template <typename L> struct mbq_record {
    static constexpr int span  = L::QK/L::scales == 32 ? 32 : 64; // activations per sum, which share a minimum
    static constexpr int sums  = span == 32 ? 4 : 2;         // per column
    static constexpr int bytes = 1024 + 128 + 8*4*sums;
};

static constexpr int MBQ_ONE_BYTES = 256 + 64; // per 256 activations of a single column

#ifdef TURING_MMA_AVAILABLE

// Lane 4q + t of a warp loads 4t..4t+3 and 16+4t..16+4t+3 of group q of 256 activations: x points at the first of them, and `left`
// (a multiple of 32) is their number from the start of this group; zeros after the end.
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

// Quantises the values of mbq_load_8. Returns the lane's two words; in all four lanes of a group its scale (without the power of four); and in the
// lanes of N activations their sum.
template <int N>
static __device__ __forceinline__ int2 mbq_quantize_8(const float (&v)[8], float & scale, float & sum) {
    float amax = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < 8; ++i) {
        amax = fmaxf(amax, fabsf(v[i]));
    }
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFF, amax, 2));
    scale = amax*(1.0f/127.0f);
    const float inverse = __fdividef(127.0f, fmaxf(amax, 1e-30f)); // smaller ones would overflow, and are negligible
    const int2 words = make_int2(mbq_pack_4(v, inverse), mbq_pack_4(v + 4, inverse));
    sum = scale*(float) ggml_cuda_dp4a(words.x, 0x01010101, ggml_cuda_dp4a(words.y, 0x01010101, 0));
#pragma unroll
    for (int i = 1; i < N/8; i *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, i);
    }
    return words;
}

// One column of k activations, by all warps of the block.
template <typename L>
static __device__ __forceinline__ void mbq_quantize_one(const float * x, const int k, const bool aligned, char * xs, const int warp, const int warps) {
    constexpr int ahead = 4; // rounds whose loads start together, because latency is most of a round's time
    constexpr int span  = mbq_record<L>::span;
    const int lane  = threadIdx.x % 32;
    const int n     = (k + 255)/256;
    float   * sums  = (float *) (xs + n*256) + lane/8*4;
    const float unscale = L::unscale(lane/4 % 4);
    x += warp*256 + lane/4*32 + lane%4*4;
    int left = k - warp*256 - lane/4*32;
    for (int p0 = warp; p0 < n; p0 += ahead*warps) {
        float v[ahead][8];
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            mbq_load_8(v[a], x, left, aligned);
            x    += warps*256;
            left -= warps*256;
        }
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
            const int p = p0 + a*warps;
            if (p >= n) {
                break;
            }
            float scale, sum;
            ((int2 *) xs)[p*32 + lane] = mbq_quantize_8<span>(v[a], scale, sum);
            if (lane % 4 == 0) {
                sums[p*16 + lane/4 % 2] = scale*unscale;
            }
            if (lane % (span/8) == 0) {
                sums[p*16 + (span == 64 ? 2 : 2 + lane/4 % 2)] = sum;
            }
        }
    }
}

#endif // TURING_MMA_AVAILABLE

// Records of 8 columns each in global memory. One CTA of 8 warps writes two of them: grid (pairs, columns/8, channels*samples).
template <typename L>
static __global__ void mbq_quantize_records(const float * x, char * records, const int k, const int N, const int64_t x_column,
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
    mbq_load_8(v, x, col < N ? k - first : 0, aligned);
    const int2 words = mbq_quantize_8<mbq_record<L>::span>(v, scale, sum);
    if (rec >= n) {
        return;
    }
    char * record = records + (((int64_t) blockIdx.z*n + rec)*gridDim.y + blockIdx.y)*mbq_record<L>::bytes;
    ((int2 *) record)[group/2*64 + (4*c + lane%4)*2 + group%2] = words;
    if (lane % 4 == 0) {
        ((float *) (record + 1024))[c/2*8 + group*2 + c%2] = scale*L::unscale(group);
    }
    constexpr int sums = mbq_record<L>::sums;
    if (lane % (16/sums) == 0) {
        ((float *) (record + 1152))[c/2*(2*sums) + group/(4/sums)*2 + c%2] = sum;
    }
#else
    GGML_UNUSED_VARS(x, records, k, N, x_column, x_channel, x_sample, channels, aligned);
    NO_DEVICE_CODE;
#endif // TURING_MMA_AVAILABLE
}

#ifdef TURING_MMA_AVAILABLE

// sum[r] += row g + 8r of 256 weights, from block `first` of the row pieces at p[r], times one column: this lane's groups 2t and 2t + 1.
// Blocks after `last` repeat it: their activations are zeros.
template <typename L>
static __device__ __forceinline__ void mbq_dot_one(const uint32_t * const (&p)[2], const int first, const int last,
        const char * words, const char * sums, float (&sum)[2]) {
    constexpr int G    = L::QK/32;
    constexpr int step = L::block_words;
    const int  lane = threadIdx.x % 32;
    const int  t    = lane % 4;
    const int2 x    = ((const int2 *) words)[lane];
    const int b[2]  = { x.x, x.y };
    int d[4];
#pragma unroll
    for (int u = 0; u < 8/G; ++u) {
        const int at = min(first + u, last)*step;
        const uint32_t * const block[2] = { p[0] + at, p[1] + at };
        int a[G][4];
        mbq_unpack<L::QK>(block, t, a);
#pragma unroll
        for (int j = 0; j < G; j += 2) {
            int even[4], odd[4];
            mbq_mma(even, a[j],     b);
            mbq_mma(odd,  a[j + 1], b);
            if (u + j == 0 || t == (u*G + j)/2) {
                d[0] = even[0]; d[1] = odd[1]; d[2] = even[2]; d[3] = odd[3];
            }
        }
    }
    const float4 s = ((const float4 *) sums)[t];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t * const block = p[r] + min(first + t*2/G, last)*step;
        const float  f0 = __int_as_float(d[2*r])     - __int_as_float(MBQ_MAGIC);
        const float  f1 = __int_as_float(d[2*r + 1]) - __int_as_float(MBQ_MAGIC);
        if constexpr (mbq_record<L>::span == 32) {
            mbq_add<L>(sum[r], mbq_scale<L>(*block, 0), f0*s.x, s.z);
            mbq_add<L>(sum[r], mbq_scale<L>(*block, 1), f1*s.y, s.w);
        } else { // both groups have the same minimum
            const uint32_t word = L::scales == 1 ? *block : ((const uint16_t *) block)[t % 2];
            mbq_add<L>(sum[r], mbq_scale<L>(word, 0), fmaf(f1, s.y, f0*s.x), s.z);
        }
    }
}

// A lane's share of 8 columns for one block of weights: B operands, and scales and sums of the columns of its C operand.
template <typename L> struct mbq_b_operand {
    int    b[L::QK/32][2];
    float2 s[L::QK/32];
    static constexpr int spans = L::QK/mbq_record<L>::span;
    struct __align__(8*spans) {
        float2 of[spans];
    } m;
};

// From a record of mbq_quantize_records; for QK = 64, its first or second 64
template <typename L>
static __device__ __forceinline__ mbq_b_operand<L> mbq_load_record(const char * record, const int which, const int lane) {
    const int t = lane % 4;
    mbq_b_operand<L> c;
#pragma unroll
    for (int j = 0; j < L::QK/64; ++j) {
        const int4   v = ((const int4 *) record)[(j + which)*32 + lane];
        const float4 s = ((const float4 *) (record + 1024))[t*2 + j + which];
        c.b[2*j][0] = v.x; c.b[2*j][1] = v.y; c.b[2*j + 1][0] = v.z; c.b[2*j + 1][1] = v.w;
        c.s[2*j] = make_float2(s.x, s.y);
        c.s[2*j + 1] = make_float2(s.z, s.w);
    }
    c.m = ((const decltype(c.m) *) (record + 1152))[t*mbq_record<L>::sums/c.spans + which];
    return c;
}

// sum += rows g, g + 8 of one block times 8 columns. sum[][r*2 + c]: row g + 8r, column 2t + c. Each 64 weights have separate sums, starting at `first`
// (apart), or the whole block shares them.
template <typename L, bool apart, int n>
static __device__ __forceinline__ void mbq_dot(const int (&a)[L::QK/32][4], const float2 (&scale)[2][L::scales], const mbq_b_operand<L> & x,
        float (&sum)[n][4], const int first) {
    constexpr int spans  = mbq_b_operand<L>::spans;
    constexpr int parts  = apart ? spans : L::scales;
    constexpr int groups = L::QK/32/parts;
#pragma unroll
    for (int h = 0; h < parts; ++h) {
        float part[4] = {};
#pragma unroll
        for (int j = h*groups; j < (h + 1)*groups; ++j) {
            int d[4];
            mbq_mma(d, a[j], x.b[j]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float f = __int_as_float(d[i]) - __int_as_float(MBQ_MAGIC);
                const float s = i % 2 ? x.s[j].y : x.s[j].x;
                part[i] = fmaf(f, s, part[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float m = i % 2 ? x.m.of[h].y : x.m.of[h].x;
            if constexpr (parts < spans) { // one minimum for all
                m += i % 2 ? x.m.of[1].y : x.m.of[1].x;
            }
            mbq_add<L>(sum[first + (apart ? h*groups/2 : 0)][i], scale[i/2][L::scales == 1 ? 0 : h], part[i], m);
        }
    }
}

#endif // TURING_MMA_AVAILABLE
