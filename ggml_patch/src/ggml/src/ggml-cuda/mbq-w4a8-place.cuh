#pragma once

// Where a graph has activations that can be made as int8 at once (mbq-w4a8-codes.cuh): one static range for all columns, and no reader but products of tiles. They lie
// in the place of their floats, which the graph keeps for them until the last reader.

#include "mbq-w4a8-added.cuh"

// The least number of columns for a GELU's product, and of queries for attention. With 4096 columns a W8A8 tower's pass takes 14.9 ms of an H200 this way and 15.2 with
// separate passes over floats. With 1024, GELU this way costs 0.1 ms of 4.5 (by the clock), attention saves 0.04 of 4.0. Nothing in between was measured. A likely reason:
// next to a pass over floats the following product has room to load its weights, which it has not next to another product.
static constexpr int64_t MBQ_W4A8_PLACED_COLUMNS = 2048, MBQ_W4A8_PLACED_QUERIES = 512;

// Where the result of node i, which runs with the node at which the graph is, is to lie as codes; q == nullptr: in floats
static mbq_w4a8_codes mbq_w4a8_place(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const mbq_w4a8_function function) {
    ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    const ggml_tensor * x = graph->nodes[i];
    const mbq_w4a8_activations a = { x, mbq_w4a8_next_ranges(ctx, graph, i, x), MBQ_W4A8_TILES };
    const int n_flags = mbq_w4a8_n_flags(ctx, a.order);
    const int64_t least = function == MBQ_W4A8_NONE ? MBQ_W4A8_PLACED_QUERIES : MBQ_W4A8_PLACED_COLUMNS;
    if (x->type != GGML_TYPE_F32 || !ggml_is_contiguous(x) || x->ne[2]*x->ne[3] != 1 || x->ne[0] % 256 != 0 || x->ne[1] < least ||
            (uintptr_t) x->data % 16 != 0 || !a.ranges || a.ranges->nb[1] != 0 || inputs.node <= inputs.placed_last) {
        return {};
    }
    GGML_ASSERT(mbq_w4a8_int8::bytes(x->ne[0], x->ne[1], a.order, n_flags) <= ggml_nbytes(x));
    for (int j = inputs.node; j <= i; ++j) { // behind that: mbq_w4a8_readers_after
        if (mbq_overlap(mbq_w4a8_node(ctx, graph, j).writes, a.ranges)) {
            return {};
        }
    }
    const mbq_w4a8_readers readers = mbq_w4a8_readers_after(ctx, graph, i, a);
    if (readers.count == 0 || readers.count != ggml_node_get_use_count(graph, i) || (x->flags & GGML_TENSOR_FLAG_OUTPUT) || readers.last == graph->n_nodes - 1) {
        return {}; // others may look at it, see mbq_w4a8_fusion
    }
    inputs.placed      = mbq_w4a8_int8::at((char *) x->data, x->ne[0], x->ne[1], a.order, n_flags);
    inputs.placed_of   = a;
    inputs.placed_last = readers.last;
    return { inputs.placed.q, inputs.placed.scale, inputs.placed.flags, n_flags, (const float *) a.ranges->data, (int) x->ne[0], function };
}

// Of a GELU behind the product at node i and what is added to it
static mbq_w4a8_codes mbq_w4a8_place_gelu(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const mbq_w4a8_added & a) {
    const int gelu = i + a.nodes + 1;
    const mbq_w4a8_matrix m = mbq_w4a8_matrix_of(graph->nodes[i], a);
    if (a.more || m.M % 256 != 0 || !m.dense() || gelu >= graph->n_nodes || !ggml_can_fuse(graph, gelu - 1, { a.out->op, GGML_OP_UNARY })) {
        return {};
    }
    const mbq_w4a8_function function = mbq_w4a8_function_of(graph->nodes[gelu]);
    if (function == MBQ_W4A8_NONE || mbq_overlap(graph->nodes[gelu], graph->nodes[i]->src[1])) { // which may be codes there
        return {};
    }
    return mbq_w4a8_place(ctx, graph, gelu, function);
}
