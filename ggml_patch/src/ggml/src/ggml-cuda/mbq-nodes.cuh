#pragma once

// Properties of nodes for looking ahead in a graph, computed once per graph: a product or a norm inspects up to 64 following nodes, and finding out what one of
// them writes takes about 180 instructions. Only graphs numbered by a scheduler are cached; others may change unnoticed, so they are inspected each time.

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <vector>

struct mbq_span { // of memory; empty: none
    const char * begin = nullptr, * end = nullptr;
};

// The memory of t, which may be nullptr. Like ggml_nbytes, which takes 110 instructions
static mbq_span mbq_span_of(const ggml_tensor * t) {
    if (!t) {
        return {};
    }
    const char * begin = (const char *) t->data;
    if (t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_F16) {
        return { begin, begin + ggml_nbytes(t) };
    }
    const size_t last = (t->ne[0] - 1)*t->nb[0] + (t->ne[1] - 1)*t->nb[1] + (t->ne[2] - 1)*t->nb[2] + (t->ne[3] - 1)*t->nb[3];
    return { begin, begin + last + (t->type == GGML_TYPE_F32 ? sizeof(float) : sizeof(ggml_fp16_t)) };
}

// The memory that a node writes: more than its tensor if its kernels store something after it, as attention does
static mbq_span mbq_written_by(const ggml_tensor * node) {
    const char * begin = (const char *) node->data;
    return node->buffer ? mbq_span { begin, begin + ggml_backend_buft_get_alloc_size(node->buffer->buft, node) } : mbq_span_of(node);
}

static bool mbq_overlap(const mbq_span & a, const mbq_span & b) {
    return a.begin < b.end && b.begin < a.end;
}

static bool mbq_overlap(const mbq_span & a, const ggml_tensor * t) {
    return a.begin <= t->data ? t->data < a.end : a.begin < mbq_span_of(t).end;
}

static bool mbq_overlap(const ggml_tensor * a, const ggml_tensor * b) { // only the size of the lower one matters
    return a->data <= b->data ? b->data < mbq_span_of(a).end : a->data < mbq_span_of(b).end;
}

static bool mbq_runs(const ggml_tensor * node) { // see ggml_cuda_graph_evaluate_and_capture
    return !ggml_is_empty(node) && !ggml_op_is_empty(node->op) && (node->flags & GGML_TENSOR_FLAG_COMPUTE);
}

struct mbq_node {
    mbq_span writes;        // empty: it does not run
    const void * x = nullptr; // for a product: the address of its activations

    bool runs() const { return writes.begin != nullptr; }
};

static mbq_node mbq_node_of(const ggml_tensor * node) {
    return mbq_runs(node) ? mbq_node { mbq_written_by(node), node->op == GGML_OP_MUL_MAT ? node->src[1]->data : nullptr } : mbq_node {};
}

struct mbq_nodes {
    uint64_t uid = 0; // of the graph; 0: none
    std::vector<mbq_node> nodes;

    void find(const ggml_cgraph * graph) {
        if (graph->uid == 0 || graph->uid == uid) {
            return;
        }
        uid = graph->uid;
        nodes.resize(graph->n_nodes);
        for (int i = 0; i < graph->n_nodes; ++i) {
            nodes[i] = mbq_node_of(graph->nodes[i]);
        }
    }

    mbq_node at(const ggml_cgraph * graph, const int i) const {
        return graph->uid != 0 && graph->uid == uid ? nodes[i] : mbq_node_of(graph->nodes[i]);
    }
};
