#pragma once

// RMS norm times weight, stored as its readers need it: int8 or F16, instead of floats or in addition. Each CTA holds one column in shared memory:
//
//   floats in -> the operation, as ggml's own kernel does it -> column in shared memory, largest |x| -> int8 in the order of mbq-w4a8-quantize.cuh
//
// The bits are those of the separate kernels: the expressions are upstream's (norm.cu, binbcast.cu), with the same compiler options; as many threads sum in the
// same order, or fewer threads that compute the sums of several each; the quantiser is that of mbq_w4a8_quantize.

#include "mbq-w4a8-inputs.cuh"
#include "mbq-w4a8-quantize.cuh"

struct mbq_w4a8_fused_args {
    const float * x;
    const float * y;   // the norm's weight; or the factor of silu(x)
    const float * z;   // added after it; nullptr: nothing
    float * out;       // floats, too; nullptr: they have no reader
    half  * halves;    // F16; nullptr: none
    int64_t x_column, y_column, out_column; // in elements
    float eps;
    int4  * q;         // nullptr: no int8
    float * scale;
    int   * flags;
    int n_flags, K, padded;
    mbq_w4a8_ranges ranges;
};

static __device__ __forceinline__ int mbq_w4a8_bits(const float v) { // of |v|
    return __float_as_int(v) & INT_MAX;
}

// Writes element i of the column to all destinations; amax: this thread's maximum so far
static __device__ __forceinline__ void mbq_w4a8_give(const mbq_w4a8_fused_args & args, float * column, const int i, const float v, int & amax) {
    column[i] = v;
    amax = max(amax, mbq_w4a8_bits(v));
    if (args.out) {
        args.out[blockIdx.x*args.out_column + i] = v;
    }
    if (args.halves) {
        args.halves[blockIdx.x*args.out_column + i] = __float2half(v);
    }
}

// Quantises a column of `padded` floats in shared memory; amax: this thread's maximum. All threads call it.
template <bool tiled>
static __device__ __forceinline__ void mbq_w4a8_quantize_shared(const mbq_w4a8_fused_args & args, float * column, const int amax) {
    __shared__ int largest[32];
    const float range = args.ranges.of(blockIdx.x);
    for (int i = args.K + threadIdx.x; i < args.padded; i += blockDim.x) {
        column[i] = 0.0f;
    }
    const int all = mbq_w4a8_largest(amax, largest, threadIdx.x, blockDim.x); // its barrier completes the column
    const float2 scale = mbq_w4a8_column_scale(mbq_w4a8_amax(range, all));
    if (threadIdx.x == 0) {
        args.scale[blockIdx.x] = scale.y;
    }
    for (int i = threadIdx.x; i < args.padded/16; i += blockDim.x) {
        mbq_w4a8_unit unit;
        unit.load<tiled>(column, i, args.padded, true);
        args.q[mbq_w4a8_unit_at<tiled>(i, blockIdx.x, gridDim.x, args.padded)] = unit.codes(scale.x);
    }
    for (int i = blockIdx.x*blockDim.x + threadIdx.x; i < args.n_flags; i += gridDim.x*blockDim.x) {
        args.flags[i] = 0;
    }
}

// The sums of rms_norm_f32 with `threads` times `parts` threads; each thread here computes those of `parts` threads
template <bool tiled, int threads, int parts>
static __global__ void __launch_bounds__(threads, MBQ_W4A8_CTAS(threads == 256 ? 4 : 2)) mbq_w4a8_norm(const mbq_w4a8_fused_args args) {
    extern __shared__ __align__(16) float mbq_column[];
    __shared__ float sums[32];
    ggml_cuda_pdl_lc();
    const float * x = args.x + blockIdx.x*args.x_column;
    const int lane = threadIdx.x % 32;
    ggml_cuda_pdl_sync();
    for (int i = threadIdx.x; i < args.K; i += threads) {
        mbq_column[i] = x[i];
    }
#pragma unroll
    for (int part = 0; part < parts; ++part) {
        float sum = 0.0f;
        for (int i = part*threads + threadIdx.x; i < args.K; i += parts*threads) {
            const float v = mbq_column[i]; // written by this thread itself
            sum += v * v;
        }
        sum = warp_reduce_sum(sum);
        if (lane == 0) {
            sums[(part*threads + threadIdx.x)/32] = sum;
        }
    }
    __syncthreads();
    const float sum = warp_reduce_sum(lane < parts*threads/32 ? sums[lane] : 0.0f);
    const float mean = sum / args.K;
    const float scale = rsqrtf(mean + args.eps);
    int amax = 0;
    for (int i = threadIdx.x; i < args.K; i += threads) {
        const float v = scale * mbq_column[i] * args.y[i];
        mbq_w4a8_give(args, mbq_column, i, v, amax);
    }
    if (args.q) {
        mbq_w4a8_quantize_shared<tiled>(args, mbq_column, amax);
    }
}

static size_t mbq_w4a8_room(const ggml_backend_cuda_context & ctx) { // maximum bytes of a column in shared memory
    return ggml_cuda_info().devices[ctx.device].smpbo - 512;
}

template <bool tiled, int threads, int parts>
static void mbq_w4a8_launch_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_norm<tiled, threads, parts>), mbq_w4a8_room(ctx));
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(threads), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_norm<tiled, threads, parts>, params, args);
}

// rms_norm_f32_cuda has 1024 threads from K = 1024 on. Here, few columns have as many threads, and many columns a quarter, so that more columns are processed
// at a time.
template <bool tiled>
static void mbq_w4a8_launch_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const auto launch = args.K < 1024 ? &mbq_w4a8_launch_norm<tiled, 256, 1> : &mbq_w4a8_launch_norm<tiled, tiled ? 256 : 1024, tiled ? 4 : 1>;
    launch(ctx, args, columns);
}
