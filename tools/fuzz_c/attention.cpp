// Flash attention of few rows: hostile queries and caches, at once and in random cuts of the rows, in as much work memory as ggml's plan gives.

#include "fuzz.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu/common.h"
#include "ggml-cpu/mbq/mbq.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

struct attention {
    enum ggml_type type;
    int64_t width, heads, shared, rows, cells;
    const exact & q, & k, & v, & mask;
};

// rows [row_0, row_0 + n) of the result, [n][heads*shared][width], each thread's part after the other's
static void attend(const attention & a, int64_t row_0, int64_t n, int threads, float * out) {
    struct ggml_init_params init = { 16*ggml_tensor_overhead(), nullptr, true };
    struct ggml_context * ctx = ggml_init(init);
    struct ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, a.width, n, a.heads*a.shared);
    struct ggml_tensor * k = ggml_new_tensor_3d(ctx, a.type, a.width, a.cells, a.heads);
    struct ggml_tensor * v = ggml_new_tensor_3d(ctx, a.type, a.width, a.cells, a.heads);
    struct ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, a.cells, n);
    struct ggml_tensor * dst = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/std::sqrt((float) a.width), 0.0f, 0.0f);
    q->nb[2] = a.rows*q->nb[1];
    q->data    = a.q.data.get() + row_0*q->nb[1];
    k->data    = a.k.data.get();
    v->data    = a.v.data.get();
    mask->data = a.mask.data.get() + row_0*mask->nb[1];
    dst->data  = out;

    constexpr int64_t Q = GGML_FA_TILE_Q, KV = GGML_FA_TILE_KV;
    exact work(sizeof(float)*(Q*a.width + 2*Q*KV + Q*a.width + 2*KV*a.width)*threads); // ggml_graph_plan()
    for (int i = 0; i < threads; ++i) {
        struct ggml_compute_params params = { i, threads, work.size, work.data.get(), nullptr, false };
        if (!ggml_compute_forward_flash_attn_rows(&params, dst)) {
            memset(out, 0, ggml_nbytes(dst)); // no kernel on this processor
        }
    }
    ggml_free(ctx);
}

int64_t feed_attention(rng_t & rng, enum ggml_type type) {
    static const int64_t WIDTHS[] = { 5, 8, 24, 40, 64, 72, 128 };
    const int64_t width = WIDTHS[between(rng, 0, 6)], heads = between(rng, 1, 2), shared = between(rng, 1, 5);
    const int64_t rows = between(rng, 1, between(rng, 0, 2) ? 6 : GGML_FA_TILE_Q - 1), cells = between(rng, 1, 150);
    const size_t n_q = width*rows*heads*shared, n_kv = width*cells*heads, n_out = width*heads*shared*rows;
    exact q(n_q*sizeof(float)), k(n_kv*ggml_type_size(type)), v(n_kv*ggml_type_size(type)), mask(rows*cells*sizeof(ggml_fp16_t));
    exact whole(n_out*sizeof(float)), cut(n_out*sizeof(float)), wide(n_kv*sizeof(float));
    make_floats(rng, q.floats(), n_q);
    for (const exact * x : { &k, &v }) {
        make_floats(rng, wide.floats(), n_kv);
        if (type == GGML_TYPE_F32) {
            memcpy(x->data.get(), wide.data.get(), wide.size);
        } else {
            ggml_fp32_to_fp16_row(wide.floats(), (ggml_fp16_t *) x->data.get(), n_kv);
        }
    }
    for (int64_t i = 0; i < rows*cells; ++i) {
        ((ggml_fp16_t *) mask.data.get())[i] = ggml_fp32_to_fp16(between(rng, 0, 3) ? 0.0f : -INFINITY);
    }

    const attention a = { type, width, heads, shared, rows, cells, q, k, v, mask };
    attend(a, 0, rows, (int) between(rng, 1, 3), whole.floats());
    for (int64_t i = 0, n; i < rows; i += n) {
        n = std::min(between(rng, 1, 7), rows - i);
        attend(a, i, n, (int) between(rng, 1, 3), cut.floats() + i*width*heads*shared);
    }
    for (size_t i = 0; i < n_out; ++i) {
        if (memcmp(whole.floats() + i, cut.floats() + i, sizeof(float)) != 0 && std::isfinite(whole.floats()[i])) {
            printf("%lld rows, %lld cells, heads of %lld: another result when cut\n", (long long) rows, (long long) cells, (long long) width);
            return -1;
        }
    }
    return rows*heads*shared;
}
