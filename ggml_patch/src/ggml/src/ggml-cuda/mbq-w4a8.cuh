#pragma once

#include "common.cuh"
#include "ggml-row-scale.h"

#include <functional>

// Products of Q4_0 and Q8_0 weights with one scale a row, as ggml-row-scale.h says them: int8 activations with one scale a column, integer sums over
// all of K, the same bits as on the CPU. On Hopper more than 8 columns take wgmma; other cards take 8 columns at a time with dp4a.

// False where the weight is not such a one: the caller goes on with the type's own product.
bool ggml_cuda_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);

// Before node i of a graph runs, for every i that does: finds out which products read the same activations (mbq-w4a8-inputs.cuh) and runs what can be
// fused with their quantising (mbq-w4a8-fuse.cuh) or with products (mbq-w4a8-added.cuh and, of one column, mbq-w4a8-one.cuh; of F16 weights mbq-f16.cuh). Without it
// (GGML_CUDA_DISABLE_FUSION) each product quantises its own. The number of nodes behind i that have run with it, as ggml_cuda_try_fuse.
int ggml_cuda_w4a8_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Whether the node that runs, behind which is a RESHAPE, is to put its result as F16 in the place of the floats, because only products of F16 weights read it
// (mbq-f16-inputs.cuh)
bool ggml_cuda_f16_result(ggml_backend_cuda_context & ctx, const ggml_tensor * node);

// Whether the queries of the attention dst lie as F16 in the place of their floats, scaled (mbq-qkv.cuh)
bool ggml_cuda_f16_queries(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// The values of the attention dst [head, heads, positions], if they lie as F16, each position from where its floats would begin; else nullptr (mbq-qkv.cuh)
const ggml_tensor * ggml_cuda_f16_values(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// Before a graph is given memory: keep(i, last) where what is made and read from node i on must stay in its place until node `last`, so that one kernel can make
// the products from i to last that read the same activations (mbq-w4a8-column.cuh).
void ggml_cuda_w4a8_keep(const ggml_cgraph * graph, const std::function<void(size_t, size_t)> & keep);

// Launches until now, of all devices, for tests. A CUDA graph that runs again is not counted.
enum ggml_cuda_w4a8_counted {
    GGML_CUDA_W4A8_QUANTISED, // passes of mbq_w4a8_quantize
    GGML_CUDA_W4A8_FOUND,     // products that found their activations quantised
    GGML_CUDA_W4A8_NORM,      // passes fused into a norm
    GGML_CUDA_W4A8_GLU,       // and into SwiGLU or a GELU
    GGML_CUDA_W4A8_ONE_COLUMN, // products of one column with what reads them
    GGML_CUDA_W4A8_ADDED,     // products of many columns with a bias, the residual stream or both
    GGML_CUDA_W4A8_TOGETHER,  // of several matrices
    GGML_CUDA_F16_PRODUCT,    // products of F16 weights with what is behind them (mbq-f16.cuh)
    GGML_CUDA_F16_FOUND,      // of these, those that found their activations as F16
    GGML_CUDA_F16_ROPE,       // and those with a rotary embedding behind them
    GGML_CUDA_W4A8_QKV,       // q, k and v made ready for attention in one kernel (mbq-qkv.cuh)
    GGML_CUDA_W4A8_VALUES,    // values stored as F16 by their product
    GGML_CUDA_W4A8_TURNED,    // and with them q and k, turned by it (mbq-w4a8-heads.cuh)
    GGML_CUDA_W4A8_PLACED,    // activations made as int8 by the product or the attention whose result they are (mbq-w4a8-codes.cuh)
    GGML_CUDA_W4A8_COUNTS,
};
extern "C" GGML_BACKEND_API int64_t ggml_cuda_w4a8_count(ggml_cuda_w4a8_counted what);
