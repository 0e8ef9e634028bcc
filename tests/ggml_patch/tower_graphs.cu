// Graphs of a vision tower's weights with one scale a row, or in F16, on every GPU, against the same graphs node by node (row_scale_builder.h): LayerNorm and GELU fused
// with quantising or F16, biases and the residual stream added by the products or right behind them; with one static range activations as int8 at once; norms in floats and rotary embeddings. With an argument only small ones, for the sanitizer. Run by test_cuda_card.py.

#include "every_gpu.h"
#include "row_scale_builder.h"

using function = ggml_tensor * (*)(ggml_context *, ggml_tensor *);

// One block; attention is q + k*v, which reads q, k and v late as attention does
static ggml_tensor * block(builder & b, ggml_tensor * x, const int64_t ff, const ggml_type type, const function f) {
    ggml_tensor * y = b.layer_norm(x);
    ggml_tensor * parts[3];
    for (ggml_tensor *& part : parts) {
        part = b.biased(b.product(y, x->ne[0], type));
        ggml_build_forward_expand(b.graph, part);
    }
    ggml_tensor * attention = ggml_add(b.nodes, parts[0], ggml_mul(b.nodes, parts[1], parts[2]));
    x = ggml_add(b.nodes, b.biased(b.product(attention, x->ne[0], type)), x);
    ggml_tensor * h = f(b.nodes, b.biased(b.product(b.layer_norm(x), ff, type)));
    return ggml_add(b.nodes, x, b.biased(b.product(h, x->ne[0], type)));
}

static int check_blocks(ggml_backend_t backend, const std::string & name, const int64_t k, const int64_t ff, const int64_t n, const ggml_type type, const function f,
        const bool ranges = false) {
    builder b;
    if (ranges) { b.make_range(n); }
    ggml_tensor * x = block(b, b.floats(k, n), ff, type, f);
    b.output(block(b, x, ff, type, f));
    return check(backend, (ranges ? "static " : "blocks ") + name + " " + ggml_type_name(type) + " " + std::to_string(k) + " " + std::to_string(ff) + " " + std::to_string(n), b);
}

// A layer of a language model in F16: norms without a bias; k and v nothing is added to; gate and up, which only their function is behind
static int check_layers(ggml_backend_t backend, const int64_t k, const int64_t ff, const int64_t n) {
    builder b;
    const auto early = [&](ggml_tensor * t) { ggml_build_forward_expand(b.graph, t); return t; };
    ggml_tensor * x = ggml_scale(b.nodes, b.floats(k, n), 0.5f);
    for (int layer = 0; layer < 2; ++layer) {
        ggml_tensor * y = b.norm(x);
        ggml_tensor * q = early(b.biased(b.product(y, k, GGML_TYPE_F16)));
        ggml_tensor * s = early(ggml_reshape_3d(b.nodes, b.product(y, k, GGML_TYPE_F16), k/8, 8, n));
        ggml_tensor * v = early(ggml_reshape_3d(b.nodes, b.product(y, k, GGML_TYPE_F16), k/8, 8, n));
        ggml_tensor * attention = ggml_add(b.nodes, q, ggml_reshape_2d(b.nodes, ggml_mul(b.nodes, s, v), k, n));
        x = ggml_add(b.nodes, b.product(attention, k, GGML_TYPE_F16), x);
        y = b.norm(x);
        ggml_tensor * up = b.product(y, ff, GGML_TYPE_F16);
        x = ggml_add(b.nodes, b.product(ggml_swiglu_split(b.nodes, b.product(y, ff, GGML_TYPE_F16), up), k, GGML_TYPE_F16), x);
    }
    b.output(x);
    return check(backend, "layers f16 " + std::to_string(k) + " " + std::to_string(ff) + " " + std::to_string(n), b);
}

// What is added to a product: six times something, one of them before a bias that stays apart; and what must not be taken along: for a product that is an output,
// one added to itself, one number a column
static int check_added(ggml_backend_t backend, const ggml_type type, const int64_t k, const int64_t m, const int64_t n) {
    builder b;
    ggml_tensor * x = ggml_scale(b.nodes, b.floats(k, n), 0.5f);
    const auto product = [&] { return b.product(x, m, type); };
    const auto early   = [&](ggml_tensor * t) { ggml_build_forward_expand(b.graph, t); return t; };
    const auto matrix  = [&] { return early(ggml_scale(b.nodes, b.floats(m, n), 0.5f)); };
    b.output(ggml_add(b.nodes, b.biased(product()), matrix()));
    b.output(b.biased(ggml_add(b.nodes, product(), matrix())));
    b.output(ggml_add(b.nodes, matrix(), product()));
    b.output(ggml_add_inplace(b.nodes, matrix(), product()));
    b.output(b.biased(b.biased(product())));
    ggml_tensor * wide = ggml_scale(b.nodes, b.floats(m + 5, n), 0.5f);
    ggml_tensor * odd  = early(ggml_view_2d(b.nodes, wide, m, n, wide->nb[1], sizeof(float))); // columns at odd places
    b.output(ggml_add(b.nodes, product(), odd));
    ggml_tensor * shown = b.output(product());
    b.output(b.biased(shown));
    ggml_tensor * twice = product();
    b.output(ggml_add(b.nodes, twice, twice));
    b.output(ggml_add(b.nodes, product(), b.floats(1, n)));
    return check(backend, std::string("added ") + ggml_type_name(type) + " " + std::to_string(k) + " " + std::to_string(m) + " " + std::to_string(n), b);
}

// Norms and functions that others read too, or are outputs; a norm without a bias; functions read by two products
static int check_read(ggml_backend_t backend, const int64_t n) {
    builder b;
    ggml_tensor * y = b.layer_norm(b.floats(1024, n));
    b.output(b.product(y, 96));
    b.output(ggml_add(b.nodes, b.product(y, 1024), y));
    ggml_tensor * z = ggml_mul(b.nodes, ggml_norm(b.nodes, b.outputs.back(), 1e-6f), b.floats(1024, 1));
    b.output(z);
    b.output(b.product(z, 64));
    ggml_tensor * g = ggml_gelu(b.nodes, b.outputs.back());
    b.output(b.product(g, 32));
    b.output(b.product(g, 64));
    ggml_tensor * h = ggml_gelu_quick(b.nodes, b.outputs.back());
    b.output(b.product(h, 32));
    b.output(ggml_add(b.nodes, b.product(h, 64), h));
    return check(backend, "read " + std::to_string(n), b);
}

// Keys and values in F16, heads and columns changed, as attention takes them (mbq-cast.cuh)
static int check_casts(ggml_backend_t backend, const int64_t head, const int64_t heads, const int64_t n) {
    builder b;
    ggml_tensor * f16[2];
    for (ggml_tensor *& t : f16) {
        ggml_tensor * x = ggml_scale(b.nodes, b.floats(head*heads, n), 0.5f);
        t = ggml_permute(b.nodes, ggml_reshape_3d(b.nodes, x, head, heads, n), 0, 2, 1, 3);
        ggml_build_forward_expand(b.graph, x);
    }
    for (ggml_tensor *& t : f16) {
        t = ggml_cast(b.nodes, t, GGML_TYPE_F16);
        ggml_build_forward_expand(b.graph, t);
    }
    b.output(ggml_add(b.nodes, ggml_cast(b.nodes, f16[0], GGML_TYPE_F32), ggml_cast(b.nodes, f16[1], GGML_TYPE_F32)));
    return check(backend, "casts " + std::to_string(head) + " " + std::to_string(heads) + " " + std::to_string(n), b);
}

static ggml_tensor * turned(builder & b, ggml_tensor * x, ggml_tensor * pos) {
    const int quarter = x->ne[0]/4;
    int sections[4] = { quarter, quarter, quarter, quarter };
    return ggml_rope_multi(b.nodes, x, pos, nullptr, 2*quarter, sections, GGML_ROPE_TYPE_VISION, 32768, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
}

static ggml_tensor * positions(builder & b, const int64_t n) {
    ggml_tensor * pos = ggml_cast(b.nodes, ggml_scale(b.nodes, ggml_sqr(b.nodes, b.floats(4*n, 1)), 20.0f), GGML_TYPE_I32);
    ggml_build_forward_expand(b.graph, pos); // as in a tower, before what they turn
    return pos;
}

// A block's attention as libmtmd builds it
static int check_attention(ggml_backend_t backend, const ggml_type type, const int64_t head, const int64_t heads, const int64_t n, const bool ranges = false) {
    builder b;
    if (ranges) { b.make_range(n); }
    ggml_tensor * pos = positions(b, n);
    ggml_tensor * x   = ggml_scale(b.nodes, b.floats(head*heads, n), 0.5f);
    ggml_tensor * y   = b.layer_norm(x);
    ggml_tensor * parts[3], * sums[3];
    for (int i = 0; i < 3; ++i) {
        sums[i]  = ggml_reshape_3d(b.nodes, b.biased(b.product(y, head*heads, type)), head, heads, n);
        parts[i] = i < 2 ? turned(b, sums[i], pos) : sums[i];
        ggml_build_forward_expand(b.graph, parts[i]);
    }
    for (ggml_tensor *& t : parts) { t = ggml_permute(b.nodes, t, 0, 2, 1, 3); }
    ggml_tensor * k = ggml_cast(b.nodes, parts[1], GGML_TYPE_F16), * v = ggml_cast(b.nodes, parts[2], GGML_TYPE_F16);
    for (ggml_tensor * t : { parts[0], k, v }) { ggml_build_forward_expand(b.graph, t); }
    for (ggml_tensor * t : { sums[0], sums[1], sums[2], parts[1], pos }) { b.keep(t); } // positions are a tower's input, whose memory stays its own
    ggml_tensor * attention = ggml_flash_attn_ext(b.nodes, parts[0], k, v, nullptr, 1/sqrtf(head), 0.0f, 0.0f);
    ggml_prec_set_acc(attention, GGML_PREC_F32);
    ggml_tensor * flat = ggml_reshape_2d(b.nodes, attention, head*heads, n);
    ggml_build_forward_expand(b.graph, flat);
    b.keep(sums[2]);
    b.output(ggml_add(b.nodes, b.biased(b.product(flat, head*heads, type)), x));
    return check(backend, std::string(ranges ? "static attention " : "attention ") + ggml_type_name(type) + " " + std::to_string(head) + " " + std::to_string(heads) + " " + std::to_string(n), b);
}

// LayerNorm that no product of such weights reads: one kernel too; columns apart from each other, one of them read twice
static int check_norms(ggml_backend_t backend, const int64_t k, const int64_t n) {
    builder b;
    ggml_tensor * wide = ggml_scale(b.nodes, b.floats(k + 3, n), 0.5f);
    b.output(b.layer_norm(ggml_view_2d(b.nodes, wide, k, n, wide->nb[1], sizeof(float))));
    ggml_tensor * x = ggml_scale(b.nodes, b.floats(k, n), 2.0f);
    b.output(b.layer_norm(x));
    ggml_tensor * y = b.layer_norm(ggml_add(b.nodes, x, b.outputs[0]));
    b.output(ggml_add(b.nodes, y, ggml_gelu(b.nodes, y)));
    return check(backend, "norms " + std::to_string(k) + " " + std::to_string(n), b);
}

// The rotary embedding of towers (mbq-rope.cuh) against upstream's, which takes heads that are no multiples of 16 bytes apart: where they differ in a bit, the
// logarithm is of a negative number
static int check_rope(ggml_backend_t backend, const int64_t head, const int64_t heads, const int64_t n) {
    builder b;
    ggml_tensor * pos  = positions(b, n);
    ggml_tensor * wide = ggml_scale(b.nodes, b.floats((head + 2)*heads, n), 0.5f);
    ggml_tensor * odd  = ggml_view_3d(b.nodes, wide, head, heads, n, (head + 2)*sizeof(float), wide->nb[1], 0);
    ggml_tensor * upstream = b.output(turned(b, odd, pos));
    ggml_tensor * own = b.output(turned(b, ggml_cont(b.nodes, odd), pos));
    b.output(ggml_log(b.nodes, ggml_scale_bias(b.nodes, ggml_sqr(b.nodes, ggml_sub(b.nodes, own, upstream)), -1e37f, 1.0f)));
    return check(backend, "rope " + std::to_string(head) + " " + std::to_string(heads) + " " + std::to_string(n), b);
}

int main(int argc, char **) {
    const bool small = argc > 1;
    return on_every_gpu([small](ggml_backend_t backend) {
        int bad = 0;
        for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            for (const int64_t n : small ? std::vector<int64_t>{ 2, 64 } : std::vector<int64_t>{ 1, 2, 8, 9, 64, 300 }) {
                bad += check_blocks(backend, "gelu", 256, 512, n, type, ggml_gelu) + check_blocks(backend, "quick", 576, 1536, n, type, ggml_gelu_quick);
                bad += check_blocks(backend, "erf", 1024, 256, n, type, ggml_gelu_erf);
            }
            for (const int64_t n : { 64, 77 }) {
                bad += check_added(backend, type, 256, 128, n) + check_added(backend, type, 256, 41, n);
                bad += check_attention(backend, type, 80, 16, n);
            }
            if (!small) {
                bad += check_blocks(backend, "quick", 1280, 5120, 1024, type, ggml_gelu_quick) + check_blocks(backend, "gelu", 1152, 4608, 729, type, ggml_gelu);
                bad += check_blocks(backend, "quick", 1280, 5120, 4096, type, ggml_gelu_quick) + check_blocks(backend, "erf", 1024, 4096, 1025, type, ggml_gelu_erf);
                bad += check_added(backend, type, 1280, 1280, 4096) + check_added(backend, type, 5120, 1280, 1024);
                bad += check_attention(backend, type, 80, 16, 1025) + check_attention(backend, type, 64, 4, 300);
            }
        }
        for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }) { // one static range
            for (const int64_t n : small ? std::vector<int64_t>{ 2048 } : std::vector<int64_t>{ 8, 300, 2047, 2049, 4096 }) {
                bad += check_blocks(backend, "gelu", 256, 512, n, type, ggml_gelu, true) + check_blocks(backend, "quick", 576, 1536, n, type, ggml_gelu_quick, true);
                bad += check_blocks(backend, "erf", 1024, 256, n, type, ggml_gelu_erf, true) + check_attention(backend, type, 80, 16, n, true);
            }
            if (!small) { bad += check_blocks(backend, "quick", 1280, 5120, 4096, type, ggml_gelu_quick, true); }
        }
        for (const int64_t n : { 2, 8, 9, 64, 300 }) { bad += check_read(backend, n); }
        bad += check_casts(backend, 80, 16, 300) + check_casts(backend, 6, 3, 5);
        bad += check_layers(backend, 512, 1024, 8) + check_layers(backend, 512, 1024, 64) + check_layers(backend, 3584, 4864, 300);
        bad += check_norms(backend, 1280, 77) + check_norms(backend, 80, 1) + check_norms(backend, 1025, 5);
        bad += check_rope(backend, 80, 16, 300) + check_rope(backend, 64, 12, 77) + check_rope(backend, 72, 3, 1);
        return bad;
    }, "graphs ");
}
