#pragma once

// Finds activations that can be written as int8 directly (mbq-w4a8-codes.cuh): they have one static range for all columns, and only tiled products read them.
// They are stored in place of their floats, whose memory the graph keeps until the last reader.

#include "mbq-w4a8-added.cuh"

// The minimum number of columns for a GELU's product, and of queries for attention. With 4096 columns, a pass of a W8A8 tower takes 14.9 ms on an H200 this way
// and 15.2 with separate passes over floats. With 1024, it costs 0.1 ms of 4.5 for GELU (by the clock) and saves 0.04 of 4.0 for attention. Nothing in between
// was measured. A likely reason: the following product can load its weights while a pass over floats runs, but not while another product does.
static constexpr int64_t MBQ_W4A8_PLACED_COLUMNS = 2048, MBQ_W4A8_PLACED_QUERIES = 512;

// Where to store the result of node i, which runs with the current node, as codes; q == nullptr: as floats
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
    for (int j = inputs.node; j <= i; ++j) { // mbq_w4a8_readers_after checks later nodes
        if (mbq_overlap(mbq_w4a8_node(ctx, graph, j).writes, a.ranges)) {
            return {};
        }
    }
    const mbq_w4a8_readers readers = mbq_w4a8_readers_after(ctx, graph, i, a);
    if (readers.count == 0 || readers.count != ggml_node_get_use_count(graph, i) || (x->flags & GGML_TENSOR_FLAG_OUTPUT) || readers.last == graph->n_nodes - 1) {
        return {}; // others may read it, see mbq_w4a8_fusion
    }
    inputs.placed      = mbq_w4a8_int8::at((char *) x->data, x->ne[0], x->ne[1], a.order, n_flags);
    inputs.placed_of   = a;
    inputs.placed_last = readers.last;
    return { inputs.placed.q, inputs.placed.scale, inputs.placed.flags, n_flags, (const float *) a.ranges->data, (int) x->ne[0], function };
}

// For a GELU after the product at node i and its additions
static mbq_w4a8_codes mbq_w4a8_place_gelu(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const mbq_w4a8_added & a) {
    const int gelu = i + a.nodes + 1;
    const mbq_w4a8_matrix m = mbq_w4a8_matrix_of(graph->nodes[i], a);
    if (a.more || m.M % 256 != 0 || !m.dense() || gelu >= graph->n_nodes || !ggml_can_fuse(graph, gelu - 1, { a.out->op, GGML_OP_UNARY })) {
        return {};
    }
    const mbq_w4a8_function function = mbq_w4a8_function_of(graph->nodes[gelu]);
    if (function == MBQ_W4A8_NONE || mbq_overlap(graph->nodes[gelu], graph->nodes[i]->src[1])) { // which may be stored there as codes
        return {};
    }
    return mbq_w4a8_place(ctx, graph, gelu, function);
}
