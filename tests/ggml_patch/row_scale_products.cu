// Products of weights with one scale a row on the first GPU, through ggml: every element (of large ones every few) against int64 sums and two float
// multiplications, bit for bit (ggml-row-scale.h). With an argument only a few cases, for the sanitizer. Run by test_cuda_card.py.

#include "ggml-row-scale.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>
static ggml_backend_t backend;
static int check(ggml_type type, int64_t M, int64_t K, int64_t N, int style) {
    std::mt19937 rng(M*31 + K*7 + N + style);
    const int bb = type == GGML_TYPE_Q4_0 ? 18 : 34;
    const int64_t row = K/32*bb;
    std::vector<uint8_t> w(M*row);
    std::vector<int8_t> code(M*K);
    std::vector<float> d(M), x(N*K);
    for (int64_t m = 0; m < M; ++m) {
        const ggml_fp16_t h = ggml_fp32_to_fp16(0.001f*(1 + rng() % 1000)*(rng()%2 ? 1 : -1));
        d[m] = ggml_fp16_to_fp32(h);
        for (int64_t k = 0; k < K; ++k) {
            code[m*K + k] = type == GGML_TYPE_Q4_0 ? (style == 1 ? -8 : (int) (rng() % 16) - 8) : (style == 1 ? -128 : (int) (rng() % 256) - 128);
        }
        for (int64_t b = 0; b < K/32; ++b) {
            uint8_t * p = w.data() + m*row + b*bb;
            const int8_t * c = code.data() + m*K + b*32;
            memcpy(p, &h, 2);
            for (int i = 0; i < (type == GGML_TYPE_Q4_0 ? 16 : 32); ++i) {
                p[2 + i] = type == GGML_TYPE_Q4_0 ? (uint8_t) ((c[i] + 8) | (c[i + 16] + 8) << 4) : (uint8_t) c[i];
            }
        }
    }
    std::normal_distribution<float> normal;
    for (auto & v : x) { v = style == 1 ? 1.0f : normal(rng); }
    std::vector<float> table(3*N); // a column of it: static ranges, from a hundredth of what they should be, none for every third
    for (int64_t n = 0; n < N; ++n) { table[3*n + 1] = n % 3 == 1 ? 0.0f : 0.04f*(1 + rng() % 200); }
    if (style == 2) { std::fill_n(x.begin(), K, 0.0f); if (N > 1) { for (int64_t k = 0; k < K; ++k) { x[K + k] *= 1e-39f; } } }
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*8 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor * a = ggml_new_tensor_2d(ctx, type, K, M);
    a->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
    ggml_tensor * b = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, K, N);
    ggml_tensor * c = ggml_mul_mat(ctx, a, b);
    ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 3, N);
    if (style == 3) { c->src[2] = ggml_view_2d(ctx, t, 1, N, t->nb[1], sizeof(float)); }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, c);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_tensor_set(a, w.data(), 0, w.size());
    ggml_backend_tensor_set(b, x.data(), 0, x.size()*4);
    ggml_backend_tensor_set(t, table.data(), 0, table.size()*4);
    std::vector<float> y(M*N, NAN);
    ggml_backend_tensor_set(c, y.data(), 0, y.size()*4);
    ggml_backend_graph_compute(backend, graph);
    ggml_backend_tensor_get(c, y.data(), 0, y.size()*4);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    std::vector<int8_t> q(N*K);
    std::vector<float> s(N);
    for (int64_t n = 0; n < N; ++n) {
        float amax = 0;
        for (int64_t k = 0; k < K; ++k) { amax = std::max(amax, std::fabs(x[n*K + k])); }
        if (style == 3 && table[3*n + 1] > 0.0f) { amax = table[3*n + 1]; }
        if (amax < GGML_ROW_SCALE_AMAX_MIN) { amax = 0; } volatile float inverse = 127.0f/amax; s[n] = amax/127.0f;
        for (int64_t k = 0; k < K; ++k) { volatile float p = x[n*K + k]*inverse; q[n*K + k] = amax == 0 ? 0 : (int8_t) std::max(-127.0f, std::min(127.0f, nearbyintf(p))); }
    }
    int64_t wrong = 0;
    const int64_t stride = std::max<int64_t>(1, M*N*K/ (int64_t) 4e9*7 + 1); // of elements of large ones
#pragma omp parallel for reduction(+:wrong)
    for (int64_t i = 0; i < M*N; i += stride) {
        const int64_t n = i / M, m = i % M;
        int64_t sum = 0;
        for (int64_t k = 0; k < K; k += 32) { int part = 0; for (int j = 0; j < 32; ++j) { part += (int) code[m*K + k + j]*q[n*K + k + j]; } sum += part; }
        volatile float p = (float) sum*d[m];
        const float e = p*s[n];
        if (memcmp(&e, &y[i], 4)) { if (wrong++ == 0) { fprintf(stderr, "m %ld n %ld: %a not %a\n", (long) m, (long) n, y[i], e); } }
    }
    printf("%s %s M %ld K %ld N %ld style %d: %ld wrong of %ld\n", wrong ? "FAIL" : "ok", ggml_type_name(type), (long) M, (long) K, (long) N, style, (long) wrong, (long) (M*N/stride));
    fflush(stdout);
    return wrong != 0;
}
int main(int argc, char **) {
    backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr);
    int bad = 0;
    if (argc > 1) {
        for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }) { bad += check(type, 300, 576, 3, 0) + check(type, 300, 896, 140, 0) + check(type, 520, 1536, 300, 0) + check(type, 300, 1536, 140, 3); }
        return bad != 0;
    }
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }) {
        for (int64_t K : { 64, 96, 256, 576, 896, 1536, 3584, 14336, 29568 }) {
            for (int64_t M : { 1, 33, 130, 1000 }) {
                for (int64_t N : { 1, 3, 8, 9, 64, 129, 300 }) {
                    if (K*M*N > (int64_t) 2e9) { continue; }
                    bad += check(type, M, K, N, 0);
                }
            }
            bad += check(type, 70, K, 5, 1) + check(type, 70, K, 40, 1) + check(type, 70, K, 5, 2) + check(type, 300, K, 40, 2);
            bad += check(type, 70, K, 1, 3) + check(type, 70, K, 5, 3) + check(type, 300, K, 40, 3);
        }
        bad += check(type, 4096, 14336, 512, 0) + check(type, 3584, 18944, 512, 0) + check(type, 18944, 3584, 512, 0) + check(type, 8192, 8192, 1024, 0);
    }
    printf("%d cases wrong\n", bad);
    return bad != 0;
}
