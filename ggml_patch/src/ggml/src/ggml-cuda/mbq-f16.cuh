#pragma once

// Products of F16 weights with many columns, in F16 towers and models, and the nodes after them. cuBLAS writes F16, then there is one pass:
//
//   MUL_MAT, ADD of a bias, ADD of the residual stream      one, both in this order, or none: floats
//   MUL_MAT, ADD of a bias, a GELU                          F16, if only such products read it (mbq-f16-inputs.cuh)
//   MUL_MAT, ADD of a bias or none, RESHAPE, ROPE           a tower's rotary embedding (mbq-rope.cuh): floats
//
// Node by node, there is a cast to floats, a pass over floats for each, and a cast back before the next product. The bits are the same: cuBLAS is called as in
// ggml_cuda_mul_mat_cublas_impl, and the expressions are upstream's.

#include "convert.cuh"
#include "mbq-f16-inputs.cuh"
#include "mbq-rope.cuh"
#include "mbq-w4a8-activation.cuh"

struct mbq_f16_end_args {
    const half  * y;    // the product
    const float * bias; // nullptr: none
    const float * more; // nullptr: none
    float * out;        // nullptr: F16
    half  * halves;
    int64_t more_column; // elements
    int   units;         // of 8 numbers
    uint3 column;        // units of a column
};

static __device__ __forceinline__ void mbq_f16_add(float (&v)[8], const float * x) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        const float4 a = *(const float4 *) (x + j);
        v[j]     = __fadd_rn(v[j],     a.x);
        v[j + 1] = __fadd_rn(v[j + 1], a.y);
        v[j + 2] = __fadd_rn(v[j + 2], a.z);
        v[j + 3] = __fadd_rn(v[j + 3], a.w);
    }
}

static constexpr int MBQ_F16_NO_FUNCTION = -1;

template <int f>
static __device__ __forceinline__ float mbq_f16_function(const float x) {
    if constexpr (f == MBQ_F16_NO_FUNCTION) {
        return x;
    } else {
        return mbq_w4a8_gelu<(mbq_w4a8_function) f>::of(x);
    }
}

template <int f>
static __global__ void __launch_bounds__(256) mbq_f16_end(const mbq_f16_end_args args) {
    ggml_cuda_pdl_lc();
    const int i = blockIdx.x*blockDim.x + threadIdx.x;
    if (i >= args.units) {
        return;
    }
    const uint2 at = fast_div_modulo(i, args.column); // column, unit of it
    ggml_cuda_pdl_sync();
    const int4 y = ((const int4 *) args.y)[i];
    float v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 two = __half22float2(((const half2 *) &y)[j]);
        v[2*j]     = two.x;
        v[2*j + 1] = two.y;
    }
    if (args.bias) {
        mbq_f16_add(v, args.bias + 8*at.y);
    }
    if (args.more) {
        mbq_f16_add(v, args.more + at.x*args.more_column + 8*at.y);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        v[j] = mbq_f16_function<f>(v[j]);
    }
    if (args.out) {
        ((float4 *) args.out)[2*i]     = make_float4(v[0], v[1], v[2], v[3]);
        ((float4 *) args.out)[2*i + 1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        half2 h[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            h[j] = __floats2half2_rn(v[2*j], v[2*j + 1]);
        }
        ((int4 *) args.halves)[i] = *(const int4 *) h;
    }
}

// See ggml_cuda_mul_mat_cublas_impl
static void mbq_f16_cublas(ggml_backend_cuda_context & ctx, const ggml_tensor * node, const half * x, half * y) {
    const ggml_tensor * w = node->src[0];
    const half one = 1.0f, zero = 0.0f;
    CUBLAS_CHECK(cublasGemmEx(ctx.cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, node->ne[0], node->ne[1], w->ne[0],
        &one, w->data, CUDA_R_16F, w->nb[1]/sizeof(half), x, CUDA_R_16F, w->ne[0], &zero, y, CUDA_R_16F, node->ne[0], CUBLAS_COMPUTE_16F, CUBLAS_GEMM_DEFAULT_TENSOR_OP));
}

// The pass after a product, whose F16 result is y
static void mbq_f16_launch_end(ggml_backend_cuda_context & ctx, const ggml_tensor * node, const half * y, mbq_f16_end_args args, const int gelu) {
    args.y      = y;
    args.units  = ggml_nelements(node)/8;
    args.column = init_fastdiv_values(node->ne[0]/8);
    const auto kernel = args.out ? &mbq_f16_end<MBQ_F16_NO_FUNCTION> : gelu == MBQ_W4A8_GELU ? &mbq_f16_end<MBQ_W4A8_GELU> :
        gelu == MBQ_W4A8_GELU_ERF ? &mbq_f16_end<MBQ_W4A8_GELU_ERF> : &mbq_f16_end<MBQ_W4A8_GELU_QUICK>;
    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(dim3((args.units + 255)/256), dim3(256), 0, ctx.stream()), args);
}

// The GELU after node i whose result can be F16; -1: none
static int mbq_f16_gelu_behind(const ggml_cgraph * graph, const int i, const mbq_w4a8_added & a) {
    if (a.more || !ggml_can_fuse(graph, i, { graph->nodes[i]->op, GGML_OP_UNARY })) {
        return -1;
    }
    const ggml_tensor * gelu = graph->nodes[i + 1];
    const int function = mbq_w4a8_function_of(gelu);
    return gelu->type == GGML_TYPE_F32 && ggml_is_contiguous(gelu) && mbq_f16_aligned(gelu) && !(a.bias && mbq_overlap(a.bias, gelu)) ? function : -1;
}

// The rotary embedding after node i (the product with its bias) and a RESHAPE; nullptr: none
static const ggml_tensor * mbq_f16_rope_behind(const ggml_cgraph * graph, const int i, const mbq_w4a8_added & a) {
    if (a.more || !ggml_can_fuse_subgraph(graph, i, { graph->nodes[i]->op, GGML_OP_RESHAPE, GGML_OP_ROPE }, { i + 2 })) {
        return nullptr;
    }
    const ggml_tensor * rope = graph->nodes[i + 2];
    const bool chain = rope->src[0] == graph->nodes[i + 1] && graph->nodes[i + 1]->src[0] == graph->nodes[i] && ggml_is_contiguous(rope->src[0]);
    return chain && mbq_rope_takes(rope) && !(a.bias && mbq_overlap(a.bias, rope)) ? rope : nullptr;
}

// Runs node i if possible, and returns how many of the following nodes have run with it
static int mbq_f16_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    mbq_w4a8_added a;
    if (!mbq_f16_runs(ctx, graph, i, a)) {
        return 0;
    }
    const ggml_tensor * product = graph->nodes[i];
    ggml_cuda_pool_alloc<half> x(ctx.pool()), y(ctx.pool());
    const bool found = inputs.f16 && inputs.f16 == product->src[1] && i <= inputs.f16_last;
    if (!found) {
        ggml_get_to_fp16_cuda(GGML_TYPE_F32)(product->src[1]->data, x.alloc(ggml_nelements(product->src[1])), ggml_nelements(product->src[1]), ctx.stream());
    }
    mbq_f16_cublas(ctx, product, found ? (const half *) inputs.f16->data : x.get(), y.alloc(ggml_nelements(product)));
    mbq_w4a8_counts[GGML_CUDA_F16_PRODUCT]++;
    mbq_w4a8_counts[GGML_CUDA_F16_FOUND] += found;

    const float * bias = a.bias ? (const float *) a.bias->data : nullptr;
    if (const ggml_tensor * rope = mbq_f16_rope_behind(graph, i + a.nodes, a)) {
        mbq_rope_run(ctx, rope, y.get(), bias);
        mbq_w4a8_counts[GGML_CUDA_F16_ROPE]++;
        return a.nodes + 2;
    }
    mbq_f16_end_args args = {};
    args.bias = bias;
    if (a.more) {
        args.more        = (const float *) a.more->data;
        args.more_column = a.more->nb[1]/sizeof(float);
    }
    const int gelu = mbq_f16_gelu_behind(graph, i + a.nodes, a);
    args.halves = gelu >= 0 ? mbq_f16_hold(ctx, graph, i + a.nodes + 1) : nullptr;
    args.out    = args.halves ? nullptr : (float *) a.out->data;
    mbq_f16_launch_end(ctx, product, y.get(), args, gelu);
    return args.halves ? a.nodes + 1 : std::max(a.nodes, 1);
}
