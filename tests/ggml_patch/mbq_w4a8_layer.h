// A layer as llama.cpp builds it, for one column, with memory as its scheduler gives it: which products mbq-w4a8-column.cuh puts into one kernel. keep: places are kept as
// ggml_cuda_w4a8_keep asks. Prints the sums of each kernel. Part of mbq_w4a8_graphs.cu.

#pragma once

#include "mbq-w4a8-column.cuh"

#include "ggml-alloc.h"

#include <cstdio>

namespace layer_test {

struct layer {
    ggml_context * data  = ggml_init({ ggml_tensor_overhead()*64, nullptr, true });
    ggml_context * nodes = ggml_init({ ggml_tensor_overhead()*512 + 2*ggml_graph_overhead(), nullptr, true });
    ggml_cgraph  * graph = ggml_new_graph(nodes);

    ggml_tensor * floats(const int64_t k, const int64_t n = 1) { return ggml_new_tensor_2d(data, GGML_TYPE_F32, k, n); }

    ggml_tensor * product(ggml_tensor * x, const int64_t m) {
        ggml_tensor * w = ggml_new_tensor_2d(data, GGML_TYPE_Q4_0, x->ne[0], m);
        w->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
        w->op_params[0] = MBQ_W4A8_FLOATS;
        return ggml_mul_mat(nodes, w, x);
    }

    ggml_tensor * heads(ggml_tensor * x, const int64_t n, const bool bias, const bool norm, ggml_tensor * pos) { // pos: with rope
        ggml_tensor * t = product(x, 128*n);
        t = ggml_reshape_3d(nodes, bias ? ggml_add(nodes, t, floats(128*n)) : t, 128, n, 1);
        t = norm ? ggml_mul(nodes, ggml_rms_norm(nodes, t, 1e-6f), floats(128)) : t;
        return pos ? ggml_rope_ext(nodes, t, pos, nullptr, 128, GGML_ROPE_TYPE_NEOX, 32768, 1e6f, 1, 0, 1, 32, 1) : t;
    }

    layer(const bool bias, const bool norm) {
        ggml_tensor * pos = ggml_new_tensor_1d(data, GGML_TYPE_I32, 1);
        ggml_tensor * ids = ggml_new_tensor_1d(data, GGML_TYPE_I64, 1);
        ggml_tensor * x   = ggml_scale(nodes, floats(1024), 2.0f);
        ggml_tensor * y   = ggml_mul(nodes, ggml_rms_norm(nodes, x, 1e-6f), floats(1024));
        ggml_tensor * q   = heads(y, 8, bias, norm, pos);
        ggml_tensor * k   = heads(y, 2, bias, norm, pos);
        ggml_tensor * v   = heads(y, 2, bias, false, nullptr);
        for (ggml_tensor * t : { q, v, k }) { ggml_build_forward_expand(graph, t); } // as llm_graph_context::build_attn
        for (ggml_tensor * t : { k, v }) { ggml_build_forward_expand(graph, ggml_set_rows(nodes, floats(256, 64), ggml_reshape_2d(nodes, t, 256, 1), ids)); }
        x = ggml_add(nodes, product(ggml_scale(nodes, ggml_reshape_2d(nodes, q, 1024, 1), 0.5f), 1024), x);
        ggml_build_forward_expand(graph, x);
    }

    // As ggml_backend_sched does it: behind the last node a node that does nothing and reads what is kept
    ggml_cgraph * with_kept(const bool keep) {
        ggml_cgraph * all = ggml_new_graph(nodes);
        std::vector<std::vector<ggml_tensor *>> kept(graph->n_nodes);
        for (int i = 0; i < graph->n_nodes; ++i) {
            for (int k = i, last = keep ? mbq_w4a8_early_until(graph, i) : i; k < last; ++k) {
                kept[last].push_back(graph->nodes[k]);
                for (ggml_tensor * src : graph->nodes[k]->src) {
                    if (src) { kept[last].push_back(src); }
                }
            }
        }
        for (int i = 0; i < graph->n_nodes; ++i) {
            all->nodes[all->n_nodes++] = graph->nodes[i];
            for (size_t k = 0; k < kept[i].size(); ++k) {
                if (k % GGML_MAX_SRC == 0) { all->nodes[all->n_nodes++] = ggml_new_tensor_1d(nodes, GGML_TYPE_F32, 1); }
                all->nodes[all->n_nodes - 1]->src[k % GGML_MAX_SRC] = kept[i][k];
            }
        }
        std::copy_n(graph->leafs, all->n_leafs = graph->n_leafs, all->leafs);
        return all;
    }
};

static int run(const bool bias, const bool norm, const bool keep) {
    layer l(bias, norm);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(l.data, ggml_backend_cpu_buffer_type());
    ggml_gallocr_t alloc = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    GGML_ASSERT(ggml_gallocr_alloc_graph(alloc, l.with_kept(keep)));
    ggml_backend_cuda_context & cuda = *new ggml_backend_cuda_context(0);
    std::vector<int> made;
    for (int i = 0; i < l.graph->n_nodes; ++i) {
        if (!mbq_w4a8_is_in(made, i) && l.graph->nodes[i]->op == GGML_OP_MUL_MAT) {
            const std::vector<mbq_w4a8_sum> sums = mbq_w4a8_sums_from(cuda, l.graph, i, 3, made);
            for (const mbq_w4a8_sum & s : sums) { made.push_back(s.node); }
            printf("%zu ", sums.size());
        }
    }
    printf("\n");
    ggml_gallocr_free(alloc);
    ggml_backend_buffer_free(buffer);
    return 0;
}

} // namespace layer_test
