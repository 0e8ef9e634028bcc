// Random graphs through mbq-w4a8-inputs.cuh, without a GPU: tensors lie in a small arena, over one another, and each word of it knows which node wrote it
// last. Whatever a product finds must be what its activations are then. Prints products, found, quantised for others. Part of mbq_w4a8_graphs.cu.

#pragma once

#include "mbq-w4a8-inputs.cuh"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace inputs_test {

static constexpr int WORDS = 2048;

struct stack_pool : ggml_cuda_pool { // blocks go back in the reverse order, as in ggml_cuda_pool_vmm
    char * base = (char *) aligned_alloc(128, 1 << 20);
    size_t used = 0;

    void * alloc(size_t size, size_t * actual) override {
        *actual = GGML_PAD(size, 128);
        used += *actual;
        return base + used - *actual;
    }
    void free(void * p, size_t size) override {
        used -= size;
        GGML_ASSERT(p == base + used);
    }
};

struct random_graph {
    std::mt19937 & rng;
    float * arena;
    ggml_context * ctx = ggml_init({ 1 << 20, nullptr, true });
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 512, false);
    std::vector<ggml_tensor *> tensors;
    ggml_tensor * ranges = nullptr;

    int any(const int n) { return rng() % n; }

    ggml_tensor * place(ggml_tensor * t, const ggml_tensor * away_from) { // somewhere in the arena
        do {
            t->data = arena + any(WORDS/64 - 8)*64;
        } while (away_from && mbq_overlap(t, away_from));
        return t;
    }

    void add(const int kind) {
        ggml_tensor * x = tensors[any(tensors.size())];
        ggml_tensor * t;
        if (kind < 6) {
            ggml_tensor * w = ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, x->ne[0], 64);
            w->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
            w->op_params[0] = std::min(any(5), 2);
            t = ggml_mul_mat(ctx, w, x);
            if (any(3) == 0) { // static ranges, some of them those of other products
                ranges = ranges && any(3) ? ranges : place(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, 4), nullptr);
                t->src[2] = ranges;
            }
            do { place(t, x); } while (t->src[2] && mbq_overlap(t, ranges));
        } else if (kind == 6) {
            t = place(ggml_neg(ctx, ggml_is_contiguous(x) ? x : ggml_cont(ctx, x)), nullptr);
        } else if (kind == 7) { // a view, of the same or of fewer columns, or of rows that lie elsewhere
            const int64_t n = any(2) ? x->ne[1] : 1 + any(x->ne[1]);
            t = ggml_view_2d(ctx, x, x->ne[0], n, any(3) ? x->nb[1] : x->ne[1] > n ? x->nb[1]*2 : x->nb[1], 0);
            t->data = x->data;
        } else {
            t = ggml_scale_inplace(ctx, x, 2.0f);
            t->data = x->data;
        }
        for (ggml_tensor * s = t->src[0]; s && !s->data && s->op == GGML_OP_CONT; s = nullptr) {
            place(s, nullptr);
        }
        ggml_build_forward_expand(graph, t);
        if (t->ne[0] % 32 == 0 && (char *) t->data + ggml_nbytes(t) <= (char *) (arena + WORDS)) {
            tensors.push_back(t);
        }
    }
};

static int run(const int graphs) {
    std::mt19937 rng(1);
    std::vector<float> arena(WORDS);
    std::vector<int>   writer(WORDS + 4096);
    stack_pool * pool = new stack_pool;
    ggml_backend_cuda_context & cuda = *new ggml_backend_cuda_context(0);
    cuda.pools[0][0].reset(pool);
    int now = 0, products = 0, found = 0, made = 0;
    for (int g = 0; g < graphs; ++g) {
        random_graph r { rng, arena.data() };
        for (int i = 0; i < 3; ++i) {
            r.tensors.push_back(r.place(ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, 64, 1 + r.any(4)), nullptr));
        }
        for (int i = 2 + r.any(60); i > 0; --i) {
            r.add(r.any(9));
        }
        for (int i = 0; i < r.graph->n_nodes; ++i) {
            if (r.any(20) == 0) {
                r.graph->nodes[i]->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
            }
        }
        const auto words = [&](const ggml_tensor * product) { // of what it reads
            std::vector<int> all;
            for (const ggml_tensor * t : { product->src[1], product->src[2] }) {
                const size_t first = t ? (const float *) t->data - arena.data() : 0;
                all.insert(all.end(), writer.begin() + first, writer.begin() + first + (t ? ggml_nbytes(t)/4 : 0));
            }
            return all;
        };
        r.graph->uid = g % 2*g; // of every other graph nodes are looked at once (mbq-nodes.cuh)
        std::vector<int> held;
        for (int i = 0; i < 2*r.graph->n_nodes; ++i) { // twice
            const int at = i % r.graph->n_nodes;
            ggml_tensor * node = r.graph->nodes[at];
            if (!mbq_runs(node)) {
                continue;
            }
            ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(cuda);
            inputs.step(cuda, r.graph, at);
            if (node->op == GGML_OP_MUL_MAT) {
                bool fresh = false;
                const auto make = [&](const mbq_w4a8_int8 &) {
                    held  = words(node);
                    fresh = true;
                };
                const bool shared = mbq_w4a8_share(cuda, node, mbq_w4a8_order_of(cuda, node), 8, make);
                {
                    ggml_cuda_pool_alloc<char> other(*pool, 100);
                    products++;
                    made  += shared && fresh;
                    found += shared && !fresh;
                    if (shared && held != words(node)) {
                        printf("graph %d node %d found what its activations are no more\n", g, at);
                        return 1;
                    }
                }
                if (shared) {
                    inputs.read();
                }
            }
            const size_t first = (float *) node->data - arena.data();
            std::fill_n(writer.begin() + first, ggml_nbytes(node)/4, ++now);
            if (at == r.graph->n_nodes - 1 && inputs.memory) {
                printf("graph %d ends and holds memory\n", g);
                return 1;
            }
        }
        ggml_free(r.ctx);
    }
    printf("%d %d %d\n", products, found, made);
    return 0;
}

} // namespace inputs_test
