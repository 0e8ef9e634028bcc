#pragma once

// What comes before a product and its quantising in one kernel: RMS norm times weight, and SwiGLU with the Hadamard transform behind it where there
// is one. One CTA a column, which it holds in shared memory:
//
//   floats in -> the operation, as ggml's own kernel does it -> column in shared memory, largest |x| -> int8 in the order of mbq-w4a8-quantize.cuh
//
// The same bits as the kernels apart: the expressions are upstream's (norm.cu, unary.cu, fwht.cu), with the same options, the sum of squares by as
// many threads in the same order; the quantiser is mbq_w4a8_quantize's.

#include "fwht.cuh"
#include "mbq-w4a8-inputs.cuh"
#include "mbq-w4a8-quantize.cuh"
#include "unary.cuh"

struct mbq_w4a8_fused_args {
    const float * x;
    const float * y;   // weight of the norm; what is multiplied with silu(x)
    float * out;       // floats too; nullptr: nobody reads them
    int64_t x_column, y_column, out_column; // elements
    float eps;
    int4  * q;
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

// See rms_norm_f32
template <bool tiled, int threads>
static __global__ void __launch_bounds__(threads, MBQ_W4A8_CTAS(2)) mbq_w4a8_norm(const mbq_w4a8_fused_args args) {
    extern __shared__ __align__(16) float mbq_column[];
    __shared__ float sums[32];
    ggml_cuda_pdl_lc();
    const float * x = args.x + blockIdx.x*args.x_column;
    float sum = 0.0f;
    ggml_cuda_pdl_sync();
    for (int i = threadIdx.x; i < args.K; i += threads) {
        const float v = x[i];
        mbq_column[i] = v;
        sum += v * v;
    }
    sum = block_reduce<block_reduce_method::SUM, threads>(sum, sums);
    const float mean  = sum / args.K;
    const float scale = rsqrtf(mean + args.eps);
    int amax = 0;
    for (int i = threadIdx.x; i < args.K; i += threads) {
        const float v = scale * mbq_column[i] * args.y[i];
        mbq_column[i] = v;
        amax = max(amax, mbq_w4a8_bits(v));
        if (args.out) {
            args.out[blockIdx.x*args.out_column + i] = v;
        }
    }
    mbq_w4a8_quantize_shared<tiled>(args, mbq_column, amax);
}

// N floats of a warp's lanes, value i of lane t being element 32i + t: see fwht_cuda
template <int N>
static __device__ __forceinline__ void mbq_w4a8_hadamard(float (&v)[N/32], const float scale) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N/32; ++i) {
        v[i] = __fmul_rn(v[i], scale);
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
#pragma unroll
        for (int i = 0; i < N/32; ++i) {
            const float other = __shfl_xor_sync(0xFFFFFFFF, v[i], h);
            v[i] = (lane & h) == 0 ? __fadd_rn(v[i], other) : __fsub_rn(other, v[i]);
        }
    }
#pragma unroll
    for (int h = 1; h < N/32; h *= 2) {
#pragma unroll
        for (int i = 0; i < N/32; ++i) {
            if ((i & h) == 0) {
                const float a = v[i], b = v[i + h];
                v[i]     = __fadd_rn(a, b);
                v[i + h] = __fsub_rn(a, b);
            }
        }
    }
}

// A warp takes `span` elements at a time: N, or 128 without a transform (N = 0). See unary_gated_op_kernel
template <bool tiled, int N>
static __global__ void __launch_bounds__(1024, MBQ_W4A8_CTAS(N < 512 ? 2 : 1)) mbq_w4a8_swiglu(const mbq_w4a8_fused_args args, const float hadamard) {
    extern __shared__ __align__(16) float mbq_column[];
    constexpr int span = N == 0 ? 128 : N;
    ggml_cuda_pdl_lc();
    const float * x = args.x + blockIdx.x*args.x_column;
    const float * y = args.y + blockIdx.x*args.y_column;
    int amax = 0;
    ggml_cuda_pdl_sync();
    for (int first = threadIdx.x/32*span + threadIdx.x%32; first < args.K; first += blockDim.x/32*span) {
        float v[span/32];
#pragma unroll
        for (int i = 0; i < span/32; ++i) {
            const int k = first + 32*i;
            v[i] = N == 0 && k >= args.K ? 0.0f : ggml_cuda_op_silu_single(x[k]) * y[k];
        }
        if constexpr (N > 0) {
            mbq_w4a8_hadamard<N>(v, hadamard);
        }
#pragma unroll
        for (int i = 0; i < span/32; ++i) {
            if (N > 0 || first + 32*i < args.K) {
                mbq_column[first + 32*i] = v[i];
            }
            amax = max(amax, mbq_w4a8_bits(v[i]));
        }
    }
    mbq_w4a8_quantize_shared<tiled>(args, mbq_column, amax);
}

static size_t mbq_w4a8_room(const ggml_backend_cuda_context & ctx) { // bytes of a column in shared memory
    return ggml_cuda_info().devices[ctx.device].smpbo - 512;
}

template <bool tiled, int threads>
static void mbq_w4a8_launch_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_norm<tiled, threads>), mbq_w4a8_room(ctx));
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(threads), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_norm<tiled, threads>, params, args);
}

template <bool tiled>
static void mbq_w4a8_launch_norm(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const auto launch = args.K < 1024 ? &mbq_w4a8_launch_norm<tiled, 256> : &mbq_w4a8_launch_norm<tiled, 1024>; // as rms_norm_f32_cuda
    launch(ctx, args, columns);
}

template <bool tiled, int N>
static void mbq_w4a8_launch_swiglu(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const int threads = args.K <= 4096 ? 256 : 1024;
    const float scale = N == 0 ? 1.0f : 1 / sqrtf(N);
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_swiglu<tiled, N>), mbq_w4a8_room(ctx));
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(threads), args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_swiglu<tiled, N>, params, args, scale);
}

template <bool tiled>
static void mbq_w4a8_launch_swiglu(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns, const int hadamard) {
    const auto launch = hadamard == 0 ? &mbq_w4a8_launch_swiglu<tiled, 0> : hadamard == 64 ? &mbq_w4a8_launch_swiglu<tiled, 64> :
        hadamard == 128 ? &mbq_w4a8_launch_swiglu<tiled, 128> : hadamard == 256 ? &mbq_w4a8_launch_swiglu<tiled, 256> : &mbq_w4a8_launch_swiglu<tiled, 512>;
    launch(ctx, args, columns);
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

// RMS_NORM, MUL: whether it has run them
static bool mbq_w4a8_fuse_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int n_flags) {
    if (!ggml_can_fuse(graph, i, { GGML_OP_RMS_NORM, GGML_OP_MUL })) {
        return false;
    }
    const ggml_tensor * norm = graph->nodes[i];
    const ggml_tensor * mul  = graph->nodes[i + 1];
    const ggml_tensor * x    = norm->src[0];
    const ggml_tensor * w    = mul->src[mul->src[0] == norm];
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || w->type != GGML_TYPE_F32 || !ggml_is_contiguous(w) || ggml_nelements(w) != x->ne[0]) {
        return false;
    }
    const mbq_w4a8_fusion f = mbq_w4a8_readers_of(ctx, graph, i + 1);
    if (f.readers.count == 0) {
        return false;
    }
    mbq_w4a8_fused_args args = mbq_w4a8_hold_fused(ctx, f, n_flags);
    args.x        = (const float *) x->data;
    args.y        = (const float *) w->data;
    args.x_column = x->nb[1]/sizeof(float);
    args.eps      = ggml_get_op_params_f32(norm, 0);
    const auto launch = f.x.order == MBQ_W4A8_TILES ? &mbq_w4a8_launch_norm<true> : &mbq_w4a8_launch_norm<false>;
    launch(ctx, args, mul->ne[1]);
    return true;
}

// Behind the GLU at node i: RESHAPE, MUL_MAT with a Hadamard matrix that ggml_cuda_op_fwht multiplies by, RESHAPE to what it was. The size of the
// matrix; 0: another node
static int mbq_w4a8_hadamard_after(const ggml_cgraph * graph, const int i) {
    if (i + 3 >= graph->n_nodes) {
        return 0;
    }
    ggml_tensor * const * n = graph->nodes + i;
    const bool chain = n[1]->op == GGML_OP_RESHAPE && n[1]->src[0] == n[0] && ggml_cuda_op_mul_mat_use_fwht(n[2]) && n[2]->src[1] == n[1] &&
        n[3]->op == GGML_OP_RESHAPE && n[3]->src[0] == n[2] && ggml_are_same_shape(n[3], n[0]);
    bool read_once = true;
    for (int j = 0; j < 3; ++j) {
        read_once = read_once && ggml_node_get_use_count(graph, i + j) == 1 && !(n[j]->flags & GGML_TENSOR_FLAG_OUTPUT);
    }
    const int64_t size = n[1]->ne[0];
    return chain && read_once && n[1]->type == GGML_TYPE_F32 && (size == 64 || size == 128 || size == 256 || size == 512) ? size : 0;
}

// SWIGLU, with a transform or none: the node whose result it has made; -1: another node
static int mbq_w4a8_fuse_glu(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int n_flags) {
    const ggml_tensor * glu = graph->nodes[i];
    if (glu->op != GGML_OP_GLU || ggml_get_glu_op(glu) != GGML_GLU_OP_SWIGLU || !glu->src[1] || glu->view_src) {
        return -1;
    }
    for (const ggml_tensor * src : { glu->src[0], glu->src[1] }) {
        if (src->type != GGML_TYPE_F32 || !ggml_is_contiguous_1(src) || !ggml_are_same_shape(src, glu)) {
            return -1;
        }
    }
    const int hadamard = mbq_w4a8_hadamard_after(graph, i);
    const int end      = hadamard > 0 ? i + 3 : i;
    const mbq_w4a8_fusion f = mbq_w4a8_readers_of(ctx, graph, end);
    const bool next = hadamard > 0 || mbq_w4a8_next_reader(ctx, graph, i, f.x) == i + 1; // see ggml_cuda_w4a8_fuse
    if (f.readers.count == 0 || f.floats || !next) {
        return -1;
    }
    mbq_w4a8_fused_args args = mbq_w4a8_hold_fused(ctx, f, n_flags);
    args.x        = (const float *) glu->src[0]->data;
    args.y        = (const float *) glu->src[1]->data;
    args.x_column = glu->src[0]->nb[1]/sizeof(float);
    args.y_column = glu->src[1]->nb[1]/sizeof(float);
    const auto launch = f.x.order == MBQ_W4A8_TILES ? &mbq_w4a8_launch_swiglu<true> : &mbq_w4a8_launch_swiglu<false>;
    launch(ctx, args, glu->ne[1], hadamard);
    return end;
}
