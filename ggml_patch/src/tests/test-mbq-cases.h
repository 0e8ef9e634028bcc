#pragma once

// Cases of test-backend-ops: one product of weights with one scale per row (ggml-row-scale.h), and several with the same activations. Every backend must
// give the bits of the CPU's plain path.

#include "ggml-row-scale.h"

struct test_row_scale : public test_case {
    const ggml_type type;
    const int64_t m, n, k;
    const int products;

    test_row_scale(ggml_type type, int64_t m, int64_t n, int64_t k, int products) : type(type), m(m), n(n), k(k), products(products) {}

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "ROW_SCALE";
    }

    std::string vars() override { return VARS_TO_STR5(type, m, n, k, products); }

    double max_nmse_err() override { return 0.0; }

    bool run_whole_graph() override { return products > 1; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);
        if (products > 1) {
            x = ggml_scale(ctx, x, 0.5f);
        }
        ggml_tensor * sum = nullptr;
        for (int i = 0; i < products; ++i) {
            ggml_tensor * w = ggml_new_tensor_2d(ctx, type, k, m);
            w->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
            ggml_tensor * y = ggml_mul_mat(ctx, w, x);
            sum = sum ? ggml_add(ctx, sum, y) : y;
        }
        return sum;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng(k*n + products);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if ((t->flags & GGML_TENSOR_FLAG_ROW_SCALE) == 0) {
                init_tensor_uniform(t);
                continue;
            }
            std::vector<uint8_t> bytes(ggml_nbytes(t));
            const size_t block = ggml_type_size(type);
            for (size_t i = 0; i < bytes.size(); i += block) {
                const ggml_fp16_t d = ggml_fp32_to_fp16(0.001f*(1 + i/t->nb[1] % 50));
                memcpy(&bytes[i], &d, sizeof(d));
                std::generate_n(&bytes[i + sizeof(d)], block - sizeof(d), [&]() { return (uint8_t) rng(); });
            }
            ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
        }
    }
};

static void add_mbq_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    // Attention of vision towers: keys and values are not views into a cache, which upstream's cases do not cover (-o FLASH_ATTN_EXT)
    for (int64_t d : { 64, 72, 80, 128 }) {
        for (int64_t pictures : { 1, 3 }) {
            cases.emplace_back(new test_flash_attn_ext(d, d, 4, { 1, pictures }, 113,  75, false, false, 0, 0, GGML_PREC_F32, GGML_TYPE_F16, GGML_TYPE_F16, { 0, 1, 2, 3 }, false));
            cases.emplace_back(new test_flash_attn_ext(d, d, 4, { 1, pictures }, 512, 130, true,  false, 0, 0, GGML_PREC_F32, GGML_TYPE_F16, GGML_TYPE_F16, { 0, 1, 2, 3 }, false));
        }
    }
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }) {
        for (int64_t k : { 64, 576, 1536 }) {
            for (int64_t n : { 1, 2, 8, 9, 33, 300 }) {
                cases.emplace_back(new test_row_scale(type, 130, n, k, 1));
                cases.emplace_back(new test_row_scale(type, 96, n, k, 3));
            }
        }
    }
}
