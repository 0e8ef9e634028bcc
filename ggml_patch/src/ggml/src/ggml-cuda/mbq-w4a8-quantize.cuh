#pragma once

// Quantises activations to int8 with one scale per column, in the order of mbq-w4a8-block.cuh. A thread computes units of 16: one 16-byte word.
//
//   tiles (mbq_w4a8_gemm)     [n tile][k tile][column][words in wgmma's 128-byte swizzle], 128 columns and 128 of K: half a group, steps 4(k tile % 2) ...
//                             word 2j + h of a column: k = 16h ... 16h + 15 of step j's B operand
//   records (mbq_w4a8_mmv)    [group][step pair][column][t]: registers 0, 1 of the B operand of lane t, for one step and the next
//
// Both are padded with zeros to whole groups of 256.

#include "mbq-w4a8-block.cuh"

#include <climits>

template <bool tiled>
static __device__ __forceinline__ int mbq_w4a8_unit_k(const int unit, const int i) { // first of 4 activations, i of 4
    const int group = unit/16*256;
    if (tiled) {
        return group + 64*i + unit/8%2*32 + unit%2*16 + unit/2%4*4;
    }
    return group + unit%4*64 + unit/8%2*32 + unit/4%2*8 + i%2*16 + i/2*4;
}

template <bool tiled>
static __device__ __forceinline__ int64_t mbq_w4a8_unit_at(const int unit, const int column, const int columns, const int padded) { // in 16-byte words
    if (tiled) {
        const int64_t tile = (int64_t) (column/128)*(padded/128) + unit/8;
        return (tile*128 + column%128)*8 + (unit%8 ^ column%8);
    }
    return ((int64_t) unit/4*columns + column)*4 + unit%4;
}

// The code, in the lowest byte: after the addition, a float's last bit is worth one, and additions round half to even. A conversion would use a unit with a
// throughput of 16 per clock.
static __device__ __forceinline__ uint32_t mbq_w4a8_code(const float value, const float inverse) {
    return __float_as_uint(__fadd_rn(fmaxf(fminf(mbq_mul_rn(value, inverse), 127.0f), -127.0f), 0x1.8p23f));
}

// pack_two: the lowest bytes of two words, in the lower half of a word; join: two such halves in one word
static __device__ __forceinline__ uint32_t mbq_w4a8_pack_two(const uint32_t a, const uint32_t b) {
    return __byte_perm(a, b, 0x0040);
}
static __device__ __forceinline__ uint32_t mbq_w4a8_join(const uint32_t low, const uint32_t high) {
    return __byte_perm(low, high, 0x5410);
}

static __device__ __forceinline__ uint32_t mbq_w4a8_four_codes(const float4 v, const float inverse) {
    const auto code = [&](const float value) { return mbq_w4a8_code(value, inverse); };
    return mbq_w4a8_join(mbq_w4a8_pack_two(code(v.x), code(v.y)), mbq_w4a8_pack_two(code(v.z), code(v.w)));
}

struct mbq_w4a8_unit {
    float4 v[4];

    template <bool tiled>
    __device__ __forceinline__ void load(const float * x, const int unit, const int K, const bool aligned) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int k = mbq_w4a8_unit_k<tiled>(unit, i);
            v[i] = k >= K ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : aligned ? *(const float4 *) (x + k) : make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
        }
    }

    template <typename F>
    __device__ __forceinline__ void apply() {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = make_float4(F::of(v[i].x), F::of(v[i].y), F::of(v[i].z), F::of(v[i].w));
        }
    }

    // Bits of the maximum of |x|: without their sign bits, floats are ordered as integers
    __device__ __forceinline__ int amax(int most) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int4 bits = *(const int4 *) &v[i];
            most = max(max(most, bits.x & INT_MAX), max(bits.y & INT_MAX, max(bits.z & INT_MAX, bits.w & INT_MAX)));
        }
        return most;
    }

    __device__ __forceinline__ int4 codes(const float inverse) const {
        const auto word = [&](const int i) { return (int) mbq_w4a8_four_codes(v[i], inverse); };
        return make_int4(word(0), word(1), word(2), word(3));
    }
};

static __device__ __forceinline__ int mbq_w4a8_largest_of_warp(int v) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        v = max(v, __shfl_xor_sync(0xFFFFFFFF, v, i));
    }
    return v;
}

// The maximum over a CTA; largest: 32 words of shared memory. All threads call it.
static __device__ __forceinline__ int mbq_w4a8_largest(int amax, int * largest, const int thread, const int threads) {
    amax = mbq_w4a8_largest_of_warp(amax);
    if (thread % 32 == 0) {
        largest[thread/32] = amax;
    }
    __syncthreads();
    return mbq_w4a8_largest_of_warp(thread%32*32 < threads ? largest[thread % 32] : 0);
}

// 127 / amax, and the column's scale
static __device__ __forceinline__ float2 mbq_w4a8_column_scale(const int amax) {
    const float most = amax < __float_as_int(GGML_ROW_SCALE_AMAX_MIN) ? 0.0f : __int_as_float(amax);
    return make_float2(most == 0.0f ? 0.0f : mbq_div_rn(127.0f, most), mbq_div_rn(most, 127.0f));
}

// Static ranges, one per column; 0: none
struct mbq_w4a8_ranges {
    const float * range; // nullptr: none for any column
    int64_t stride;      // in elements

    // Call this early: nothing in this layer has read them yet, so they come from global memory
    __device__ __forceinline__ float of(const int column) const {
        return range ? range[column*stride] : 0.0f;
    }
};

static __device__ __forceinline__ int mbq_w4a8_amax(const float range, const int largest) {
    return range > 0.0f ? __float_as_int(range) : largest;
}

// The rows of a product's src[2]; range is nullptr if it has none
static mbq_w4a8_ranges mbq_w4a8_ranges_of(const ggml_tensor * ranges) {
    return { ranges ? (const float *) ranges->data : nullptr, ranges ? (int64_t) (ranges->nb[1]/sizeof(float)) : 0 };
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_AMPERE
#define MBQ_W4A8_CTAS(n) 1 // a multiprocessor has at most 1024 threads
#else
#define MBQ_W4A8_CTAS(n) n
#endif

struct mbq_w4a8_quantize_args {
    const float * x;
    int4        * q;
    float       * scale;
    int64_t x_column;    // in elements
    int K, padded, aligned;
    int * flags;         // to be cleared
    int n_flags;
    mbq_w4a8_ranges ranges;
};

struct mbq_w4a8_identity {
    static __device__ __forceinline__ float of(const float x) { return x; }
};

// One CTA per column, which reads it once, R units per thread. With one unit per thread and two CTAs per multiprocessor, 512 columns of 14336 take 7.9 us and
// 4096 take 97 us, the time that reading and writing them takes. Through shared memory with bulk copies: 10.6 and 102 us. F is applied to x first; F(0) = 0.
template <bool tiled, int R, int threads, int ctas, typename F = mbq_w4a8_identity>
static __global__ void __launch_bounds__(threads, MBQ_W4A8_CTAS(ctas)) mbq_w4a8_quantize(const mbq_w4a8_quantize_args args) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const int column = blockIdx.x;
    for (int i = blockIdx.x*blockDim.x + threadIdx.x; i < args.n_flags; i += gridDim.x*blockDim.x) {
        args.flags[i] = 0;
    }
    const float range = args.ranges.of(column);
    mbq_w4a8_unit unit[R];
    int amax = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        unit[r].template load<tiled>(args.x + column*args.x_column, r*blockDim.x + threadIdx.x, args.K, args.aligned);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        unit[r].template apply<F>();
        amax = unit[r].amax(amax);
    }
    __shared__ int largest[32];
    const float2 scale = mbq_w4a8_column_scale(mbq_w4a8_amax(range, mbq_w4a8_largest(amax, largest, threadIdx.x, blockDim.x)));
    if (threadIdx.x == 0) {
        args.scale[column] = scale.y;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int i = r*blockDim.x + threadIdx.x;
        if (i < args.padded/16) {
            args.q[mbq_w4a8_unit_at<tiled>(i, column, gridDim.x, args.padded)] = unit[r].codes(scale.x);
        }
    }
}
