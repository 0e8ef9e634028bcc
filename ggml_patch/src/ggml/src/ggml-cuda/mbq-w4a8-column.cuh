#pragma once

// Finds the products of one column that one kernel can compute together, with the nodes added to them (mbq-w4a8-one.cuh):
//
//   graph     norm   q    bias   rope   v    bias   k    bias   rope ...
//   kernels          q + bias, v + bias, k + bias
//                                rope                           rope
//
// v and k are computed ahead of their turn. Tensors share memory, so their addresses show whether this is possible; the scheduler is asked to place them such
// that it is (mbq_w4a8_early_until).

#include "mbq-w4a8-inputs.cuh"

#include <climits>

static constexpr int W4A8_LONGEST = 2*1024*16; // maximum activations of a column that a CTA of mbq_w4a8_quantize holds

// Whether the kernels here support the product dst
static bool mbq_w4a8_takes(const ggml_tensor * dst) {
    if (!ggml_is_row_scale_mul_mat(dst) || dst->type != GGML_TYPE_F32) {
        return false;
    }
    return dst->src[0]->ne[0] <= W4A8_LONGEST && dst->src[0]->ne[1] <= INT_MAX/2 && dst->src[1]->ne[1] <= INT_MAX/2;
}

// Whether they do, dst has one matrix, and ggml_cuda_mul_mat dispatches it to them
static bool mbq_w4a8_takes_whole(const ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    return mbq_w4a8_takes(dst) && dst->ne[2]*dst->ne[3] == 1 &&
        !(src0->view_src && src0->buffer && ggml_backend_buffer_get_usage(src0->buffer) == GGML_BACKEND_BUFFER_USAGE_COMPUTE);
}

// Whether mbq_w4a8_mmv runs the node, with activations as floats
static bool mbq_w4a8_one_column(const ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT && node->ne[1] == 1 && mbq_w4a8_takes_whole(node) && mbq_w4a8_order_of(ctx, node) == MBQ_W4A8_FLOATS;
}

// Every CTA reads the column and its range while others write: neither may overlap the result.
static bool mbq_w4a8_reads_apart(const ggml_tensor * product, const ggml_tensor * out) {
    return out->type == GGML_TYPE_F32 && ggml_is_contiguous(out) && !mbq_overlap(product->src[1], out) &&
        !(product->src[2] && mbq_overlap(product->src[2], out));
}

static bool mbq_w4a8_same_column(const ggml_tensor * a, const ggml_tensor * b) { // products with the same activations, and weights of the same row size
    return a->src[0]->type == b->src[0]->type && a->src[0]->nb[1] == b->src[0]->nb[1] && mbq_w4a8_same(a->src[1], b->src[1]) && mbq_w4a8_same(a->src[2], b->src[2]);
}

struct mbq_w4a8_sum { // out = product + bias, or product
    int node; // the product's node
    const ggml_tensor * product;
    const ggml_tensor * bias;
    ggml_tensor * out;
};

// The product at node i with its addition. It has two nodes: without an addition, the second one is a node that does nothing.
static bool mbq_w4a8_sum_at(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, mbq_w4a8_sum & s) {
    if (!mbq_w4a8_one_column(ctx, graph->nodes[i]) || i + 1 == graph->n_nodes) {
        return false;
    }
    s = { i, graph->nodes[i], nullptr, graph->nodes[i] };
    if (ggml_can_fuse(graph, i, { GGML_OP_MUL_MAT, GGML_OP_ADD })) {
        s.out  = graph->nodes[i + 1];
        s.bias = s.out->src[s.out->src[0] == s.product];
        return s.bias != s.product && s.bias->type == GGML_TYPE_F32 && ggml_is_contiguous(s.bias) && ggml_are_same_shape(s.bias, s.product) &&
            mbq_w4a8_reads_apart(s.product, s.out) && (s.bias->data == s.out->data || !mbq_overlap(s.bias, s.out));
    }
    return ggml_op_is_empty(graph->nodes[i + 1]->op) && mbq_w4a8_reads_apart(s.product, s.out);
}

// Whether a sum can run early, at node i: no node in between reads or writes its output, or writes its bias
static bool mbq_w4a8_may_be_early(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const mbq_w4a8_sum & s) {
    const mbq_span out = mbq_span_of(s.out), bias = mbq_span_of(s.bias);
    for (int k = i; k < s.node; ++k) {
        const mbq_node n = mbq_w4a8_node(ctx, graph, k);
        if (!n.runs()) {
            continue;
        }
        if (mbq_overlap(n.writes, out) || mbq_overlap(n.writes, bias)) {
            return false;
        }
        for (const ggml_tensor * src : graph->nodes[k]->src) {
            if (src && mbq_overlap(out, src)) {
                return false;
            }
        }
    }
    return true;
}

static bool mbq_w4a8_is_in(const std::vector<int> & nodes, const int i) {
    return std::find(nodes.begin(), nodes.end(), i) != nodes.end();
}

// The sum at node i and later ones of the same column that have not run yet, at most `most`; empty if node i is no such sum
static std::vector<mbq_w4a8_sum> mbq_w4a8_sums_from(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const size_t most,
        const std::vector<int> & made) {
    std::vector<mbq_w4a8_sum> sums;
    mbq_w4a8_sum s;
    if (!mbq_w4a8_sum_at(ctx, graph, i, s)) {
        return sums;
    }
    sums.push_back(s);
    const ggml_tensor * first = s.product;
    const mbq_span x = mbq_span_of(first->src[1]), ranges = mbq_span_of(first->src[2]);
    for (int j = i + 1; sums.size() < most && j < std::min(graph->n_nodes, i + 1 + MBQ_W4A8_AHEAD); ++j) {
        const mbq_node n = mbq_w4a8_node(ctx, graph, j);
        if (n.x == first->src[1]->data && !mbq_w4a8_is_in(made, j) && mbq_w4a8_same_column(first, graph->nodes[j]) && mbq_w4a8_sum_at(ctx, graph, j, s) &&
                mbq_w4a8_may_be_early(ctx, graph, i, s)) {
            sums.push_back(s);
        }
        if (mbq_overlap(n.writes, x) || mbq_overlap(n.writes, ranges)) {
            break;
        }
    }
    return sums;
}

// Before a graph is allocated, and independent of its number of columns: the last node of the sums that could run with the one at node i; i if there are none.
static int mbq_w4a8_early_until(const ggml_cgraph * graph, const int i) {
    const auto is_sum = [&](const int j) {
        const ggml_tensor * node = graph->nodes[j];
        return ggml_is_row_scale_mul_mat(node) && j + 1 < graph->n_nodes && (graph->nodes[j + 1]->op == GGML_OP_ADD || ggml_op_is_empty(graph->nodes[j + 1]->op));
    };
    int last = i;
    if (!is_sum(i)) {
        return last;
    }
    for (int j = i + 1; j < std::min(graph->n_nodes, i + 1 + MBQ_W4A8_AHEAD); ++j) {
        const ggml_tensor * node = graph->nodes[j];
        if (node->src[1] == graph->nodes[i]->src[1] && is_sum(j) && node->src[0]->type == graph->nodes[i]->src[0]->type) {
            last = graph->nodes[j + 1]->op == GGML_OP_ADD ? j + 1 : j;
        }
    }
    return last;
}
