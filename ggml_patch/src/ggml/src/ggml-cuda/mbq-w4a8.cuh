#pragma once

#include "common.cuh"
#include "ggml-row-scale.h"

#include <functional>

// Products of Q4_0 and Q8_0 weights with one scale per row, as defined in ggml-row-scale.h: int8 activations with one scale per column, integer sums over
// all of K, and the same bits as on the CPU. On Hopper, products of more than 8 columns use wgmma; other GPUs process 8 columns at a time with dp4a.

// Returns false if the weight is of another kind: the caller then continues with the type's ordinary product.
bool ggml_cuda_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);

// To be called before each node i of a graph that runs. Finds the products that read the same activations (mbq-w4a8-inputs.cuh) and runs the nodes that can be
// fused with their quantisation (mbq-w4a8-fuse.cuh) or with products (mbq-w4a8-added.cuh; of one column mbq-w4a8-one.cuh; of F16 weights mbq-f16.cuh).
// Without this call (GGML_CUDA_DISABLE_FUSION) each product quantises its own activations. Returns how many nodes after i have run with it, as
// ggml_cuda_try_fuse does.
int ggml_cuda_w4a8_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Whether the current node, which a RESHAPE follows, must store its result in place as F16 instead of floats, because only products of F16 weights
// read it (mbq-f16-inputs.cuh)
bool ggml_cuda_f16_result(ggml_backend_cuda_context & ctx, const ggml_tensor * node);

// Whether the queries of the attention node dst are stored in place as scaled F16 instead of floats (mbq-qkv.cuh)
bool ggml_cuda_f16_queries(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// The values [head, heads, positions] of the attention node dst if they are stored in place as F16, with each position at the start of its floats;
// otherwise nullptr (mbq-qkv.cuh)
const ggml_tensor * ggml_cuda_f16_values(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

// To be called before a graph is allocated. Calls keep(i, last) if tensors written or read from node i on must stay in place until node `last`, so that one
// kernel can compute all products from i to last that read the same activations (mbq-w4a8-column.cuh).
void ggml_cuda_w4a8_keep(const ggml_cgraph * graph, const std::function<void(size_t, size_t)> & keep);

// Launches so far on all devices, for tests. Replays of CUDA graphs are not counted.
enum ggml_cuda_w4a8_counted {
    GGML_CUDA_W4A8_QUANTISED, // passes of mbq_w4a8_quantize
    GGML_CUDA_W4A8_FOUND,     // products that found their activations already quantised
    GGML_CUDA_W4A8_NORM,      // quantisation fused into a norm
    GGML_CUDA_W4A8_GLU,       // or into SwiGLU or a GELU
    GGML_CUDA_W4A8_ONE_COLUMN, // products of one column with the nodes that read them
    GGML_CUDA_W4A8_ADDED,     // products of many columns with a bias, the residual stream or both
    GGML_CUDA_W4A8_TOGETHER,  // several matrices in one product
    GGML_CUDA_F16_PRODUCT,    // products of F16 weights with the nodes after them (mbq-f16.cuh)
    GGML_CUDA_F16_FOUND,      // those of them that found their activations as F16
    GGML_CUDA_F16_ROPE,       // those with a rotary embedding
    GGML_CUDA_W4A8_QKV,       // q, k and v prepared for attention by one kernel (mbq-qkv.cuh)
    GGML_CUDA_W4A8_VALUES,    // values stored as F16 by their product
    GGML_CUDA_W4A8_TURNED,    // and q and k rotated by their product too (mbq-w4a8-heads.cuh)
    GGML_CUDA_W4A8_PLACED,    // activations stored as int8 by the product or attention that computes them (mbq-w4a8-codes.cuh)
    GGML_CUDA_W4A8_COUNTS,
};
extern "C" GGML_BACKEND_API int64_t ggml_cuda_w4a8_count(ggml_cuda_w4a8_counted what);
