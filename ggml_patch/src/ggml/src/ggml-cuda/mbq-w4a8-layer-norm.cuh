#pragma once

// LayerNorm times weight plus bias with what its readers take instead of floats, or too: int8, or F16 (see mbq-w4a8-norm.cuh). Two kernels: one CTA a column; or, of
// columns as long as towers have them and read as int8, one warp, which holds the column in registers and waits for no other:
//
//   x[32j + lane] -> sums over lanes, all j at once -> mean, deviation -> normed, largest |x| -> int8 through shared memory

#include "mbq-w4a8-norm.cuh"

// See norm_f32: sums of a column by 32 threads, or by 1024 (many) from K = 1024 on. Here 256 threads: the first in each warp alike, the other with
// four of those threads' sums in each.
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
                add(sum, mbq_column[i]); // this thread's own
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

// As mbq_w4a8_layer_norm of 1024 to 32*R numbers, a multiple of 32, int8 as tiles. norm_f32 has 1024 threads, of which number 32w + lane sums x[32w + lane] and
// x[1024 + 32w + lane], then 32 warps' sums, then the sum of these. Here the lanes sum for all of these warps together: lane w ends with the sum of warp w.
template <int R>
static __global__ void __launch_bounds__(32*MBQ_LAYER_NORM_WARPS) mbq_w4a8_layer_norm_of_warp(const mbq_w4a8_fused_args args, const int columns) {
    __shared__ __align__(16) uint8_t codes[MBQ_LAYER_NORM_WARPS][GGML_PAD(32*R, 256)];
    ggml_cuda_pdl_lc();
    const int lane   = threadIdx.x % 32;
    const int column = blockIdx.x*MBQ_LAYER_NORM_WARPS + threadIdx.x/32;
    const int rows   = args.K/32;
    ggml_cuda_pdl_sync();
    for (int i = blockIdx.x*blockDim.x + threadIdx.x; i < args.n_flags; i += gridDim.x*blockDim.x) {
        args.flags[i] = 0;
    }
    if (column >= columns) {
        return;
    }
    const float * x = args.x + column*args.x_column + lane;
    float v[R];
#pragma unroll
    for (int j = 0; j < R; ++j) {
        v[j] = j < 32 || j < rows ? x[32*j] : -0.0f; // which changes no sum
    }
    const auto of_thread = [&](const int w) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int j = w; j < R; j += 32) {
            sum.x += v[j];
            sum.y += v[j] * v[j];
        }
        return sum;
    };
    const auto halve = [&](const float2 low, const float2 high, const int h) { // of two warps: lanes with bit h go on with `high`
        const bool up = lane & h;
        const float2 keep = up ? high : low, give = up ? low : high;
        return make_float2(keep.x + __shfl_xor_sync(0xFFFFFFFF, give.x, h), keep.y + __shfl_xor_sync(0xFFFFFFFF, give.y, h));
    };
    float2 sums[16];
#pragma unroll
    for (int w = 0; w < 16; ++w) {
        sums[w] = halve(of_thread(w), of_thread(w + 16), 16);
    }
#pragma unroll
    for (int h = 8; h > 0; h /= 2) {
#pragma unroll
        for (int w = 0; w < h; ++w) {
            sums[w] = halve(sums[w], sums[w + h], h);
        }
    }
    const float2 mean_var = warp_reduce_sum(sums[0]);
    const float mean    = mean_var.x / args.K;
    const float var     = mean_var.y / args.K - mean * mean;
    const float inv_std = rsqrtf(var + args.eps);
    int amax = 0;
#pragma unroll
    for (int j = 0; j < R; ++j) {
        if (j < 32 || j < rows) {
            v[j] = __fmul_rn((v[j] - mean) * inv_std, args.y[32*j + lane]);
            if (args.z) {
                v[j] = __fadd_rn(v[j], args.z[32*j + lane]);
            }
        }
        amax = max(amax, mbq_w4a8_bits(v[j]));
    }
    if (args.out) {
        float * out = args.out + column*args.out_column + lane;
#pragma unroll
        for (int j = 0; j < R; ++j) {
            if (j < 32 || j < rows) {
                out[32*j] = v[j];
            }
        }
    }
    amax = mbq_w4a8_largest_of_warp(amax);
    const float2 scale = mbq_w4a8_column_scale(args.ranges.amax(column, amax));
    if (lane == 0) {
        args.scale[column] = scale.y;
    }
    uint8_t * code = codes[threadIdx.x/32];
#pragma unroll
    for (int j = 0; j < GGML_PAD(32*R, 256)/32; ++j) {
        code[32*j + lane] = j < R ? mbq_w4a8_code(v[j], scale.x) : 0; // v behind K is 0
    }
    __syncwarp();
    for (int unit = lane; unit < args.padded/16; unit += 32) {
        int word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = *(const int *) (code + mbq_w4a8_unit_k<true>(unit, i));
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
    if (tiled && args.q && args.K >= 1024 && args.K <= 1536 && args.K % 32 == 0) {
        const auto of_warp = args.K <= 1280 ? &mbq_w4a8_launch_layer_norm_of_warp<40> : &mbq_w4a8_launch_layer_norm_of_warp<48>;
        of_warp(ctx, args, columns);
        return;
    }
    const auto kernel = args.K < 1024 ? &mbq_w4a8_layer_norm<tiled, false> : &mbq_w4a8_layer_norm<tiled, true>; // as norm_f32_cuda
    if (args.K < 1024) {
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_layer_norm<tiled, false>), mbq_w4a8_room(ctx));
    } else {
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_layer_norm<tiled, true>), mbq_w4a8_room(ctx));
    }
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(256), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(kernel, params, args);
}
