#pragma once

#include "common.cuh"
#include "ggml-row-scale.h"

// Products of Q4_0 and Q8_0 weights with one scale a row, as ggml-row-scale.h says them: int8 activations with one scale a column, integer sums over
// all of K, the same bits as on the CPU. On Hopper more than 8 columns take wgmma; other cards take 8 columns at a time with dp4a.

// False where the weight is not such a one: the caller goes on with the type's own product.
bool ggml_cuda_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);
