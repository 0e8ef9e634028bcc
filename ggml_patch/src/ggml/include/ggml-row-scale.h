#pragma once

// Weights whose blocks (Q4_0, Q8_0) repeat one scale over the whole row: their products sum integers over all of K.
//
// The file names such tensors (mbq.row_scale), and the loader sets the flag on them. The flag is a promise that is not verified: if scales of
// a row differ, products are wrong, but nothing worse happens, since kernels read the scale of a row's first block and the codes of all
// blocks. Without the flag, or in a program that does not know it, the tensor is a plain Q4_0 or Q8_0.
//
// The product of a flagged weight with a row x of float activations is defined as follows; every backend gives the same bits, however a batch is split:
//
//   amax  the row's static range if it has one (src[2], below), else the largest |x[k]| of the row; below GGML_ROW_SCALE_AMAX_MIN it counts as 0
//   q[k]  x[k] * (127.0f / amax), clamped to -127 to 127, rounded half to even, as int8; 0 if amax is 0
//   s_x   amax / 127.0f
//   acc   the sum over all k of code[k] * q[k], int32; the code of Q4_0 is its nibble - 8. |acc| < 2^31 up to K = 132000
//   d_w   the scale of the row's first block
//   y     ((float) acc * d_w) * s_x
//
// Static ranges: src[2] of the product, if present, is F32 [1, rows of activations], with 0 for rows without a range. Clamping q matters only for values
// beyond a static range. If nb[1] of src[2] is 0, one range applies to all rows; the graph builder then guarantees that it is finite and at least
// GGML_ROW_SCALE_AMAX_MIN (vision towers: clip-mbq-act.h). A kernel that computes activations can then write int8 without knowing the largest value of a row.
//
// Each float operation is rounded to nearest separately: true divisions, no fused multiply-add. Above GGML_ROW_SCALE_AMAX_MIN no relevant
// number is a float denormal, so code that flushes them agrees. Activations that are not finite give unspecified results.

#include "ggml.h"

// upstream uses bits 0 to 4 of ggml_tensor::flags
#define GGML_TENSOR_FLAG_ROW_SCALE (1 << 16)

// The least product is then 2^-24 (fp16's least denormal) * 2^-95 / 127 > 2^-126; and 127.0f / amax is finite.
#define GGML_ROW_SCALE_AMAX_MIN 0x1p-95f

// Whether dst is a product of such a weight with float activations (only GGML_OP_MUL_MAT: experts use the stock product).
static inline bool ggml_is_row_scale_mul_mat(const struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    return dst->op == GGML_OP_MUL_MAT && (src0->flags & GGML_TENSOR_FLAG_ROW_SCALE) != 0 &&
        (src0->type == GGML_TYPE_Q4_0 || src0->type == GGML_TYPE_Q8_0) && dst->src[1]->type == GGML_TYPE_F32;
}

// The static range of row i of the activations, 0 if it has none; ranges: the product's src[2], in memory that the caller can read.
static inline float ggml_row_scale_range(const struct ggml_tensor * ranges, int64_t i) {
    return ranges ? *(const float *) ((const char *) ranges->data + i*ranges->nb[1]) : 0.0f;
}
