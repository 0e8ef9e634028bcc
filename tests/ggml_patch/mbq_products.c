// Random products of MBQ weights on the CPU backend against its plain path, and the plain path's dot products against the scalar ones.
// Prints the worst error of each, as a share of the sum of |w * x|. Compiled and judged by test_kernels.py.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef void dot_fn(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

dot_fn ggml_vec_dot_mbq3_q8_1_generic, ggml_vec_dot_mbq3_64_q8_1_generic, ggml_vec_dot_mbq3s_q8_1_generic, ggml_vec_dot_mbq3s_64_q8_1_generic;

static const struct {
    enum ggml_type type;
    dot_fn *       scalar;
} KINDS[] = {
    { GGML_TYPE_MBQ3,     ggml_vec_dot_mbq3_q8_1_generic },
    { GGML_TYPE_MBQ3_64,  ggml_vec_dot_mbq3_64_q8_1_generic },
    { GGML_TYPE_MBQ3S,    ggml_vec_dot_mbq3s_q8_1_generic },
    { GGML_TYPE_MBQ3S_64, ggml_vec_dot_mbq3s_64_q8_1_generic },
};

static int between(int low, int high) {
    return low + rand() % (high - low + 1);
}

static float * random_floats(size_t n, float offset) {
    float * x = malloc(n*sizeof(float));
    for (size_t i = 0; i < n; ++i) {
        x[i] = (float) rand()/RAND_MAX - offset;
    }
    return x;
}

// Worst error of one product: k columns, rows of weights and activations, batches that the weights are repeated over.
static double product_error(enum ggml_type type, int k, int m, int n, int threads) {
    const int batch2 = between(1, 2), batch3 = between(1, 2), repeat2 = between(1, 2), repeat3 = between(1, 2);

    struct ggml_init_params params = { 1 << 20, NULL, true };
    struct ggml_context * ctx = ggml_init(params);
    struct ggml_tensor * w = ggml_new_tensor_4d(ctx, type, k, m, batch2, batch3);
    struct ggml_tensor * all = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, k + 32, n + 1, batch2*repeat2, batch3*repeat3);
    // rows that do not follow each other in memory, and start anywhere
    const size_t offset = sizeof(float)*between(0, 32);
    struct ggml_tensor * x = ggml_view_4d(ctx, all, k, n, all->ne[2], all->ne[3], all->nb[1], all->nb[2], all->nb[3], offset);
    struct ggml_tensor * y = ggml_mul_mat(ctx, w, x);
    struct ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, threads);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);

    float * weights = random_floats(ggml_nelements(w), 0.5f);
    void * packed = malloc(ggml_nbytes(w));
    ggml_quantize_chunk(type, weights, packed, 0, ggml_nrows(w), k, NULL);
    ggml_backend_tensor_set(w, packed, 0, ggml_nbytes(w));
    float * activations = random_floats(ggml_nelements(all), 0.4f);
    ggml_backend_tensor_set(all, activations, 0, ggml_nbytes(all));

    const size_t results = ggml_nelements(y);
    float * fast  = malloc(results*sizeof(float));
    float * plain = malloc(results*sizeof(float));
    ggml_backend_graph_compute(backend, graph);
    ggml_backend_tensor_get(y, fast, 0, results*sizeof(float));
    ggml_backend_cpu_set_use_ref(backend, true);
    ggml_backend_graph_compute(backend, graph);
    ggml_backend_tensor_get(y, plain, 0, results*sizeof(float));

    double worst = 0.0;
    for (size_t i = 0; i < results; ++i) {
        const double error = fabs((double) fast[i] - plain[i])/(k/16.0); // mean of |w * x|: 1/4 * 1/4 and a little more
        worst = error <= worst ? worst : error;                          // so that NaN stays
    }

    free(weights);
    free(packed);
    free(activations);
    free(fast);
    free(plain);
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(backend);
    ggml_free(ctx);
    return worst;
}

static double dot_error(enum ggml_type type, dot_fn * scalar, int k) {
    float * x = random_floats(k, 0.5f);
    float * y = random_floats(k, 0.4f);
    void * packed = malloc(ggml_row_size(type, k));
    void * activations = malloc(ggml_row_size(GGML_TYPE_Q8_1, k));
    ggml_quantize_chunk(type, x, packed, 0, 1, k, NULL);
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_1)->from_float(y, activations, k);

    float fast, slow;
    ggml_get_type_traits_cpu(type)->vec_dot(k, &fast, 0, packed, 0, activations, 0, 1);
    scalar(k, &slow, 0, packed, 0, activations, 0, 1);

    free(x);
    free(y);
    free(packed);
    free(activations);
    return fabs((double) fast - slow)/(k/16.0);
}

int main(int argc, char ** argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 200;
    ggml_cpu_init();
    srand(1);

    double product = 0.0;
    double dot = 0.0;
    for (int i = 0; i < cases; ++i) {
        const enum ggml_type type = KINDS[i % 4].type;
        const int k = (int) ggml_blck_size(type)*between(1, i/4 % 10 ? 12 : 70);
        const double e = product_error(type, k, between(1, 70), between(1, i/4 % 3 ? 14 : 40), between(1, 3));
        product = e <= product ? product : e;
        const double f = dot_error(type, KINDS[i % 4].scalar, k);
        dot = f <= dot ? dot : f;
    }
    printf("%g %g\n", product, dot);
    return 0;
}
