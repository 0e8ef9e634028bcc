#pragma once

// One quantisation pass for all products of a graph that read the same activations (q, k and v; gate and up).
//
//   graph     ... norm   q    bias  rope   k    bias   v ...
//                        |                 |           |
//   int8                 made, held        found       found, freed
//
// The node that quantises looks ahead in the graph. A later product with the same addresses, shape, strides, static ranges and int8 order reuses the result,
// unless a node in between writes to these addresses (the allocator reuses a tensor's memory as soon as the tensor has been read). The last such product is
// known before the first one runs, so held activations need no key that could become stale. Nothing is held from one graph to the next: a CUDA graph
// captures the pass with all of its readers, or none of them.
//
// Memory comes from the pool, whose blocks are freed in reverse order: one input is held at a time, and allocated while no other block is. Each stream has its
// own pool: with several concurrent streams (GGML_CUDA_GRAPH_OPT) nothing is shared.

#include "common.cuh"
#include "ggml-row-scale.h"
#include "mbq-nodes.cuh"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

static constexpr int MBQ_W4A8_AHEAD       = 64; // how many nodes are searched: the readers within a layer are closer together
static constexpr int MBQ_W4A8_FEW_COLUMNS = 8;  // more: mbq_w4a8_gemm, or this many at a time on GPUs without wgmma

// The format of a product's activations: see mbq-w4a8-quantize.cuh
enum mbq_w4a8_order {
    MBQ_W4A8_FLOATS,  // the product quantises them itself, or in several passes
    MBQ_W4A8_RECORDS,
    MBQ_W4A8_TILES,
};

static mbq_w4a8_order mbq_w4a8_order_of(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst); // mbq-w4a8.cu

// Activations as int8, with the scale of each column and flags for mbq_w4a8_gemm, which are 0 before and after it
struct mbq_w4a8_int8 {
    int4  * q;
    float * scale;
    int   * flags;
    int   n_flags;

    // Places them in memory for K times N activations, of size bytes(...)
    static mbq_w4a8_int8 at(char * memory, const int64_t K, const int64_t N, const mbq_w4a8_order order, const int n_flags) {
        char * scale = memory + q_bytes(K, N, order);
        return { (int4 *) memory, (float *) scale, (int *) scale + N, n_flags };
    }

    static size_t bytes(const int64_t K, const int64_t N, const mbq_w4a8_order order, const int n_flags) {
        return q_bytes(K, N, order) + (N + n_flags)*4;
    }

    static size_t q_bytes(const int64_t K, const int64_t N, const mbq_w4a8_order order) {
        return GGML_PAD(K, 256)*(order == MBQ_W4A8_TILES ? GGML_PAD(N, 256) : N); // columns after the last one are computed too, and dropped
    }
};

// The activations that a product reads
struct mbq_w4a8_activations {
    const ggml_tensor * x;
    const ggml_tensor * ranges; // static ranges, its src[2], or nullptr
    mbq_w4a8_order order;
};

static bool mbq_w4a8_same(const ggml_tensor * a, const ggml_tensor * b) {
    return a == b || (a && b && a->data == b->data && ggml_are_same_shape(a, b) && ggml_are_same_stride(a, b));
}

static bool mbq_w4a8_same(const mbq_w4a8_activations & a, const mbq_w4a8_activations & b) {
    return a.order == b.order && mbq_w4a8_same(a.x, b.x) && mbq_w4a8_same(a.ranges, b.ranges);
}

struct ggml_cuda_w4a8_inputs {
    const ggml_cgraph * graph = nullptr; // the current graph and node; nullptr: share nothing
    int node = 0;

    std::optional<ggml_cuda_pool_alloc<char>> memory; // memory of the held activations
    mbq_w4a8_int8        held = {};
    mbq_w4a8_activations of   = {};
    int  last   = 0;             // the last node that reads them
    bool floats = true;          // whether they exist as floats too

    const ggml_tensor * f16 = nullptr; // stored in place as F16 until node f16_last has read it (mbq-f16-inputs.cuh)
    int f16_last = 0;

    mbq_w4a8_int8        placed    = {}; // int8 stored in place until node placed_last has read it (mbq-w4a8-place.cuh)
    mbq_w4a8_activations placed_of = {};
    int placed_last = -1;

    const ggml_tensor * attention = nullptr; // the attention node whose queries are stored as F16 (mbq-qkv.cuh)
    const ggml_tensor * values    = nullptr; // stored as F16, each column at the start of its floats (mbq-qkv.cuh)
    const ggml_tensor * turned    = nullptr; // queries that their product has rotated, together with keys (mbq-w4a8-heads.cuh)

    std::vector<int> early; // nodes that have run ahead of their turn, each with the node after it (mbq-w4a8-one.cuh)
    mbq_nodes nodes;        // of the graph

    // To be called before node i of a graph
    void step(const ggml_backend_cuda_context & ctx, const ggml_cgraph * now, const int i) {
        if (memory && (now != graph || i <= node || i > last)) {
            memory.reset(); // in case a reader did not use them: this does not happen, but nothing held may outlive its graph
        }
        if (now != graph || i <= node) {
            early.clear();
            placed_last = -1;
            f16 = nullptr;
            attention = values = turned = nullptr;
        }
        nodes.find(now);
        early.erase(std::remove_if(early.begin(), early.end(), [i](const int j) { return j + 1 < i; }), early.end());
        graph = ctx.concurrent_stream_context.concurrent_events.empty() && ctx.curr_stream_no == 0 ? now : nullptr;
        node  = i;
    }

    bool runs(const ggml_tensor * dst) const {
        return graph && graph->nodes[node] == dst;
    }

    bool holds(const mbq_w4a8_activations & a) const {
        return memory && mbq_w4a8_same(a, of);
    }

    bool has_placed(const mbq_w4a8_activations & a) const {
        return node <= placed_last && mbq_w4a8_same(a, placed_of);
    }

    // Allocates memory for activations until node `to` has read them
    const mbq_w4a8_int8 & hold(ggml_cuda_pool & pool, const mbq_w4a8_activations & a, const int n_flags, const int to, const bool in_floats) {
        GGML_ASSERT(!memory);
        const int64_t K = a.x->ne[0], N = a.x->ne[1];
        held   = mbq_w4a8_int8::at(memory.emplace(pool, mbq_w4a8_int8::bytes(K, N, a.order, n_flags)).get(), K, N, a.order, n_flags);
        of     = a;
        last   = to;
        floats = in_floats;
        return held;
    }

    // To be called after the product at `node`
    void read() {
        if (node == last) {
            memory.reset();
        }
    }
};

static ggml_cuda_w4a8_inputs & mbq_w4a8_inputs(ggml_backend_cuda_context & ctx) {
    if (!ctx.w4a8_inputs) {
        ctx.w4a8_inputs = std::make_shared<ggml_cuda_w4a8_inputs>();
    }
    return *ctx.w4a8_inputs;
}

static mbq_node mbq_w4a8_node(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    return ctx.w4a8_inputs ? ctx.w4a8_inputs->nodes.at(graph, i) : mbq_node_of(graph->nodes[i]);
}

// The static ranges of the next product of x
static const ggml_tensor * mbq_w4a8_next_ranges(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const ggml_tensor * x) {
    for (int j = i + 1; j < std::min(graph->n_nodes, i + 1 + MBQ_W4A8_AHEAD); ++j) {
        if (mbq_w4a8_node(ctx, graph, j).x == x->data && mbq_w4a8_same(graph->nodes[j]->src[1], x)) {
            return graph->nodes[j]->src[2];
        }
    }
    return nullptr;
}

struct mbq_w4a8_readers {
    int first = -1;
    int last  = -1;
    int count = 0;
};

// The nodes after i that read the activations in this order while these and their ranges are unchanged
static mbq_w4a8_readers mbq_w4a8_readers_after(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const mbq_w4a8_activations & a) {
    mbq_w4a8_readers readers;
    const mbq_span x = mbq_span_of(a.x), ranges = mbq_span_of(a.ranges);
    int end = i + 1 + MBQ_W4A8_AHEAD;
    for (int j = i + 1; j < std::min(graph->n_nodes, end); ++j) {
        const mbq_node n = mbq_w4a8_node(ctx, graph, j);
        const ggml_tensor * node = graph->nodes[j];
        if (n.x == a.x->data && mbq_w4a8_same(node->src[1], a.x) && mbq_w4a8_same(node->src[2], a.ranges) && mbq_w4a8_order_of(ctx, node) == a.order) {
            readers.first = readers.count == 0 ? j : readers.first;
            readers.last  = j;
            readers.count++;
            end = j + 1 + MBQ_W4A8_AHEAD;
        } else if (mbq_overlap(n.writes, x) || mbq_overlap(n.writes, ranges)) {
            break;
        }
    }
    return readers;
}

// Returns the activations of dst, the current node, if they are held: found, or made by quantise(int8) because a later product reads them too. Otherwise
// nullptr. Call read() after the product.
template <typename Quantise>
static const mbq_w4a8_int8 * mbq_w4a8_share(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const mbq_w4a8_order order, const int n_flags, const Quantise & quantise) {
    ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    const mbq_w4a8_activations a = { dst->src[1], dst->src[2], order };
    if (order == MBQ_W4A8_FLOATS || !inputs.runs(dst)) {
        return nullptr;
    }
    if (inputs.has_placed(a)) {
        return &inputs.placed;
    }
    if (inputs.holds(a)) {
        return &inputs.held;
    }
    GGML_ASSERT(!inputs.memory || inputs.floats || !mbq_w4a8_same(a.x, inputs.of.x));
    const mbq_w4a8_readers readers = mbq_w4a8_readers_after(ctx, inputs.graph, inputs.node, a);
    if (inputs.memory || readers.count == 0) {
        return nullptr;
    }
    const mbq_w4a8_int8 & to = inputs.hold(ctx.pool(), a, n_flags, readers.last, true);
    quantise(to);
    return &to;
}
