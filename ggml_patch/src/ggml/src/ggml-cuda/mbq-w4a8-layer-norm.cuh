#pragma once

// LayerNorm times weight plus bias, stored as its readers need it: int8 or F16, instead of floats or in addition (see mbq-w4a8-norm.cuh). Two kernels:
// one has a CTA per column; the other, for columns of vision towers that are read as int8, has a warp per column, in registers, without barriers:
//
//   x[32j + lane] -> sums over lanes, all j at once -> mean, deviation -> normed, largest |x| -> int8 through shared memory

#include "mbq-w4a8-norm.cuh"

// norm_f32 sums a column with 32 threads, or with 1024 (many) from K = 1024 on. This kernel has 256 threads: in the first case, each warp computes the same sum
// as those 32; in the second, each thread computes the sums of four of those 1024.
template <bool tiled, bool many>
static __global__ void __launch_bounds__(256, MBQ_W4A8_CTAS(4)) mbq_w4a8_layer_norm(const mbq_w4a8_fused_args args) {
    extern __shared__ __align__(16) float mbq_column[];
    __shared__ float2 sums[32];
    ggml_cuda_pdl_lc();
    const float * x = args.x + blockIdx.x*args.x_column;
    const int lane = threadIdx.x % 32;
    const auto add = [](float2 & sum, const float xi) {
        sum.x += xi;
        sum.y += xi * xi;
    };
    ggml_cuda_pdl_sync();
    for (int i = threadIdx.x; i < args.K; i += 256) {
        mbq_column[i] = x[i];
    }
    float2 mean_var = make_float2(0.0f, 0.0f);
    if constexpr (many) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            float2 sum = make_float2(0.0f, 0.0f);
            for (int i = part*256 + threadIdx.x; i < args.K; i += 1024) {
                add(sum, mbq_column[i]); // written by this thread itself
            }
            sum = warp_reduce_sum(sum);
            if (lane == 0) {
                sums[part*8 + threadIdx.x/32] = sum;
            }
        }
        __syncthreads();
        mean_var = sums[lane];
    } else {
        __syncthreads();
        for (int i = lane; i < args.K; i += 32) {
            add(mean_var, mbq_column[i]);
        }
        __syncthreads(); // before the column changes
    }
    mean_var = warp_reduce_sum(mean_var);
    const float mean    = mean_var.x / args.K;
    const float var     = mean_var.y / args.K - mean * mean;
    const float inv_std = rsqrtf(var + args.eps);
    int amax = 0;
    for (int i = threadIdx.x; i < args.K; i += 256) {
        float v = __fmul_rn((mbq_column[i] - mean) * inv_std, args.y[i]);
        if (args.z) {
            v = __fadd_rn(v, args.z[i]);
        }
        mbq_w4a8_give(args, mbq_column, i, v, amax);
    }
    if (args.q) {
        mbq_w4a8_quantize_shared<tiled>(args, mbq_column, amax);
    }
}

static constexpr int MBQ_LAYER_NORM_WARPS = 4;

// The sum of f(x) over a column that a warp holds, v[j] being elements 128j + 4 lane and the next three, in the order of norm_f32 with 1024 threads. There,
// thread 32w + p sums f(x[32w + p]) and f(x[1024 + 32w + p]), then each warp sums over its threads, then one warp over these sums. Here, eight lanes hold the
// elements of warps 4j + lane/8, for eight j at once; each step halves a lane's number of j, so that lane 8g + j ends with the sum of warp 4j + g.
template <int R, typename F>
static __device__ __forceinline__ float mbq_w4a8_sum_as_1024(const float4 (&v)[R], const F & f) {
    const int lane = threadIdx.x % 32;
    const auto of_threads = [&](const int j) {
        float4 sum = make_float4(f(v[j].x, 0.0f), f(v[j].y, 0.0f), f(v[j].z, 0.0f), f(v[j].w, 0.0f));
        if (j + 8 < R) {
            sum = make_float4(f(v[j + 8].x, sum.x), f(v[j + 8].y, sum.y), f(v[j + 8].z, sum.z), f(v[j + 8].w, sum.w));
        }
        return sum;
    };
    const auto halve = [&](const float4 low, const float4 high, const int h) { // lanes with bit h continue with `high`
        const bool up = lane & h;
        const auto one = [&](const float a, const float b) { return (up ? b : a) + __shfl_xor_sync(0xFFFFFFFF, up ? a : b, h); };
        return make_float4(one(low.x, high.x), one(low.y, high.y), one(low.z, high.z), one(low.w, high.w));
    };
    float4 sums[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        sums[j] = halve(of_threads(j), of_threads(j + 4), 4);
    }
    sums[0] = halve(sums[0], sums[2], 2);
    sums[1] = halve(sums[1], sums[3], 2);
    sums[0] = halve(sums[0], sums[1], 1);
    float sum = (sums[0].x + sums[0].z) + (sums[0].y + sums[0].w);
    for (const int h : { 4, 2, 1, 16, 8 }) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, h);
    }
    return sum;
}

// mbq_w4a8_layer_norm for 1024 to 128*R elements, a multiple of 128, with int8 as tiles; all its inputs are loaded as 16-byte words
template <int R>
static __global__ void __launch_bounds__(32*MBQ_LAYER_NORM_WARPS) mbq_w4a8_layer_norm_of_warp(const mbq_w4a8_fused_args args, const int columns) {
    __shared__ __align__(16) int codes[MBQ_LAYER_NORM_WARPS][GGML_PAD(32*R, 64)];
    ggml_cuda_pdl_lc();
    const int lane   = threadIdx.x % 32;
    const int column = blockIdx.x*MBQ_LAYER_NORM_WARPS + threadIdx.x/32;
    const int rows   = args.K/128;
    ggml_cuda_pdl_sync();
    for (int i = blockIdx.x*blockDim.x + threadIdx.x; i < args.n_flags; i += gridDim.x*blockDim.x) {
        args.flags[i] = 0;
    }
    if (column >= columns) {
        return;
    }
    const float range = args.ranges.of(column);
    const float4 * x = (const float4 *) (args.x + column*args.x_column) + lane;
    float4 v[R];
#pragma unroll
    for (int j = 0; j < R; ++j) {
        v[j] = j < 8 || j < rows ? x[32*j] : make_float4(0.0f, 0.0f, 0.0f, 0.0f); // does not change any sum
    }
    const float mean_sum = mbq_w4a8_sum_as_1024(v, [](const float xi, const float sum) { return sum + xi; });
    const float var_sum  = mbq_w4a8_sum_as_1024(v, [](const float xi, const float sum) { return sum + xi * xi; });
    const float mean    = mean_sum / args.K;
    const float var     = var_sum / args.K - mean * mean;
    const float inv_std = rsqrtf(var + args.eps);
    int amax = 0;
#pragma unroll
    for (int j = 0; j < R; ++j) {
        if (j < 8 || j < rows) {
            const float4 y = ((const float4 *) args.y)[32*j + lane];
            const auto normed = [&](const float xi, const float yi) { return __fmul_rn((xi - mean) * inv_std, yi); };
            v[j] = make_float4(normed(v[j].x, y.x), normed(v[j].y, y.y), normed(v[j].z, y.z), normed(v[j].w, y.w));
            if (args.z) {
                const float4 z = ((const float4 *) args.z)[32*j + lane];
                v[j] = make_float4(__fadd_rn(v[j].x, z.x), __fadd_rn(v[j].y, z.y), __fadd_rn(v[j].z, z.z), __fadd_rn(v[j].w, z.w));
            }
            if (args.out) {
                ((float4 *) (args.out + column*args.out_column))[32*j + lane] = v[j];
            }
        }
        amax = max(amax, max(max(mbq_w4a8_bits(v[j].x), mbq_w4a8_bits(v[j].y)), max(mbq_w4a8_bits(v[j].z), mbq_w4a8_bits(v[j].w))));
    }
    const float2 scale = mbq_w4a8_column_scale(mbq_w4a8_amax(range, mbq_w4a8_largest_of_warp(amax)));
    if (lane == 0) {
        args.scale[column] = scale.y;
    }
    int * code = codes[threadIdx.x/32];
#pragma unroll
    for (int j = 0; j < GGML_PAD(R, 2); ++j) {
        code[32*j + lane] = j < R ? mbq_w4a8_four_codes(v[j], scale.x) : 0; // elements of v after K are 0
    }
    __syncwarp();
    for (int unit = lane; unit < args.padded/16; unit += 32) {
        int word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = code[mbq_w4a8_unit_k<true>(unit, i)/4];
        }
        args.q[mbq_w4a8_unit_at<true>(unit, column, columns, args.padded)] = make_int4(word[0], word[1], word[2], word[3]);
    }
}

template <int R>
static void mbq_w4a8_launch_layer_norm_of_warp(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const dim3 ctas((columns + MBQ_LAYER_NORM_WARPS - 1)/MBQ_LAYER_NORM_WARPS);
    ggml_cuda_kernel_launch(mbq_w4a8_layer_norm_of_warp<R>, ggml_cuda_kernel_launch_params(ctas, dim3(32*MBQ_LAYER_NORM_WARPS), 0, ctx.stream()), args, columns);
}

template <bool tiled>
static void mbq_w4a8_launch_layer_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const bool words = ((uintptr_t) args.x | (uintptr_t) args.y | (uintptr_t) args.z | (uintptr_t) args.out | args.x_column*sizeof(float)) % 16 == 0;
    if (tiled && args.q && args.K >= 1024 && args.K <= 1536 && args.K % 128 == 0 && words) {
        const auto of_warp = args.K <= 1280 ? &mbq_w4a8_launch_layer_norm_of_warp<10> : &mbq_w4a8_launch_layer_norm_of_warp<12>;
        of_warp(ctx, args, columns);
        return;
    }
    const auto kernel = args.K < 1024 ? &mbq_w4a8_layer_norm<tiled, false> : &mbq_w4a8_layer_norm<tiled, true>; // as in norm_f32_cuda
    if (args.K < 1024) {
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_layer_norm<tiled, false>), mbq_w4a8_room(ctx));
    } else {
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_layer_norm<tiled, true>), mbq_w4a8_room(ctx));
    }
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(256), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(kernel, params, args);
}
