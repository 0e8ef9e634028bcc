#pragma once

// Decides what the product of q, k and v prepares for attention instead of later nodes (mbq-qkv.cuh): values as F16, and rotary embeddings of q and k (mbq-w4a8-heads.cuh)

#include "mbq-qkv.cuh"

// The attention after node i, a product of q, k and v, if mbq_qkv_runs holds for it; its node or -1, and the node of its queries' rotary embedding. made: nodes that
// run with node i
static int mbq_qkv_ahead(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const std::vector<int> & made, mbq_qkv_nodes & n, int & rope) {
    rope = i + 1;
    while (rope < std::min(graph->n_nodes, i + 1 + MBQ_W4A8_AHEAD) && graph->nodes[rope]->op != GGML_OP_ROPE) {
        ++rope;
    }
    const int attention = rope < graph->n_nodes ? mbq_qkv_find(graph, rope, n) : -1;
    return attention >= 0 && mbq_qkv_runs(ctx, graph, rope, attention, made, n) ? attention : -1;
}

// Whether attention can read its values where their product, at node i, stores them as F16: nothing else reads them, and the memory is not used before attention is done
static bool mbq_qkv_keeps_values(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int attention, const mbq_qkv_nodes & n) {
    const ggml_tensor * values = n.x(2);
    for (int j = i; j <= attention; ++j) {
        const ggml_tensor * node = graph->nodes[j];
        const bool of_values = node == values || node == values->src[0] || node == n.v16->src[0] || node == n.v16;
        if (of_values && !mbq_qkv_alone(graph, j)) {
            return false;
        }
        if (j > n.last && mbq_overlap(mbq_w4a8_node(ctx, graph, j).writes, values)) {
            return false;
        }
    }
    return values->op == GGML_OP_RESHAPE && values->src[0]->data == values->data;
}

// Whether the product at node i, which computes q, k and v, can apply the rotary embeddings of q and k: nothing else reads their floats, nothing else runs until their
// rotary embeddings, at node `rope`, and what the product then writes early does not overlap its input. That is int8 in pool memory, so the original floats may be overwritten.
static bool mbq_qkv_turns(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int rope, const std::vector<int> & made, const mbq_qkv_nodes & n) {
    const ggml_tensor * x = graph->nodes[i]->src[1];
    const bool placed = mbq_w4a8_inputs(ctx).has_placed({ x, graph->nodes[i]->src[2], MBQ_W4A8_TILES });
    if (n.q->ne[0] % 16 != 0 || (uintptr_t) n.k16->data % 16 != 0 || (placed && (mbq_overlap(x, n.q) || mbq_overlap(x, n.k16)))) {
        return false;
    }
    for (const int k : { 0, 1 }) {
        if (n.x(k)->op != GGML_OP_RESHAPE || n.x(k)->src[0]->data != n.x(k)->data) {
            return false;
        }
    }
    for (int j = i; j < n.last; ++j) {
        const ggml_tensor * node = graph->nodes[j];
        const bool of_heads = node == n.x(0) || node == n.x(0)->src[0] || node == n.x(1) || node == n.x(1)->src[0];
        const bool is_made  = j >= rope || j == i || node == n.x(0)->src[0] || mbq_w4a8_is_in(made, j) || mbq_w4a8_is_in(made, j - 1); // behind: mbq_qkv_may_run
        if ((of_heads && !mbq_qkv_alone(graph, j)) || (!is_made && mbq_w4a8_node(ctx, graph, j).runs())) {
            return false;
        }
    }
    return true;
}

struct mbq_qkv_ready {
    const ggml_tensor * values, * turned; // see ggml_cuda_w4a8_inputs
};

// What the product of q, k and v, at node i, prepares for attention: how it stores m, the three of them
static mbq_qkv_ready mbq_qkv_make_ready(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const std::vector<int> & made, mbq_w4a8_matrix * m) {
    mbq_qkv_nodes n;
    int rope = 0;
    const int attention = mbq_qkv_ahead(ctx, graph, i, made, n, rope);
    mbq_w4a8_matrix * of[3] = {};
    for (int k = 0; attention >= 0 && k < 3; ++k) {
        const auto found = std::find_if(m, m + 3, [&](const mbq_w4a8_matrix & mk) { return mk.dst == n.x(k)->data; });
        of[k] = found < m + 3 && !found->more ? found : nullptr;
    }
    if (!of[0] || !of[1] || !of[2] || of[2] == m || !mbq_qkv_keeps_values(ctx, graph, i, attention, n)) {
        return {};
    }
    of[2]->halves = true;
    if (!mbq_qkv_turns(ctx, graph, i, rope, made, n)) {
        return { n.x(2), nullptr };
    }
    const mbq_rope_angles angles = mbq_rope_angles_of(n.q);
    const int64_t head = n.q->ne[0], column = head*n.q->ne[1];
    const auto heads = [&](mbq_w4a8_matrix & to, void * dst, const int64_t dst_column, const int64_t dst_head, const float turn) {
        to.angles     = angles;
        to.dst        = (float *) dst;
        to.dst_column = dst_column;
        to.dst_head   = dst_head;
        to.turn       = turn;
    };
    heads(*of[0], n.q->data, 2*column, 2*head, mbq_qkv_scale(n)); // each head starts where its floats would start
    heads(*of[1], n.k16->data, head, head*n.q->ne[2], 1.0f);
    heads(*of[2], of[2]->dst, 2*column, head, 0.0f);
    return { n.x(2), n.q };
}
