// Graphs of weights with one scale a row on every GPU: what a whole graph gives, whose products share activations that are quantised together with norms and
// SwiGLU, or of one column are one kernel with what reads them, against the same graph run node by node, where nothing is shared or fused; bit for bit. Prints for each graph what ggml_cuda_w4a8_count counts in
// the whole one. With an argument only small graphs, for the sanitizer. Run by test_cuda.py.

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
        w->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
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

    ggml_tensor * output(ggml_tensor * t) {
        ggml_set_output(t);
        ggml_build_forward_expand(graph, t);
        return outputs.emplace_back(t);
    }

    ggml_tensor * norm(ggml_tensor * x) {
        return ggml_mul(nodes, ggml_rms_norm(nodes, x, 1e-6f), floats(x->ne[0], 1));
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
    ggml_free(b.nodes);
    ggml_free(b.data);
    printf("%s %s:", same && finite ? "ok" : "FAIL", name.c_str());
    for (const int64_t count : counts) { printf(" %ld", (long) count); }
    printf("\n");
    fflush(stdout);
    return !(same && finite);
}

static int check_layers(ggml_backend_t backend, const int64_t k, const int64_t kv, const int64_t ff, const int64_t n, const int64_t had,
        const std::string & ranges = "none") {
    builder b;
    if (ranges != "none") { b.make_ranges(n, ranges == "early"); }
    ggml_tensor * x = b.floats(k, n);
    x = b.layer(x, kv, ff, had);
    b.output(b.layer(x, kv, ff, had));
    return check(backend, "layers " + std::to_string(k) + " " + std::to_string(ff) + " " + std::to_string(n) + " " + std::to_string(had) + " " + ranges, b);
}

// What must not be shared: activations changed in place between two products, one row of them, and a tensor of another shape at the same address
static int check_changed(ggml_backend_t backend, const int64_t n) {
    builder b;
    ggml_tensor * x = ggml_add(b.nodes, b.floats(256, n), b.floats(256, n));
    b.output(b.product(x, 64));
    ggml_tensor * twice = ggml_scale_inplace(b.nodes, x, 2.0f);
    b.output(b.product(twice, 64));
    b.output(b.product(twice, 32));
    ggml_tensor * row = ggml_view_1d(b.nodes, twice, 256, (n - 1)*256*sizeof(float));
    b.output(ggml_cpy(b.nodes, b.floats(256, 1), row));
    b.output(b.product(ggml_view_2d(b.nodes, twice, 256, n, twice->nb[1], 0), 64));
    b.output(b.product(ggml_view_2d(b.nodes, twice, 256, n - 1, twice->nb[1], 0), 64));
    b.output(b.product(ggml_view_2d(b.nodes, twice, 128, n, twice->nb[1], 0), 64));
    b.output(b.product(ggml_view_2d(b.nodes, twice, 256, n, twice->nb[1], 0), 64));
    return check(backend, "changed " + std::to_string(n), b);
}

// A norm that others read too, and one that is an output
static int check_norms(ggml_backend_t backend, const int64_t n) {
    builder b;
    ggml_tensor * y = b.norm(b.floats(1024, n));
    b.output(b.product(y, 96));
    b.output(ggml_add(b.nodes, b.product(y, 1024), y));
    ggml_tensor * z = b.norm(b.outputs.back());
    b.output(z);
    b.output(b.product(z, 64));
    b.output(ggml_scale(b.nodes, b.product(z, 64), 2.0f));
    return check(backend, "norms " + std::to_string(n), b);
}

// One column: five products in one kernel with what reads them, and some that must not be: an output, another GLU, other bits, another column, a sum in the
// place of the column
static int check_one(ggml_backend_t backend, const ggml_type type, const int64_t k, const int64_t m, const bool ranges) {
    builder b;
    if (ranges) { b.make_ranges(1, true); }
    const ggml_type other = type == GGML_TYPE_Q4_0 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0;
    const auto column  = [&](const int64_t n) { return ggml_scale(b.nodes, b.floats(n, 1), 0.5f); };
    const auto product = [&](ggml_tensor * x) { return b.product(x, m, type); };
    ggml_tensor * x = column(k);
    b.output(ggml_swiglu_split(b.nodes, product(x), product(x)));
    ggml_tensor * up = product(x);
    ggml_build_forward_expand(b.graph, up);
    b.output(ggml_swiglu_split(b.nodes, product(x), up));
    b.output(ggml_add(b.nodes, product(x), product(x)));
    b.output(ggml_add(b.nodes, b.floats(m, 1), product(x)));
    b.output(ggml_add(b.nodes, column(m), product(x))); // in the place of what is added
    ggml_tensor * gate = b.output(product(x));
    b.output(ggml_swiglu_split(b.nodes, gate, product(x)));
    b.output(ggml_geglu_split(b.nodes, product(x), product(x)));
    b.output(ggml_swiglu_split(b.nodes, product(x), b.product(x, m, other)));
    b.output(ggml_swiglu_split(b.nodes, product(x), product(column(k))));
    ggml_tensor * y = column(k);
    b.output(ggml_add_inplace(b.nodes, y, b.product(y, k, type)));
    return check(backend, std::string("one ") + ggml_type_name(type) + " " + std::to_string(k) + " " + std::to_string(m) + (ranges ? " early" : " none"), b);
}

// One column by three matrices, as q, v and k, with biases or none: one kernel
static int check_three(ggml_backend_t backend, const ggml_type type, const bool biases) {
    builder b;
    ggml_tensor * y = b.norm(b.floats(3584, 1));
    const auto heads = [&](const int64_t m) {
        ggml_tensor * t = b.product(y, m, type);
        t = biases ? ggml_add(b.nodes, t, b.floats(m, 1)) : t;
        ggml_set_output(t); // keeps its place, as the scheduler does (ggml_cuda_w4a8_keep)
        t = ggml_scale(b.nodes, ggml_reshape_2d(b.nodes, t, 8, m/8), 0.5f);
        ggml_build_forward_expand(b.graph, t);
        return t;
    };
    ggml_tensor * q = heads(80);
    ggml_tensor * v = heads(40);
    ggml_tensor * k = heads(40);
    b.output(ggml_add(b.nodes, q, ggml_repeat(b.nodes, ggml_mul(b.nodes, k, v), q)));
    return check(backend, std::string("three ") + ggml_type_name(type) + (biases ? " biases" : " none"), b);
}

int main(int argc, char **) {
    const bool small = argc > 1;
    int bad = 0;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_GPU) {
            continue;
        }
        ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
        for (const int64_t n : small ? std::vector<int64_t>{ 2, 64 } : std::vector<int64_t>{ 1, 2, 8, 9, 64, 300 }) {
            bad += check_layers(backend, 256, 64, 512, n, 0) + check_layers(backend, 576, 96, 1536, n, 512);
            if (n > 1) { bad += check_changed(backend, n) + check_norms(backend, n); }
            bad += check_layers(backend, 576, 96, 1536, n, 512, "early") + check_layers(backend, 256, 64, 512, n, 0, "late");
        }
        for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }) {
            for (const bool ranges : { false, true }) { // of check_three: biases
                bad += check_one(backend, type, 256, 40, ranges);
                if (!small) { bad += check_one(backend, type, 3584, 600, ranges); }
                bad += check_three(backend, type, ranges);
            }
        }
        if (!small) {
            for (const int64_t had : { 0, 64, 128, 256, 512 }) { bad += check_layers(backend, 3584, 512, 18944, 512, had); }
            for (const int64_t had : { 0, 512 }) { bad += check_layers(backend, 3584, 512, 18944, 1, had); }
            bad += check_layers(backend, 1536, 256, 8960, 2048, 0) + check_layers(backend, 4096, 1024, 14336, 7, 512);
        }
        ggml_backend_free(backend);
    }
    printf("%d graphs wrong\n", bad);
    return bad != 0;
}
