// Graphs of weights with one scale a row on every GPU: what a whole graph gives, whose products share activations that are quantised together with norms and
// SwiGLU, or of one column are one kernel with what reads them, against the same graph run node by node, where nothing is shared or fused; bit for bit. Prints for each graph what ggml_cuda_w4a8_count counts in
// the whole one. With an argument only small graphs, for the sanitizer. Run by test_cuda_card.py.

#include "every_gpu.h"
#include "row_scale_builder.h"

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
    return on_every_gpu([small](ggml_backend_t backend) {
        int bad = 0;
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
        return bad;
    }, "graphs ");
}
