#pragma once

#include "common.cuh"
#include "convert.cuh"
#include "ggml-patches.h"
#include "ggml-row-scale.h"
#include "mbq-w4a8.cuh"

// The MBQ types on CUDA: the interface for ggml-cuda.cu, mmvq.cu and convert.cu.

static inline bool ggml_cuda_mbq_type(const ggml_type type) {
    return type == GGML_TYPE_MBQ3 || type == GGML_TYPE_MBQ3_64 || type == GGML_TYPE_MBQ3S || type == GGML_TYPE_MBQ3S_64;
}

// Whether these kernels compute the product: its weight has one of these types, or one scale per row. MUL_MAT_ID's products of one expert have no sources.
static inline bool ggml_cuda_mbq_product(const ggml_tensor * src0, const ggml_tensor * dst) {
    return ggml_cuda_mbq_type(src0->type) || ggml_is_row_scale_mul_mat(dst);
}

// MUL_MAT, MUL_MAT_ID and GET_ROWS with a weight of these types. Without int8 tensor cores only MUL_MAT (cuBLAS) and GET_ROWS.
bool ggml_cuda_mbq_supports(const ggml_tensor * op, int cc);

// False if a node with one column cannot use the kernel that fuses bias, gate and GLU.
bool ggml_cuda_mbq_can_fuse(const ggml_tensor * mul_mat, int cc);

// False if dequantising the weight for cuBLAS is better or the only way: the caller then does that.
bool ggml_cuda_mbq_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);

// Like ggml_cuda_mul_mat_vec_q: one column (or MUL_MAT_ID), with the nodes fused into it.
void ggml_cuda_mbq_mul_mat_vec(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
        ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion);

void ggml_cuda_mbq_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// ROPE of a vision tower. False: the caller uses upstream's kernel.
bool ggml_cuda_mbq_rope(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// The operation of ggml-patches.h
void ggml_cuda_mbq_patches(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// FLASH_ATTN_EXT of vision towers, on Hopper. False: the caller uses its own kernels.
bool ggml_cuda_mbq_attention(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);
bool ggml_cuda_mbq_attention_takes(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

static constexpr float MBQ_ATTENTION_LOG2E = 1.44269504f; // included in the scale of queries, so that exp2 replaces exp

// nullptr for other types
to_fp16_cuda_t ggml_cuda_mbq_to_fp16(ggml_type type);
to_bf16_cuda_t ggml_cuda_mbq_to_bf16(ggml_type type);
to_fp32_cuda_t ggml_cuda_mbq_to_fp32(ggml_type type);
