// Products of MBQ weights on the first GPU, through ggml: each of 1 to 8 columns has the bits that it has alone, also in MUL_MAT_ID, and bias, residual
// and SwiGLU that one column's kernel takes along round as the nodes by themselves. With an argument only a few cases. Run by test_cuda_card.py.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static ggml_backend_t backend;
static int bad = 0;

static std::vector<char> random_data(const ggml_type type, const int64_t k, const int64_t rows, const int seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0.0f, type == GGML_TYPE_F32 ? 1.0f : 0.02f);
    const int64_t some = type == GGML_TYPE_F32 ? rows : std::min<int64_t>(rows, 37); // quantising all of a large one takes long
    std::vector<float> x(some*k);
    for (float & v : x) { v = normal(rng); }
    const size_t row = ggml_row_size(type, k);
    std::vector<char> bytes(rows*row);
    if (type == GGML_TYPE_F32) {
        memcpy(bytes.data(), x.data(), bytes.size());
        return bytes;
    }
    ggml_quantize_chunk(type, x.data(), bytes.data(), 0, some, k, nullptr);
    for (int64_t i = some; i < rows; ++i) { memcpy(&bytes[i*row], &bytes[i % some*row], row); }
    return bytes;
}

// One graph: tensors with data, and what becomes of them
struct world {
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true });
    std::vector<std::pair<ggml_tensor *, std::vector<char>>> data;

    ggml_tensor * put(const ggml_type type, const std::vector<char> & bytes, const int64_t a, const int64_t b, const int64_t c = 1) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, a, b, c);
        data.emplace_back(t, bytes);
        return t;
    }

    // Its floats; as a whole graph, in which kernels are fused, or node by node
    std::vector<float> run(ggml_tensor * result, const bool whole = true) {
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, result);
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        for (auto & [t, bytes] : data) { ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size()); }
        for (int i = 0; !whole && i < graph->n_nodes; ++i) {
            ggml_cgraph one = ggml_graph_view(graph, i, i + 1);
            ggml_backend_graph_compute(backend, &one);
        }
        if (whole) { ggml_backend_graph_compute(backend, graph); }
        std::vector<float> y(ggml_nelements(result));
        ggml_backend_tensor_get(result, y.data(), 0, y.size()*sizeof(float));
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
        return y;
    }
};

static std::vector<char> columns_of(const std::vector<char> & x, const int64_t k, const int64_t first, const int64_t n) {
    return std::vector<char>(x.begin() + first*k*4, x.begin() + (first + n)*k*4);
}

// Prints whether n columns of `many` are those of `one`, from its column `first`
static void compare(const char * what, const ggml_type type, const int64_t m, const int64_t k, const std::vector<float> & many, const std::vector<float> & one) {
    size_t differ = many.size() != one.size();
    bool finite = true;
    for (size_t i = 0; i < many.size() && i < one.size(); ++i) {
        differ += memcmp(&many[i], &one[i], 4) != 0;
        finite = finite && std::isfinite(many[i]);
    }
    bad += differ > 0 || !finite;
    printf("%s %s %s %ld x %ld: %zu of %zu differ\n", differ || !finite ? "FAIL" : "ok", what, ggml_type_name(type), (long) m, (long) k, differ, one.size());
    fflush(stdout);
}

static void check_columns(const ggml_type type, const int64_t m, const int64_t k) {
    const auto w = random_data(type, k, m, 1), x = random_data(GGML_TYPE_F32, k, 8, 2);
    std::vector<float> alone;
    for (int c = 0; c < 8; ++c) {
        world a;
        const auto y = a.run(ggml_mul_mat(a.ctx, a.put(type, w, k, m), a.put(GGML_TYPE_F32, columns_of(x, k, c, 1), k, 1)));
        alone.insert(alone.end(), y.begin(), y.end());
    }
    for (int n = 2; n <= 8; ++n) {
        world a;
        const auto y = a.run(ggml_mul_mat(a.ctx, a.put(type, w, k, m), a.put(GGML_TYPE_F32, columns_of(x, k, 8 - n, n), k, n)));
        compare("columns", type, m, k, y, std::vector<float>(alone.end() - n*m, alone.end()));
    }
}

// Two matrices of activations a matrix of weights
static void check_batches(const ggml_type type, const int64_t m, const int64_t k) {
    const auto w = random_data(type, k, 2*m, 1), x = random_data(GGML_TYPE_F32, k, 4*3, 2);
    std::vector<float> alone;
    for (int c = 0; c < 12; ++c) {
        world a;
        const std::vector<char> of(w.begin() + c/6*w.size()/2, w.begin() + (c/6 + 1)*w.size()/2);
        const auto y = a.run(ggml_mul_mat(a.ctx, a.put(type, of, k, m), a.put(GGML_TYPE_F32, columns_of(x, k, c, 1), k, 1)));
        alone.insert(alone.end(), y.begin(), y.end());
    }
    world a;
    compare("batches", type, m, k, a.run(ggml_mul_mat(a.ctx, a.put(type, w, k, m, 2), a.put(GGML_TYPE_F32, x, k, 3, 4))), alone);
}

// A gated unit with biases, and a product with a residual: columns at once, one by one as a whole graph (fused), one by one node by node
static void check_fused(const ggml_type type, const int64_t m, const int64_t k) {
    const auto w = random_data(type, k, m, 1), g = random_data(type, k, m, 3), x = random_data(GGML_TYPE_F32, k, 4, 2);
    const auto bias = random_data(GGML_TYPE_F32, m, 1, 4), gate_bias = random_data(GGML_TYPE_F32, m, 1, 5), residual = random_data(GGML_TYPE_F32, m, 4, 6);
    for (const char * kind : { "bias", "residual", "swiglu", "swiglu with biases" }) {
        const auto compute = [&](const int first, const int n, const bool whole) {
            world a;
            ggml_tensor * in = a.put(GGML_TYPE_F32, columns_of(x, k, first, n), k, n);
            ggml_tensor * y  = ggml_mul_mat(a.ctx, a.put(type, w, k, m), in);
            if (!strcmp(kind, "bias"))     { return a.run(ggml_add(a.ctx, y, a.put(GGML_TYPE_F32, bias, m, 1)), whole); }
            if (!strcmp(kind, "residual")) { return a.run(ggml_add(a.ctx, y, a.put(GGML_TYPE_F32, columns_of(residual, m, first, n), m, n)), whole); }
            ggml_tensor * gate = ggml_mul_mat(a.ctx, a.put(type, g, k, m), in);
            if (strlen(kind) > 6) {
                y    = ggml_add(a.ctx, y, a.put(GGML_TYPE_F32, bias, m, 1));
                gate = ggml_add(a.ctx, gate, a.put(GGML_TYPE_F32, gate_bias, m, 1));
            }
            return a.run(ggml_swiglu_split(a.ctx, gate, y), whole);
        };
        std::vector<float> fused, apart;
        for (int c = 0; c < 4; ++c) {
            const auto one = compute(c, 1, true), two = compute(c, 1, false);
            fused.insert(fused.end(), one.begin(), one.end());
            apart.insert(apart.end(), two.begin(), two.end());
        }
        compare((std::string(kind) + " fused").c_str(), type, m, k, fused, apart);
        compare((std::string(kind) + " of columns").c_str(), type, m, k, compute(0, 4, true), apart);
    }
}

// Tokens of two experts each, of 8, so that none has more than 8 (by upstream's kernel of few tokens and by its sorting), against products by themselves
static void check_experts(const ggml_type type, const int64_t m, const int64_t k, const int tokens) {
    const auto w = random_data(type, k, 8*m, 1), x = random_data(GGML_TYPE_F32, k, tokens, 2);
    std::vector<int32_t> ids(2*tokens);
    for (int i = 0; i < 2*tokens; ++i) { ids[i] = (i*3 + 1) % 8; }
    std::vector<float> alone;
    for (int i = 0; i < 2*tokens; ++i) {
        world a;
        const std::vector<char> of(w.begin() + ids[i]*w.size()/8, w.begin() + (ids[i] + 1)*w.size()/8);
        const auto y = a.run(ggml_mul_mat(a.ctx, a.put(type, of, k, m), a.put(GGML_TYPE_F32, columns_of(x, k, i/2, 1), k, 1)));
        alone.insert(alone.end(), y.begin(), y.end());
    }
    world a;
    const std::vector<char> bytes((const char *) ids.data(), (const char *) (ids.data() + ids.size()));
    ggml_tensor * which = a.put(GGML_TYPE_I32, bytes, 2, tokens);
    ggml_tensor * y = ggml_mul_mat_id(a.ctx, a.put(type, w, k, m, 8), a.put(GGML_TYPE_F32, x, k, 1, tokens), which);
    compare(("experts of " + std::to_string(tokens) + " tokens").c_str(), type, m, k, a.run(y), alone);
}

int main(int argc, char **) {
    backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr);
    for (const ggml_type type : { GGML_TYPE_MBQ3, GGML_TYPE_MBQ3_64, GGML_TYPE_MBQ3S, GGML_TYPE_MBQ3S_64 }) {
        const int64_t block = ggml_blck_size(type);
        if (argc == 1) {
            for (const int64_t k : { block, 5*block, 512 + block, (int64_t) 3584, 8960 + block, (int64_t) 14336, (int64_t) 18944, (int64_t) 29568/block*block }) {
                for (const int64_t m : { 1, 33, 1000, 4100 }) { check_columns(type, m, k); }
            }
            check_columns(type, 18944, 3584);
        } else {
            check_columns(type, 33, 1536 + block);
        }
        check_batches(type, 50, 1536 + block);
        for (const int64_t m : { 40, 1536 }) { check_fused(type, m, 1536); }
        for (const int tokens : { 1, 3, 8, 20, 32 }) { check_experts(type, 40, 640, tokens); }
    }
    printf("%d cases wrong\n", bad);
    return bad != 0;
}
