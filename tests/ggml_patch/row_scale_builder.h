#pragma once

// Graphs of weights with one scale a row, or in F16, and a check of them: what a whole graph gives on a GPU against the same graph run node by node, where nothing is
// shared or fused; bit for bit. Prints for each what ggml_cuda_w4a8_count counts in the whole one.

#include "mbq-w4a8.cuh"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct builder {
    std::mt19937 rng { 1 };
    std::vector<ggml_tensor *> tensors; // with data of their own
    ggml_context * data  = ggml_init({ ggml_tensor_overhead()*256, nullptr, true });
    ggml_context * nodes = ggml_init({ ggml_tensor_overhead()*1024 + ggml_graph_overhead(), nullptr, true });
    ggml_cgraph  * graph = ggml_new_graph(nodes);
    std::vector<ggml_tensor *> outputs;
    ggml_tensor * ranges = nullptr;

    ggml_tensor * floats(const int64_t k, const int64_t n) {
        return tensors.emplace_back(ggml_new_tensor_2d(data, GGML_TYPE_F32, k, n));
    }

    ggml_tensor * weight(const ggml_type type, const int64_t k, const int64_t m) {
        ggml_tensor * w = tensors.emplace_back(ggml_new_tensor_2d(data, type, k, m));
        w->flags |= type == GGML_TYPE_F16 ? 0 : GGML_TENSOR_FLAG_ROW_SCALE;
        return w;
    }

    ggml_tensor * product(ggml_tensor * x, const int64_t m, const ggml_type type = GGML_TYPE_Q4_0) {
        ggml_tensor * y = ggml_mul_mat(nodes, weight(type, x->ne[0], m), x);
        y->src[2] = ranges;
        return y;
    }

    // Static ranges for all products to come: a column of a table that the graph computes, of positive numbers, which count, and others
    void make_ranges(const int64_t n, const bool early) {
        ggml_tensor * table = ggml_scale(nodes, floats(3, n), 2.0f);
        ranges = ggml_view_2d(nodes, table, 1, n, table->nb[1], sizeof(float));
        if (early) { ggml_build_forward_expand(graph, ranges); }
    }

    // One static range for all columns of all products to come
    void make_range(const int64_t n) {
        ggml_tensor * range = ggml_scale_bias(nodes, ggml_sqr(nodes, floats(1, 1)), 1.0f, 0.5f);
        ranges = ggml_view_1d(nodes, range, 1, 0);
        ranges->ne[1] = n; // one value for all, where ggml_view_2d would want n
        ranges->nb[1] = ranges->nb[2] = ranges->nb[3] = 0;
        ggml_build_forward_expand(graph, ranges);
    }

    ggml_tensor * output(ggml_tensor * t) {
        ggml_set_output(t);
        ggml_build_forward_expand(graph, t);
        return outputs.emplace_back(t);
    }

    // Its memory is nobody else's until here: what the scheduler does for ggml_cuda_w4a8_keep
    void keep(ggml_tensor * t) {
        ggml_tensor * dependency = ggml_view_tensor(nodes, t);
        dependency->src[0] = t;
        graph->nodes[graph->n_nodes++] = dependency;
    }

    ggml_tensor * norm(ggml_tensor * x) {
        return ggml_mul(nodes, ggml_rms_norm(nodes, x, 1e-6f), floats(x->ne[0], 1));
    }

    ggml_tensor * biased(ggml_tensor * x) {
        return ggml_add(nodes, x, floats(x->ne[0], 1));
    }

    ggml_tensor * layer_norm(ggml_tensor * x) {
        return biased(ggml_mul(nodes, ggml_norm(nodes, x, 1e-6f), floats(x->ne[0], 1)));
    }

    ggml_tensor * hadamard(ggml_tensor * x, const int64_t n) {
        ggml_tensor * had = floats(n, n);
        ggml_set_name(had, "hadamard");
        ggml_tensor * y = ggml_mul_mat(nodes, had, ggml_reshape_2d(nodes, x, n, ggml_nelements(x)/n));
        ggml_set_op_params_i32(y, 1, GGML_HINT_SRC0_IS_HADAMARD);
        return ggml_reshape_2d(nodes, y, x->ne[0], x->ne[1]);
    }

    // One dense layer; attention is a sum, which reads q, k and v late as attention does
    ggml_tensor * layer(ggml_tensor * x, const int64_t kv, const int64_t ff, const int64_t had) {
        ggml_tensor * y = norm(x);
        ggml_tensor * q = ggml_add(nodes, product(y, x->ne[0]), floats(x->ne[0], 1));
        ggml_build_forward_expand(graph, q);
        ggml_tensor * v = ggml_add(nodes, product(y, kv, GGML_TYPE_Q8_0), floats(kv, 1));
        ggml_build_forward_expand(graph, v);
        ggml_tensor * k = ggml_add(nodes, product(y, kv), floats(kv, 1));
        ggml_build_forward_expand(graph, k);
        ggml_tensor * attention = ggml_add(nodes, q, ggml_repeat(nodes, ggml_mul(nodes, k, v), q));
        x = ggml_add(nodes, product(attention, x->ne[0]), x);
        y = norm(x);
        ggml_tensor * up = product(y, ff);
        ggml_tensor * h  = ggml_swiglu_split(nodes, product(y, ff), up);
        if (had > 0) {
            h = hadamard(h, had);
        }
        return ggml_add(nodes, product(h, x->ne[0]), x);
    }

    void fill(ggml_tensor * t) {
        std::normal_distribution<float> normal;
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        if (t->type == GGML_TYPE_F32) {
            const int64_t n = t->ne[0];
            for (int64_t i = 0; i < ggml_nelements(t); ++i) {
                const bool negative = __builtin_popcountll((i / n) & (i % n)) % 2;
                ((float *) bytes.data())[i] = strcmp(t->name, "hadamard") == 0 ? (negative ? -1.0f : 1.0f)/sqrtf(n) : normal(rng);
            }
        } else if (t->type == GGML_TYPE_F16) {
            for (size_t i = 0; i < bytes.size(); i += 2) {
                const ggml_fp16_t h = ggml_fp32_to_fp16(normal(rng)/sqrtf(t->ne[0]));
                memcpy(&bytes[i], &h, 2);
            }
        } else {
            const size_t block = ggml_type_size(t->type);
            for (size_t i = 0; i < bytes.size(); i += block) {
                const float d = 0.02f/(1 + i*32/block/t->ne[0] % 7)/(t->type == GGML_TYPE_Q4_0 ? 4 : 64);
                const ggml_fp16_t h = ggml_fp32_to_fp16(d);
                memcpy(&bytes[i], &h, 2);
                for (size_t j = 2; j < block; ++j) { bytes[i + j] = rng(); }
            }
        }
        ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
    }
};

static std::vector<std::vector<uint8_t>> read(const std::vector<ggml_tensor *> & tensors) {
    std::vector<std::vector<uint8_t>> all;
    for (const ggml_tensor * t : tensors) {
        ggml_backend_tensor_get(t, all.emplace_back(ggml_nbytes(t)).data(), 0, ggml_nbytes(t));
    }
    return all;
}

// A graph five times, so that it becomes a CUDA graph and that runs again, with other inputs each time; then as often node by node
static int check(ggml_backend_t backend, const std::string & name, builder & b) {
    constexpr int runs = 5;
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(b.data, backend);
    ggml_gallocr_t alloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
    GGML_ASSERT(ggml_gallocr_alloc_graph(alloc, b.graph));
    for (ggml_tensor * t : b.tensors) { b.fill(t); }
    const auto set = [&](const int run) { // all that a graph may have overwritten
        b.rng.seed(run);
        for (ggml_tensor * t : b.tensors) {
            if (t->type == GGML_TYPE_F32 && strcmp(t->name, "hadamard") != 0) { b.fill(t); }
        }
    };
    int64_t counts[GGML_CUDA_W4A8_COUNTS];
    std::vector<std::vector<uint8_t>> whole[runs];
    for (int run = 0; run < runs; ++run) {
        set(run);
        for (int i = 0; run == 0 && i < GGML_CUDA_W4A8_COUNTS; ++i) { counts[i] = -ggml_cuda_w4a8_count((ggml_cuda_w4a8_counted) i); }
        ggml_backend_graph_compute(backend, b.graph);
        for (int i = 0; run == 0 && i < GGML_CUDA_W4A8_COUNTS; ++i) { counts[i] += ggml_cuda_w4a8_count((ggml_cuda_w4a8_counted) i); }
        whole[run] = read(b.outputs);
    }
    bool same = true, finite = true;
    for (int run = 0; run < runs; ++run) {
        set(run);
        for (int i = 0; i < b.graph->n_nodes; ++i) {
            ggml_cgraph one = ggml_graph_view(b.graph, i, i + 1);
            ggml_backend_graph_compute(backend, &one);
        }
        const auto apart = read(b.outputs);
        same = same && whole[run] == apart && (run == 0 || apart != whole[run - 1]);
        for (const auto & bytes : apart) {
            for (size_t i = 0; i < bytes.size(); i += 4) { float v; memcpy(&v, &bytes[i], 4); finite = finite && std::isfinite(v); }
        }
    }
    ggml_gallocr_free(alloc);
    ggml_backend_buffer_free(buffer);
    ggml_free(b.data); // b.nodes stays: a node's address is the key of its CUDA graph, which another one's must not find
    printf("%s %s:", same && finite ? "ok" : "FAIL", name.c_str());
    for (const int64_t count : counts) { printf(" %ld", (long) count); }
    printf("\n");
    fflush(stdout);
    return !(same && finite);
}
