#pragma once

// Activations stored as F16 in place of floats, for products of F16 weights by cuBLAS (mbq-f16.cuh). Node by node, each of these products converts its input to
// F16. Here the node that writes x does so once, if nothing else reads x:
//
//   graph     norm   q          k          v
//   x         F16    reads it   reads it   reads it
//
// One x at a time, until its last reader has run.

#include "mbq-w4a8-added.cuh"

#include <cstdlib>

// Whether ggml_cuda_mul_mat gives the node to cuBLAS, and that computes in F16
static bool mbq_f16_takes(const ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    static const bool default_type = getenv("GGML_CUDA_CUBLAS_COMPUTE_TYPE") == nullptr;
    if (!default_type || node->op != GGML_OP_MUL_MAT) {
        return false;
    }
    constexpr int64_t few = 16; // columns of ggml_cuda_mul_mat_f
    const ggml_tensor * w = node->src[0], * x = node->src[1];
    const int cc = ggml_cuda_info().devices[ctx.device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && cc >= GGML_CUDA_CC_TURING && w->type == GGML_TYPE_F16 && x->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32 &&
        ggml_get_op_params_i32(node, 0) == GGML_PREC_DEFAULT && node->ne[1] > few && node->ne[0] % 8 == 0 && ggml_nelements(node)/8 <= INT_MAX/2 &&
        w->ne[2]*w->ne[3]*x->ne[2]*x->ne[3] == 1 && w->nb[0] == sizeof(half) && ggml_is_contiguous(x) && ggml_is_contiguous(node) &&
        (uintptr_t) node->data % 16 == 0;
}

static bool mbq_f16_aligned(const ggml_tensor * t) { // t may be none
    return !t || ((uintptr_t) t->data | t->nb[1]) % 16 == 0;
}

// The node that mbq_f16_end adds to the product at node i
static mbq_w4a8_added mbq_f16_added_to(const ggml_cgraph * graph, const int i) {
    const mbq_w4a8_added a = mbq_w4a8_added_to(graph, i);
    return mbq_f16_aligned(a.bias) && mbq_f16_aligned(a.more) && mbq_f16_aligned(a.out) ? a : mbq_w4a8_added { nullptr, nullptr, graph->nodes[i], 0 };
}

// Whether mbq_f16_fuse runs the node together with following nodes
static bool mbq_f16_runs(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, mbq_w4a8_added & a) {
    if (i + 1 >= graph->n_nodes || !mbq_f16_takes(ctx, graph->nodes[i])) {
        return false;
    }
    a = mbq_f16_added_to(graph, i);
    return a.nodes > 0 || ggml_op_is_empty(graph->nodes[i + 1]->op);
}

// The last reader of the result of node i, if all its readers are such products; -1: others may read it, see mbq_w4a8_fusion
static int mbq_f16_last_reader(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    const ggml_tensor * x = graph->nodes[i];
    const mbq_span lies = mbq_span_of(x);
    int last = -1, count = 0;
    mbq_w4a8_added a;
    for (int j = i + 1; j < std::min(graph->n_nodes, i + 1 + MBQ_W4A8_AHEAD); ++j) {
        const mbq_node n = mbq_w4a8_node(ctx, graph, j);
        const ggml_tensor * node = graph->nodes[j];
        if (n.x == x->data && node->src[1] == x && node->src[0] != x && mbq_f16_runs(ctx, graph, j, a)) {
            last = j;
            ++count;
        }
        if (mbq_overlap(n.writes, lies)) {
            break;
        }
    }
    return count == ggml_node_get_use_count(graph, i) && !(x->flags & GGML_TENSOR_FLAG_OUTPUT) && last < graph->n_nodes - 1 ? last : -1;
}

// Where to store the result of node i, which runs with the current node, as F16; nullptr: as floats
static half * mbq_f16_hold(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    const int last = mbq_f16_last_reader(ctx, graph, i);
    if (last < 0 || (inputs.f16 && inputs.f16_last > inputs.node)) {
        return nullptr;
    }
    inputs.f16      = graph->nodes[i];
    inputs.f16_last = last;
    return (half *) inputs.f16->data;
}
