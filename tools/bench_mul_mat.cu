// Times ggml's MUL_MAT on the first GPU. Build with bench_gpu.py, which also writes the input: lines `type m k n...`.
// Output: `read TB/s`, then for each line and n `type m k n cold us` for cold (the weights of successive products are different
// ones, together larger than any L2) and warm ones (n up to 8; more columns: warm only). With the argument `static` products have static
// ranges of their activations.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>
#include <cuda_runtime.h>

static constexpr size_t COLD_BYTES = 400u << 20; // of different weights, 8 times the L2 of an H100

// Reads n 16-byte words with every multiprocessor, several loads in flight in each thread.
static __global__ void read_all(const int4 * p, size_t n, int * out) {
    const size_t step = (size_t) gridDim.x*blockDim.x;
    int4 sum = {};
    for (size_t i = blockIdx.x*(size_t) blockDim.x + threadIdx.x; i + 7*step < n; i += 8*step) {
        int4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = __ldcs(p + i + j*step);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sum.x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
        }
    }
    if (sum.x == 0x1234567) {
        *out = 1;
    }
}

static double read_bandwidth() { // TB/s, best of 10
    const size_t bytes = (size_t) 2 << 30;
    int4 * p;
    int  * out;
    cudaEvent_t a, b;
    if (cudaMalloc(&p, bytes) != cudaSuccess || cudaMalloc(&out, sizeof(int)) != cudaSuccess) {
        return 0;
    }
    cudaMemset(p, 0x5A, bytes);
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    float best = 1e9f;
    for (int i = 0; i < 10; ++i) {
        float ms = 0;
        cudaEventRecord(a);
        read_all<<<132*8, 512>>>(p, bytes/sizeof(int4), out);
        cudaEventRecord(b);
        cudaEventSynchronize(b);
        cudaEventElapsedTime(&ms, a, b);
        best = std::min(best, ms);
    }
    cudaFree(p);
    cudaFree(out);
    return bytes/(best*1e-3)*1e-12;
}

// W4A8 and W8A8: blocks of these types with one scale per row, and the flag that says so (ggml-row-scale.h)
static constexpr int ROW_SCALE = 1 << 16;

static ggml_type type_of(const std::string & name) {
    if (name == "W4A8" || name == "W8A8") {
        return name == "W4A8" ? GGML_TYPE_Q4_0 : GGML_TYPE_Q8_0;
    }
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && ggml_blck_size((ggml_type) i) > 0 && std::equal(name.begin(), name.end(), other, other + std::string(other).size(),
                [](char x, char y) { return std::tolower((unsigned char) x) == std::tolower((unsigned char) y); })) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "unknown type %s\n", name.c_str());
    exit(1);
}

// 16 rows quantised from random floats, over and over.
static std::vector<char> random_rows(ggml_type type, int64_t m, int64_t k) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    const int64_t rows = 16;
    std::vector<float> x(rows*k);
    std::generate(x.begin(), x.end(), [&]() { return normal(rng); });
    const size_t row = ggml_row_size(type, k);
    std::vector<char> some(rows*row), all(m*row);
    if (type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(x.data(), (ggml_fp16_t *) some.data(), rows*k);
    } else {
        ggml_quantize_chunk(type, x.data(), some.data(), 0, rows, k, nullptr);
    }
    for (int64_t i = 0; i < m; ++i) {
        std::copy_n(some.begin() + i % rows*row, row, all.begin() + i*row);
    }
    return all;
}

// Microseconds a product of `count` products in one graph, median of 5
static double time_products(ggml_backend_t backend, const std::vector<ggml_tensor *> & weights, int64_t k, int64_t n, int count,
        bool with_ranges) {
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*(count + 3) + ggml_graph_overhead_custom(count + 2, false), nullptr, true });
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, count + 2, false);
    ggml_tensor * ranges = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n);
    for (int i = 0; i < count; ++i) {
        ggml_tensor * product = ggml_mul_mat(ctx, weights[i % weights.size()], x);
        product->src[2] = with_ranges ? ranges : nullptr;
        ggml_build_forward_expand(graph, product);
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    std::vector<float> values(k*n);
    std::mt19937 rng(2);
    std::normal_distribution<float> normal;
    std::generate(values.begin(), values.end(), [&]() { return normal(rng); });
    ggml_backend_tensor_set(x, values.data(), 0, values.size()*sizeof(float));
    const std::vector<float> range(n, 4.0f);
    ggml_backend_tensor_set(ranges, range.data(), 0, n*sizeof(float));
    std::vector<double> us;
    for (int i = 0; i < 9; ++i) {
        ggml_backend_synchronize(backend);
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        ggml_backend_synchronize(backend);
        if (i >= 4) { // the first ones load kernels and record the graph
            us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count()/count);
        }
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    std::sort(us.begin(), us.end());
    return us[us.size()/2];
}

int main(int argc, char ** argv) {
    const bool with_ranges = argc > 1 && strcmp(argv[1], "static") == 0;
    setenv("GGML_CUDA_DISABLE_FUSION", "1", 1); // products of one graph would share their quantised activations
    printf("read %.3f\n", read_bandwidth());
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr);
    if (!backend) {
        fprintf(stderr, "no GPU\n");
        return 1;
    }
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        std::string name;
        int64_t m, k;
        in >> name >> m >> k;
        const ggml_type type = type_of(name);
        const std::vector<char> data = random_rows(type, m, k);
        const size_t copies = std::max<size_t>(2, (COLD_BYTES + data.size() - 1)/data.size());
        ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*copies, nullptr, true });
        std::vector<ggml_tensor *> weights;
        for (size_t i = 0; i < copies; ++i) {
            weights.push_back(ggml_new_tensor_2d(ctx, type, k, m));
            weights.back()->flags |= name[0] == 'W' ? ROW_SCALE : 0; // the scale of a row's first block is used: the others do not matter here
        }
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(weights[0], data.data(), 0, data.size());
        for (size_t i = 1; i < copies; ++i) {
            ggml_backend_tensor_copy(weights[0], weights[i]);
        }
        for (int64_t n; in >> n;) {
            for (int cold = n <= 8; cold >= 0; --cold) {
                // Some milliseconds a graph, and each copy equally often
                const size_t some  = std::clamp<size_t>(((size_t) 4 << 30)/data.size(), 24, 200);
                const int    count = n > 8 ? 8 : (int) ((some + copies - 1)/copies*copies);
                const double us = time_products(backend, cold ? weights : std::vector<ggml_tensor *>{ weights[0] }, k, n, count, with_ranges);
                printf("%s %ld %ld %ld %d %.3f\n", name.c_str(), (long) m, (long) k, (long) n, cold, us);
                fflush(stdout);
            }
        }
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }
    ggml_backend_free(backend);
    return 0;
}
