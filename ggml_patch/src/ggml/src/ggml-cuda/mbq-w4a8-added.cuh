#pragma once

// Products of many columns fused with additions, and with other products of the same activations, in one kernel (mbq_w4a8_gemm):
//
//   MUL_MAT, ADD of a bias, ADD of the residual stream      either one, or both in this order
//   up to three of them: q, k and v, the later ones ahead of their turn, with a bias or none; gate and up
//
// The bits are those of the separate nodes. For one column: mbq-w4a8-one.cuh.

#include "mbq-w4a8-column.cuh"
#include "mbq-w4a8-launch.cuh"

struct mbq_w4a8_added {
    const ggml_tensor * bias, * more; // nullptr: none
    ggml_tensor * out;
    int nodes;                        // how many nodes after the product
};

// Whether the thread that writes an element of `out` also reads this element of t, or t does not overlap `out`.
static bool mbq_w4a8_read_in_place(const ggml_tensor * t, const ggml_tensor * out) {
    return (t->data == out->data && ggml_are_same_stride(t, out)) || !mbq_overlap(t, out);
}

static mbq_w4a8_added mbq_w4a8_added_to(const ggml_cgraph * graph, const int i) {
    mbq_w4a8_added a = { nullptr, nullptr, graph->nodes[i], 0 };
    while (!a.more && ggml_can_fuse(graph, i + a.nodes, { a.out->op, GGML_OP_ADD })) {
        ggml_tensor * sum = graph->nodes[i + a.nodes + 1];
        const ggml_tensor * other = sum->src[sum->src[0] == a.out];
        if (other == a.out || sum->type != GGML_TYPE_F32 || !ggml_is_contiguous(sum) || other->type != GGML_TYPE_F32) {
            break;
        }
        const bool is_bias = !a.bias && ggml_is_contiguous(other) && other->ne[0] == sum->ne[0] && ggml_nelements(other) == other->ne[0];
        const bool is_more = ggml_are_same_shape(other, sum) && other->nb[0] == sizeof(float);
        const ggml_tensor * bias = is_bias ? other : a.bias;
        if ((!is_bias && !(is_more && mbq_w4a8_read_in_place(other, sum))) || (bias && mbq_overlap(bias, sum))) {
            break;
        }
        (is_bias ? a.bias : a.more) = other;
        a.out = sum;
        a.nodes++;
    }
    return a;
}

// The product and its additions
static mbq_w4a8_matrix mbq_w4a8_matrix_of(const ggml_tensor * product, const mbq_w4a8_added & a) {
    mbq_w4a8_matrix m = mbq_w4a8_matrix_of(product, 0, 0);
    m.dst        = (float *) a.out->data;
    m.dst_column = a.out->nb[1]/sizeof(float);
    m.bias       = a.bias ? (const float *) a.bias->data : nullptr;
    if (a.more) {
        m.more        = (const float *) a.more->data;
        m.more_column = a.more->nb[1]/sizeof(float);
    }
    return m;
}

// Whether mbq_w4a8_gemm runs the node
static bool mbq_w4a8_of_tiles(const ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT && node->ne[1] > MBQ_W4A8_FEW_COLUMNS && mbq_w4a8_order_of(ctx, node) == MBQ_W4A8_TILES;
}

// The products after node i that can run with it. Each is the next node, or is followed by a node that does nothing or adds its bias: see mbq_w4a8_sums_from
static std::vector<std::pair<int, mbq_w4a8_added>> mbq_w4a8_others_of(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i,
        const std::vector<int> & made) {
    std::vector<std::pair<int, mbq_w4a8_added>> others;
    const ggml_tensor * first = graph->nodes[i];
    const auto dense = [](const ggml_tensor * node) { return mbq_w4a8_matrix_of(node, 0, 0).dense() && node->ne[0] % 2 == 0; };
    if (!dense(first)) {
        return others;
    }
    const mbq_span x = mbq_span_of(first->src[1]), ranges = mbq_span_of(first->src[2]);
    for (int j = i + 1; others.size() + 1 < MBQ_W4A8_MATRICES && j < std::min(graph->n_nodes - 1, i + 1 + MBQ_W4A8_AHEAD); ++j) {
        const mbq_node n = mbq_w4a8_node(ctx, graph, j);
        ggml_tensor * node = graph->nodes[j];
        if (n.x == first->src[1]->data && !mbq_w4a8_is_in(made, j) && mbq_w4a8_same_column(first, node) && mbq_w4a8_of_tiles(ctx, node) && dense(node)) {
            const mbq_w4a8_added a = mbq_w4a8_added_to(graph, j);
            const bool alone = a.nodes == 0 && (j == i + 1 || ggml_op_is_empty(graph->nodes[j + 1]->op));
            if ((alone || (a.nodes == 1 && a.bias)) && mbq_w4a8_may_be_early(ctx, graph, i, { j, node, a.bias, a.out })) {
                others.push_back({ j, a });
            }
        }
        if (mbq_overlap(n.writes, x) || mbq_overlap(n.writes, ranges)) {
            break;
        }
    }
    return others;
}
