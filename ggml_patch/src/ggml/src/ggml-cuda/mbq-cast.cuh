#pragma once

// Converts keys and values of a vision tower's attention to F16 and permutes them, in one kernel: two CPY nodes of permuted views, with the second view between
// them. ggml_cuda_cpy copies single elements: 100 us for 4096 columns of 1280 on an H200, 10 us here. The same bits.

#include "common.cuh"
#include "ggml-impl.h"

struct mbq_cast_args {
    const char * x;
    half2      * y;
    int quads, ne0, ne1, ne2; // in units of four elements: in total, per row; then numbers of rows
    int64_t nb1, nb2, nb3;
};

static __global__ void mbq_cast(const mbq_cast_args args) {
    ggml_cuda_pdl_lc();
    const int i = blockIdx.x*blockDim.x + threadIdx.x;
    if (i >= args.quads) {
        return;
    }
    const int row = i/args.ne0, plane = row/args.ne1;
    const char * x = args.x + plane/args.ne2*args.nb3 + plane%args.ne2*args.nb2 + row%args.ne1*args.nb1;
    ggml_cuda_pdl_sync();
    const float4 v = ((const float4 *) x)[i%args.ne0];
    args.y[2*i]     = __floats2half2_rn(v.x, v.y);
    args.y[2*i + 1] = __floats2half2_rn(v.z, v.w);
}

static bool mbq_cast_takes(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    return node->op == GGML_OP_CPY && (node->flags & GGML_TENSOR_FLAG_COMPUTE) && node->type == GGML_TYPE_F16 && x->type == GGML_TYPE_F32 && ggml_is_permuted(x) && ggml_is_contiguous(node) &&
        ggml_are_same_shape(x, node) && x->nb[0] == sizeof(float) && x->ne[0] % 4 == 0 && ggml_nelements(x)/4 <= INT_MAX/2 &&
        ((uintptr_t) x->data | x->nb[1] | x->nb[2] | x->nb[3]) % 16 == 0 && (uintptr_t) node->data % 8 == 0;
}

static void mbq_cast_run(ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const mbq_cast_args args = { (const char *) x->data, (half2 *) node->data, (int) (ggml_nelements(x)/4), (int) (x->ne[0]/4), (int) x->ne[1], (int) x->ne[2],
        (int64_t) x->nb[1], (int64_t) x->nb[2], (int64_t) x->nb[3] };
    const ggml_cuda_kernel_launch_params params(dim3((args.quads + 255)/256), dim3(256), 0, ctx.stream());
    ggml_cuda_kernel_launch(mbq_cast, params, args);
}

// Runs node i if possible, and returns how many of the following nodes have run with it
static int mbq_cast_two(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (i + 2 >= graph->n_nodes || !mbq_cast_takes(graph->nodes[i]) || !ggml_op_is_empty(graph->nodes[i + 1]->op) || !mbq_cast_takes(graph->nodes[i + 2])) {
        return 0;
    }
    mbq_cast_run(ctx, graph->nodes[i]);
    mbq_cast_run(ctx, graph->nodes[i + 2]);
    return 2;
}
