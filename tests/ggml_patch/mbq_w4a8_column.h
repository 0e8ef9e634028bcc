// Random graphs through mbq-w4a8-column.cuh, without a GPU: what each node computes, as a number made of the words that it reads, when products of one column
// run together and before their turn, must be what it is in the graph's order. Tensors lie in a small arena, over one another, except that a product lies
// apart from what it reads and from what is added to it, as an allocator places it. Prints launches of several sums, sums
// made early, and sums added to a bias. Part of mbq_w4a8_graphs.cu.

#pragma once

#include "mbq-w4a8-column.cuh"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace column_test {

static constexpr int WORDS = 4096, LONG = 256, APART = 32*LONG; // the last: places of products that nobody needs

static float arena[WORDS + APART];

struct random_graph {
    std::mt19937 & rng;
    ggml_context * ctx = ggml_init({ 1 << 20, nullptr, true });
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 512, false);
    std::vector<ggml_tensor *> tensors;
    int apart = 0;

    int any(const int n) { return rng() % n; }

    ggml_tensor * place(ggml_tensor * t) {
        t->data = arena + any(WORDS/LONG)*LONG;
        return t;
    }

    ggml_tensor * expand(ggml_tensor * t) {
        ggml_build_forward_expand(graph, t);
        tensors.push_back(t);
        return t;
    }

    void add(const int kind) {
        ggml_tensor * x = tensors[any(3) ? 0 : any(tensors.size())]; // most of them of one column
        if (kind < 5) {
            ggml_tensor * w = ggml_new_tensor_2d(ctx, any(8) ? GGML_TYPE_Q4_0 : GGML_TYPE_Q8_0, LONG, LONG);
            w->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
            w->op_params[0] = any(10) ? MBQ_W4A8_FLOATS : MBQ_W4A8_RECORDS;
            ggml_tensor * y = ggml_mul_mat(ctx, w, x);
            if (any(6) == 0) { y->src[2] = tensors[any(tensors.size())]; }
            ggml_tensor * bias = any(2) ? tensors[any(tensors.size())] : place(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, LONG, 1));
            const auto clear = [&](const ggml_tensor * t) { return !t || !mbq_overlap(y, t); };
            do { place(y); } while (!clear(x) || !clear(bias) || !clear(y->src[2]));
            if (any(4)) {
                ggml_tensor * sum = place(any(2) ? ggml_add(ctx, y, bias) : ggml_add(ctx, bias, y));
                if (any(2)) {
                    sum->data = y->data;
                } else {
                    y->data = arena + WORDS + LONG*apart++;
                    if (any(2)) { sum->data = bias->data; }
                }
                if (any(20) == 0) { ggml_set_output(y); }
                expand(sum);
            } else {
                ggml_build_forward_expand(graph, y);
                ggml_tensor * view = ggml_reshape_2d(ctx, y, LONG/2, 2);
                view->data = y->data;
                ggml_build_forward_expand(graph, view);
                tensors.push_back(y);
            }
        } else if (kind == 5) {
            expand(place(ggml_neg(ctx, x)));
        } else {
            ggml_tensor * t = ggml_scale_inplace(ctx, tensors[any(tensors.size())], 2.0f);
            t->data = t->src[0]->data;
            expand(t);
        }
    }
};

using memory = std::vector<uint64_t>;

static uint64_t mix(const uint64_t h, const uint64_t v) {
    return (h ^ v)*0x9E3779B97F4A7C15u ^ (h ^ v) >> 29;
}

static uint64_t read(const memory & words, const ggml_tensor * t) {
    uint64_t h = 1;
    for (size_t i = 0; t && i < ggml_nbytes(t)/4; ++i) { h = mix(h, words[(const float *) t->data - arena + i]); }
    return h;
}

static uint64_t product(const memory & words, const ggml_tensor * p) {
    return mix(mix(read(words, p->src[1]), read(words, p->src[2])), (uintptr_t) p->src[0]);
}

static void write(memory & words, const ggml_tensor * t, const uint64_t h) {
    for (int64_t i = 0; i < ggml_nelements(t); ++i) { words[(const float *) t->data - arena + i] = mix(h, i); }
}

static uint64_t sum_of(const uint64_t a, const uint64_t b) { return a + b; }

static void run(memory & words, const ggml_tensor * node) {
    if (node->op == GGML_OP_MUL_MAT) {
        write(words, node, product(words, node));
    } else if (node->op == GGML_OP_ADD) { // element by element, so that it may be in the place of either
        const size_t a = (const float *) node->src[0]->data - arena, b = (const float *) node->src[1]->data - arena, to = (const float *) node->data - arena;
        memory made(LONG);
        for (int i = 0; i < LONG; ++i) { made[i] = sum_of(words[a + i], words[b + i]); }
        std::copy(made.begin(), made.end(), words.begin() + to);
    } else {
        write(words, node, mix(read(words, node->src[0]), node->op));
    }
}

// One kernel, whose CTAs run in any order: each reads the column after others have written their rows
static void run(memory & words, std::vector<mbq_w4a8_sum> sums, std::mt19937 & rng) {
    std::shuffle(sums.begin(), sums.end(), rng);
    for (const mbq_w4a8_sum & s : sums) {
        for (int cta = 0; cta < 2; ++cta) {
            const uint64_t h = product(words, s.product);
            for (int i = cta*LONG/2; i < (cta + 1)*LONG/2; ++i) {
                const uint64_t y = mix(h, i);
                words[(const float *) s.out->data - arena + i] = s.bias ? sum_of(y, words[(const float *) s.bias->data - arena + i]) : y;
            }
        }
    }
}

static int run(const int graphs) {
    std::mt19937 rng(1);
    ggml_backend_cuda_context & cuda = *new ggml_backend_cuda_context(0);
    int launches = 0, early = 0, added = 0;
    for (int g = 0; g < graphs; ++g) {
        random_graph r { rng };
        for (int i = 0; i < 3; ++i) { r.tensors.push_back(r.place(ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, LONG, 1))); }
        for (int i = 2 + r.any(12); i > 0; --i) { r.add(r.any(7)); }
        memory in_order(WORDS + APART), together;
        for (auto & word : in_order) { word = rng(); }
        together = in_order;
        std::vector<uint64_t> results(r.graph->n_nodes);
        for (int i = 0; i < r.graph->n_nodes; ++i) {
            if (mbq_runs(r.graph->nodes[i])) { run(in_order, r.graph->nodes[i]); }
            results[i] = read(in_order, r.graph->nodes[i]);
        }
        r.graph->uid = g % 2*g;
        mbq_w4a8_inputs(cuda).nodes.find(r.graph);
        std::vector<int> made;
        const auto check = [&](const int i) {
            if (read(together, r.graph->nodes[i]) != results[i]) {
                printf("graph %d node %d is not what it is in the graph's order\n", g, i);
                exit(1);
            }
        };
        for (int i = 0; i < r.graph->n_nodes; ++i) {
            if (!mbq_runs(r.graph->nodes[i])) {
                continue;
            }
            const bool was = mbq_w4a8_is_in(made, i);
            const std::vector<mbq_w4a8_sum> sums = was ? std::vector<mbq_w4a8_sum>() : mbq_w4a8_sums_from(cuda, r.graph, i, 3, made);
            if (sums.empty() && !was) {
                run(together, r.graph->nodes[i]);
                check(i);
                continue;
            }
            if (!was) { run(together, sums, rng); }
            for (const mbq_w4a8_sum & s : sums) {
                made.push_back(s.node);
                added += s.bias != nullptr;
            }
            launches += sums.size() > 1;
            early    += was;
            check(++i); // the sum, or the view of the product
        }
        ggml_free(r.ctx);
    }
    printf("%d %d %d\n", launches, early, added);
    return 0;
}

} // namespace column_test
