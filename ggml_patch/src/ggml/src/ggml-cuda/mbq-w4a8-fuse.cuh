#pragma once

// What comes before a product and its quantising in one kernel: RMS norm times weight, LayerNorm times weight plus bias, and activation functions
// (mbq-w4a8-activation.cuh). One CTA a column, which it holds in shared memory:
//
//   floats in -> the operation, as ggml's own kernel does it -> column in shared memory, largest |x| -> int8 in the order of mbq-w4a8-quantize.cuh
//
// The same bits as the kernels apart: the expressions are upstream's (norm.cu, binbcast.cu), with the same options, sums by as many threads in the same
// order, or by fewer that each have the sums of several; the quantiser is mbq_w4a8_quantize's.

#include "mbq-f16-inputs.cuh"
#include "mbq-w4a8-inputs.cuh"
#include "mbq-w4a8-quantize.cuh"

struct mbq_w4a8_fused_args {
    const float * x;
    const float * y;   // weight of the norm; what is multiplied with silu(x)
    const float * z;   // what is added behind it; nullptr: nothing
    float * out;       // floats too; nullptr: nobody reads them
    half  * halves;    // F16; nullptr: no
    int64_t x_column, y_column, out_column; // elements
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

// A column of `padded` floats in shared memory; amax: this thread's part. All threads call it.
template <bool tiled>
static __device__ __forceinline__ void mbq_w4a8_quantize_shared(const mbq_w4a8_fused_args & args, float * column, const int amax) {
    __shared__ int largest[32];
    for (int i = args.K + threadIdx.x; i < args.padded; i += blockDim.x) {
        column[i] = 0.0f;
    }
    const int all = mbq_w4a8_largest(amax, largest, threadIdx.x, blockDim.x); // its barrier: the column is whole
    const float2 scale = mbq_w4a8_column_scale(args.ranges.amax(blockIdx.x, all));
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

// See rms_norm_f32: sums by `threads` times `parts` threads, of which each here is `parts`
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
            const float v = mbq_column[i]; // this thread's own
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
        mbq_column[i] = v;
        amax = max(amax, mbq_w4a8_bits(v));
        if (args.out) {
            args.out[blockIdx.x*args.out_column + i] = v;
        }
        if (args.halves) {
            args.halves[blockIdx.x*args.out_column + i] = __float2half(v);
        }
    }
    if (args.q) {
        mbq_w4a8_quantize_shared<tiled>(args, mbq_column, amax);
    }
}

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
        mbq_column[i] = v;
        amax = max(amax, mbq_w4a8_bits(v));
        if (args.out) {
            args.out[blockIdx.x*args.out_column + i] = v;
        }
        if (args.halves) {
            args.halves[blockIdx.x*args.out_column + i] = __float2half(v);
        }
    }
    if (args.q) {
        mbq_w4a8_quantize_shared<tiled>(args, mbq_column, amax);
    }
}

static size_t mbq_w4a8_room(const ggml_backend_cuda_context & ctx) { // bytes of a column in shared memory
    return ggml_cuda_info().devices[ctx.device].smpbo - 512;
}

template <bool tiled, int threads, int parts>
static void mbq_w4a8_launch_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_norm<tiled, threads, parts>), mbq_w4a8_room(ctx));
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(threads), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_norm<tiled, threads, parts>, params, args);
}

// As rms_norm_f32_cuda, which has 1024 threads from K = 1024 on: as many for few columns, for many a quarter, so that more columns are at work
template <bool tiled>
static void mbq_w4a8_launch_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const auto launch = args.K < 1024 ? &mbq_w4a8_launch_norm<tiled, 256, 1> : &mbq_w4a8_launch_norm<tiled, tiled ? 256 : 1024, tiled ? 4 : 1>;
    launch(ctx, args, columns);
}

template <bool tiled>
static void mbq_w4a8_launch_layer_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const auto kernel = args.K < 1024 ? &mbq_w4a8_layer_norm<tiled, false> : &mbq_w4a8_layer_norm<tiled, true>; // as norm_f32_cuda
    if (args.K < 1024) {
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_layer_norm<tiled, false>), mbq_w4a8_room(ctx));
    } else {
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_layer_norm<tiled, true>), mbq_w4a8_room(ctx));
    }
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(256), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(kernel, params, args);
}

// Who reads x, the result of node i, as int8
struct mbq_w4a8_fusion {
    mbq_w4a8_activations x;
    mbq_w4a8_readers readers;
    bool floats; // somebody reads them too, or may look at them: an output, another reader, or a callback's, which asks for the last node of a graph
};

static mbq_w4a8_fusion mbq_w4a8_readers_of(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    const ggml_tensor * x = graph->nodes[i];
    mbq_w4a8_fusion f = { { x, nullptr, x->ne[1] > MBQ_W4A8_FEW_COLUMNS ? MBQ_W4A8_TILES : MBQ_W4A8_RECORDS }, {}, true };
    if (x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && x->ne[2]*x->ne[3] == 1 && GGML_PAD(x->ne[0], 256)*sizeof(float) <= mbq_w4a8_room(ctx)) {
        f.x.ranges = mbq_w4a8_next_ranges(graph, i, x);
        f.readers  = mbq_w4a8_readers_after(ctx, graph, i, f.x);
        f.floats   = ggml_node_get_use_count(graph, i) != f.readers.count || (x->flags & GGML_TENSOR_FLAG_OUTPUT) || f.readers.last == graph->n_nodes - 1;
    }
    return f;
}

static mbq_w4a8_fused_args mbq_w4a8_hold_fused(ggml_backend_cuda_context & ctx, const mbq_w4a8_fusion & f, const int n_flags) {
    const ggml_tensor * x = f.x.x;
    const mbq_w4a8_int8 & to = mbq_w4a8_inputs(ctx).hold(ctx.pool(), f.x, f.x.order == MBQ_W4A8_TILES ? n_flags : 0, f.readers.last, f.floats);
    mbq_w4a8_fused_args args = {};
    args.out        = f.floats ? (float *) x->data : nullptr;
    args.out_column = x->ne[0];
    args.q          = to.q;
    args.scale      = to.scale;
    args.flags      = to.flags;
    args.n_flags    = to.n_flags;
    args.K          = x->ne[0];
    args.padded     = GGML_PAD(x->ne[0], 256);
    args.ranges     = mbq_w4a8_ranges_of(f.x.ranges);
    return args;
}

// Of a norm whose result no such product reads: in F16 where products of F16 weights do; LayerNorm with weight and bias also in floats, in one kernel instead of three
static mbq_w4a8_fused_args mbq_w4a8_norm_alone(const ggml_tensor * out, half * halves) {
    mbq_w4a8_fused_args args = {};
    args.out        = halves ? nullptr : (float *) out->data;
    args.halves     = halves;
    args.out_column = out->ne[0];
    args.K          = out->ne[0];
    args.padded     = GGML_PAD(out->ne[0], 256);
    return args;
}

static bool mbq_w4a8_can_be_alone(const ggml_backend_cuda_context & ctx, const ggml_tensor * x, const ggml_tensor * out) {
    return out->type == GGML_TYPE_F32 && ggml_is_contiguous(out) && out->ne[2]*out->ne[3] == 1 && GGML_PAD(out->ne[0], 256)*sizeof(float) <= mbq_w4a8_room(ctx) &&
        ((x->data == out->data && x->nb[1] == out->nb[1]) || !mbq_w4a8_overlap(x, out)); // a CTA has read its column before it writes it
}

// NORM or RMS_NORM, MUL by a weight and, behind NORM, ADD of a bias: how many nodes behind i have run with it
static int mbq_w4a8_fuse_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int n_flags) {
    const ggml_tensor * norm = graph->nodes[i];
    if ((norm->op != GGML_OP_NORM && norm->op != GGML_OP_RMS_NORM) || !ggml_can_fuse(graph, i, { norm->op, GGML_OP_MUL })) {
        return 0;
    }
    const bool rms = norm->op == GGML_OP_RMS_NORM;
    const int behind = !rms && ggml_can_fuse(graph, i, { GGML_OP_NORM, GGML_OP_MUL, GGML_OP_ADD }) ? 2 : 1;
    const ggml_tensor * x = norm->src[0];
    const ggml_tensor * read[2] = {}; // weight and bias
    for (int j = 0; j < behind; ++j) {
        const ggml_tensor * node = graph->nodes[i + 1 + j];
        const ggml_tensor * t = node->src[node->src[0] == graph->nodes[i + j]];
        if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || t->ne[0] != x->ne[0] || ggml_nelements(t) != x->ne[0]) {
            return 0;
        }
        read[j] = t;
    }
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float)) {
        return 0;
    }
    const mbq_w4a8_fusion f = mbq_w4a8_readers_of(ctx, graph, i + behind);
    const bool alone = f.readers.count == 0;
    const ggml_tensor * out = graph->nodes[i + behind];
    half * halves = nullptr;
    if (alone) {
        if (!mbq_w4a8_can_be_alone(ctx, x, out) || mbq_w4a8_overlap(read[0], out) || (read[1] && mbq_w4a8_overlap(read[1], out))) {
            return 0;
        }
        halves = mbq_w4a8_overlap(x, out) ? nullptr : mbq_f16_hold(ctx, graph, i + behind);
        if (!halves && behind != 2) {
            return 0;
        }
    }
    mbq_w4a8_fused_args args = alone ? mbq_w4a8_norm_alone(out, halves) : mbq_w4a8_hold_fused(ctx, f, n_flags);
    args.x        = (const float *) x->data;
    args.y        = (const float *) read[0]->data;
    args.z        = read[1] ? (const float *) read[1]->data : nullptr;
    args.x_column = x->nb[1]/sizeof(float);
    args.eps      = ggml_get_op_params_f32(norm, 0);
    const bool tiled = f.x.order == MBQ_W4A8_TILES;
    const auto of_rms   = tiled ? &mbq_w4a8_launch_norm<true> : &mbq_w4a8_launch_norm<false>;
    const auto of_layer = tiled ? &mbq_w4a8_launch_layer_norm<true> : &mbq_w4a8_launch_layer_norm<false>;
    (rms ? of_rms : of_layer)(ctx, args, norm->ne[1]);
    return behind;
}
