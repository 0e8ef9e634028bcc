#pragma once

// Activation functions fused with the quantisation of their result (mbq-w4a8-fuse.cuh): SwiGLU, with or without a Hadamard transform after it, and the three
// GELUs. The expressions are upstream's (unary.cu, fwht.cu).

#include "fwht.cuh"
#include "mbq-w4a8-fuse.cuh"
#include "mbq-w4a8-gelu.cuh"

// Hadamard transform of N floats in a warp's lanes; value i of lane t is element 32i + t, see fwht_cuda
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

// Maximum number of warps per CTA, such that the registers of a multiprocessor suffice for two CTAs
static constexpr int mbq_w4a8_warps(const int N) {
    return N < 512 ? 32 : 20;
}

// SwiGLU, see unary_gated_op_kernel. A warp processes `span` elements at a time: N, or 128 without a transform (N = 0).
template <bool tiled, int N>
static __global__ void __launch_bounds__(32*mbq_w4a8_warps(N), MBQ_W4A8_CTAS(2)) mbq_w4a8_swiglu(const mbq_w4a8_fused_args args, const float hadamard) {
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

// The number of warps that divides the spans evenly: 18944 is 37 spans of 512, two for each of 19 warps
static int mbq_w4a8_swiglu_threads(const int K, const int N) {
    if (K <= 4096) {
        return 256;
    }
    const int span  = N == 0 ? 128 : N;
    const int spans = (K + span - 1)/span;
    const int turns = (spans + mbq_w4a8_warps(N) - 1)/mbq_w4a8_warps(N);
    return 32*((spans + turns - 1)/turns);
}

template <bool tiled, int N>
static void mbq_w4a8_launch_swiglu(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const float scale = N == 0 ? 1.0f : 1 / sqrtf(N);
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_swiglu<tiled, N>), mbq_w4a8_room(ctx));
    const dim3 threads(mbq_w4a8_swiglu_threads(args.K, N));
    const ggml_cuda_kernel_launch_params params(dim3(columns), threads, args.padded*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_swiglu<tiled, N>, params, args, scale);
}

static constexpr int MBQ_W4A8_LONGEST_GELU = 1024*16; // each thread of mbq_w4a8_quantize has one unit

// In registers: 29 us for 5120 by 4096, through shared memory 42 us
template <bool tiled, mbq_w4a8_function f>
static void mbq_w4a8_launch_gelu(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns) {
    const bool aligned = ((uintptr_t) args.x | args.x_column*sizeof(float)) % 16 == 0;
    const mbq_w4a8_quantize_args of = { args.x, args.q, args.scale, args.x_column, args.K, args.padded, aligned, args.flags, args.n_flags, args.ranges };
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(GGML_PAD(args.padded/16, 32)), 0, ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_quantize<tiled, 1, 1024, 1, mbq_w4a8_gelu<f>>, params, of);
}

template <bool tiled>
static void mbq_w4a8_launch_activation(ggml_backend_cuda_context & ctx, const mbq_w4a8_fused_args & args, const int columns, const mbq_w4a8_function f, const int hadamard) {
    const auto of_swiglu = hadamard == 0 ? &mbq_w4a8_launch_swiglu<tiled, 0> : hadamard == 64 ? &mbq_w4a8_launch_swiglu<tiled, 64> :
        hadamard == 128 ? &mbq_w4a8_launch_swiglu<tiled, 128> : hadamard == 256 ? &mbq_w4a8_launch_swiglu<tiled, 256> : &mbq_w4a8_launch_swiglu<tiled, 512>;
    const auto launch = f == MBQ_W4A8_SWIGLU ? of_swiglu : f == MBQ_W4A8_GELU ? &mbq_w4a8_launch_gelu<tiled, MBQ_W4A8_GELU> :
        f == MBQ_W4A8_GELU_ERF ? &mbq_w4a8_launch_gelu<tiled, MBQ_W4A8_GELU_ERF> : &mbq_w4a8_launch_gelu<tiled, MBQ_W4A8_GELU_QUICK>;
    launch(ctx, args, columns);
}

// The size of the Hadamard transform after the function at node i: RESHAPE, MUL_MAT with a matrix for which ggml_cuda_op_fwht is used, RESHAPE to the original
// shape. 0: other nodes
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

// Runs SWIGLU, with or without a transform, or a GELU. Returns the node whose result it has computed; -1: another node
static int mbq_w4a8_fuse_activation(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int n_flags) {
    const ggml_tensor * node = graph->nodes[i];
    const mbq_w4a8_function function = mbq_w4a8_function_of(node);
    if (function == MBQ_W4A8_NONE) {
        return -1;
    }
    const ggml_tensor * x = node->src[0];
    const ggml_tensor * y = function == MBQ_W4A8_SWIGLU ? node->src[1] : x;
    for (const ggml_tensor * src : { x, y }) {
        if (src->type != GGML_TYPE_F32 || !ggml_is_contiguous_1(src) || !ggml_are_same_shape(src, node)) {
            return -1;
        }
    }
    const int hadamard = function == MBQ_W4A8_SWIGLU ? mbq_w4a8_hadamard_after(graph, i) : 0;
    const int end      = hadamard > 0 ? i + 3 : i;
    const mbq_w4a8_fusion f = mbq_w4a8_readers_of(ctx, graph, end);
    const bool next = hadamard > 0 || f.readers.first == i + 1; // see ggml_cuda_w4a8_fuse
    if (f.readers.count == 0 || f.floats || !next || (function != MBQ_W4A8_SWIGLU && node->ne[0] > MBQ_W4A8_LONGEST_GELU)) {
        return -1;
    }
    mbq_w4a8_fused_args args = mbq_w4a8_hold_fused(ctx, f, n_flags);
    args.x        = (const float *) x->data;
    args.y        = (const float *) y->data;
    args.x_column = x->nb[1]/sizeof(float);
    args.y_column = y->nb[1]/sizeof(float);
    const auto launch = f.x.order == MBQ_W4A8_TILES ? &mbq_w4a8_launch_activation<true> : &mbq_w4a8_launch_activation<false>;
    launch(ctx, args, node->ne[1], function, hadamard);
    return end;
}
