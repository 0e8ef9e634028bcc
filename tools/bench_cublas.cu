// Times cuBLASLt's products on the first GPU: what any product of weights has to be held against. Built with bench_gpu.py, which also writes the input: lines
// `type m k n...`, type F16, I8 or F8. Output: `type m k n us`. Operands are in their type already (no quantising), results F16, I32 and BF16; of the
// algorithms that cuBLASLt proposes the fastest, weights rotating through more than any L2 where there are several.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>
#include <cublasLt.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define CHECK(call) do { const int status = (int) (call); if (status != 0) { fprintf(stderr, "%s: %d\n", #call, status); exit(1); } } while (0)

static constexpr size_t COLD_BYTES = 200u << 20;

struct kind {
    cudaDataType_t operand, result;
    cublasComputeType_t compute;
    cudaDataType_t scale;
    size_t operand_bytes, result_bytes;
};

static kind kind_of(const std::string & name) {
    if (name == "F16") { return { CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_32F, CUDA_R_32F, 2, 2 }; }
    if (name == "I8")  { return { CUDA_R_8I, CUDA_R_32I, CUBLAS_COMPUTE_32I, CUDA_R_32I, 1, 4 }; }
    if (name == "F8")  { return { CUDA_R_8F_E4M3, CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUDA_R_32F, 1, 2 }; }
    fprintf(stderr, "unknown type %s\n", name.c_str());
    exit(1);
}

// Roughly normal values: what a card's power, and so its clock, depends on
static __global__ void fill(void * data, const size_t n, const cudaDataType_t type) {
    for (size_t i = blockIdx.x*(size_t) blockDim.x + threadIdx.x; i < n; i += gridDim.x*(size_t) blockDim.x) {
        uint32_t h = (uint32_t) i*2654435761u;
        float sum = -2.0f;
        for (int j = 0; j < 4; ++j) {
            h = (h ^ h >> 15)*2246822519u + 374761393u;
            sum += (h >> 8)*(1.0f/(1 << 24));
        }
        if (type == CUDA_R_16F) {
            ((half *) data)[i] = __float2half(sum);
        } else if (type == CUDA_R_8I) {
            ((int8_t *) data)[i] = (int8_t) (sum*60.0f);
        } else {
            ((__nv_fp8_e4m3 *) data)[i] = __nv_fp8_e4m3(sum);
        }
    }
}

static void * filled(const size_t n, const kind & t) {
    void * p;
    CHECK(cudaMalloc(&p, n*t.operand_bytes));
    fill<<<1024, 256>>>(p, n, t.operand);
    return p;
}

static double time_product(cublasLtHandle_t handle, const kind & t, const int64_t m, const int64_t k, const int64_t n, void * workspace, const size_t workspace_bytes) {
    const size_t copies = std::max<size_t>(1, COLD_BYTES/(m*k*t.operand_bytes));
    std::vector<void *> weights;
    for (size_t i = 0; i < copies; ++i) { weights.push_back(filled(m*k, t)); }
    void * x = filled(k*n, t);
    void * y;
    CHECK(cudaMalloc(&y, m*n*t.result_bytes));

    cublasLtMatmulDesc_t product;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    CHECK(cublasLtMatmulDescCreate(&product, t.compute, t.scale));
    CHECK(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)));
    if (t.operand == CUDA_R_8F_E4M3) {
        const int8_t fast = 1; // sums of less than 32 bits inside the tensor cores, as most do
        CHECK(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof(fast)));
    }
    cublasLtMatrixLayout_t a, b, c;
    CHECK(cublasLtMatrixLayoutCreate(&a, t.operand, k, m, k));
    CHECK(cublasLtMatrixLayoutCreate(&b, t.operand, k, n, k));
    CHECK(cublasLtMatrixLayoutCreate(&c, t.result, m, n, m));
    cublasLtMatmulPreference_t preference;
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof(workspace_bytes)));
    cublasLtMatmulHeuristicResult_t found[8];
    int count = 0;
    CHECK(cublasLtMatmulAlgoGetHeuristic(handle, product, a, b, c, c, preference, 8, found, &count));

    const float   one_f = 1.0f, zero_f = 0.0f;
    const int32_t one_i = 1,    zero_i = 0;
    const bool integers = t.scale == CUDA_R_32I;
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    double best = 1e30;
    for (int i = 0; i < count; ++i) {
        const int products = std::max<int64_t>(8, (int64_t) 4e12/(m*k*n)); // some milliseconds
        std::vector<double> us;
        for (int round = 0; round < 7; ++round) {
            CHECK(cudaEventRecord(begin));
            for (int j = 0; j < products; ++j) {
                CHECK(cublasLtMatmul(handle, product, integers ? (const void *) &one_i : &one_f, weights[j % copies], a, x, b, integers ? (const void *) &zero_i : &zero_f,
                    y, c, y, c, &found[i].algo, workspace, workspace_bytes, 0));
            }
            CHECK(cudaEventRecord(end));
            CHECK(cudaEventSynchronize(end));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (round >= 2) { us.push_back(ms*1e3/products); }
        }
        std::sort(us.begin(), us.end());
        best = std::min(best, us[us.size()/2]);
    }
    for (void * w : weights) { CHECK(cudaFree(w)); }
    CHECK(cudaFree(x));
    CHECK(cudaFree(y));
    return count > 0 ? best : 0.0;
}

int main() {
    cublasLtHandle_t handle;
    CHECK(cublasLtCreate(&handle));
    const size_t workspace_bytes = 64u << 20;
    void * workspace;
    CHECK(cudaMalloc(&workspace, workspace_bytes));
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        std::string name;
        int64_t m, k, n;
        in >> name >> m >> k;
        while (in >> n) {
            printf("%s %ld %ld %ld %.3f\n", name.c_str(), (long) m, (long) k, (long) n, time_product(handle, kind_of(name), m, k, n, workspace, workspace_bytes));
            fflush(stdout);
        }
    }
    return 0;
}
