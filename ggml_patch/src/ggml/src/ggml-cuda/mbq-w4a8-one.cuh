#pragma once

// One column's product with what reads it, in one kernel (mbq_w4a8_mmv):
//
//   MUL_MAT, ADD             a bias, or the residual stream
//   MUL_MAT, MUL_MAT, GLU    gate and up, in either order, and SwiGLU
//
// The same bits as the nodes apart: the product is exact, and the expressions behind it are upstream's (binbcast.cu, unary.cu) with the same options.

#include "mbq-w4a8-launch.cuh"

// Whether mbq_w4a8_mmv makes a node, from floats
static bool mbq_w4a8_one_column(const ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT && node->ne[1] == 1 && mbq_w4a8_takes_whole(node) && mbq_w4a8_order_of(ctx, node) == MBQ_W4A8_FLOATS;
}

// Every CTA reads the column and its range while others write: neither may lie where the result does.
static bool mbq_w4a8_reads_apart(const ggml_tensor * product, const ggml_tensor * out) {
    return out->type == GGML_TYPE_F32 && ggml_is_contiguous(out) && !mbq_w4a8_overlap(product->src[1], out) &&
        !(product->src[2] && mbq_w4a8_overlap(product->src[2], out));
}

static void mbq_w4a8_run_one(ggml_backend_cuda_context & ctx, const ggml_tensor * product, ggml_tensor * out, const ggml_tensor * gate, const ggml_tensor * bias) {
    mbq_w4a8_matrix m = mbq_w4a8_matrix_of(product, 0, 0);
    m.dst  = (float *) out->data;
    m.gate = gate ? (const char *) gate->data : nullptr;
    m.bias = bias ? (const float *) bias->data : nullptr;
    const auto few = product->src[0]->type == GGML_TYPE_Q4_0 ? &mbq_w4a8_few<4> : &mbq_w4a8_few<8>;
    few(ctx, m, {});
}

static bool mbq_w4a8_fuse_bias(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (!ggml_can_fuse(graph, i, { GGML_OP_MUL_MAT, GGML_OP_ADD })) {
        return false;
    }
    const ggml_tensor * product = graph->nodes[i];
    ggml_tensor * add = graph->nodes[i + 1];
    const ggml_tensor * bias = add->src[add->src[0] == product];
    if (bias == product || bias->type != GGML_TYPE_F32 || !ggml_is_contiguous(bias) || !ggml_are_same_shape(bias, product) ||
            !mbq_w4a8_reads_apart(product, add) || (bias->data != add->data && mbq_w4a8_overlap(bias, add))) {
        return false;
    }
    mbq_w4a8_run_one(ctx, product, add, nullptr, bias);
    return true;
}

static bool mbq_w4a8_fuse_gate(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (!ggml_can_fuse_subgraph(graph, i, { GGML_OP_MUL_MAT, GGML_OP_MUL_MAT, GGML_OP_GLU }, { i + 2 })) {
        return false;
    }
    ggml_tensor * const * n = graph->nodes + i;
    const ggml_tensor * gate = n[2]->src[0];
    const ggml_tensor * up   = n[2]->src[1];
    if (ggml_get_glu_op(n[2]) != GGML_GLU_OP_SWIGLU || ggml_get_op_params_i32(n[2], 1) != 0 || !((gate == n[0] && up == n[1]) || (gate == n[1] && up == n[0]))) {
        return false;
    }
    const ggml_tensor * w_gate = gate->src[0];
    const ggml_tensor * w_up   = up->src[0];
    const bool alike = w_gate->type == w_up->type && ggml_are_same_shape(w_gate, w_up) && ggml_are_same_stride(w_gate, w_up) &&
        mbq_w4a8_same(gate->src[1], up->src[1]) && mbq_w4a8_same(gate->src[2], up->src[2]);
    if (!alike || !mbq_w4a8_one_column(ctx, gate) || !mbq_w4a8_one_column(ctx, up) || !mbq_w4a8_reads_apart(up, n[2])) {
        return false;
    }
    mbq_w4a8_run_one(ctx, up, n[2], w_gate, nullptr);
    return true;
}

// From node i on: how many nodes behind it have run with it
static int mbq_w4a8_fuse_one(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (!mbq_w4a8_one_column(ctx, graph->nodes[i])) {
        return 0;
    }
    return mbq_w4a8_fuse_bias(ctx, graph, i) ? 1 : mbq_w4a8_fuse_gate(ctx, graph, i) ? 2 : 0;
}
