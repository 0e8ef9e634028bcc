#pragma once

#include "ggml.h"
#include "ggml-mbq-common.h"

// Reference conversions of the MBQ types (included by ggml-quants.h, after ggml-common.h)

#ifdef __cplusplus
extern "C" {
#endif

GGML_API void quantize_row_mbq3_ref   (const float * GGML_RESTRICT x, block_mbq3    * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_mbq3_64_ref(const float * GGML_RESTRICT x, block_mbq3_64 * GGML_RESTRICT y, int64_t k);

GGML_API void dequantize_row_mbq3   (const block_mbq3    * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_mbq3_64(const block_mbq3_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

GGML_API size_t quantize_mbq3   (const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_mbq3_64(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif

// entries of type_traits[] in ggml.c
#define GGML_MBQ_TYPE_TRAITS                                                      \
    [GGML_TYPE_MBQ3] = {                                                          \
        .type_name                = "mbq3",                                       \
        .blck_size                = QKMBQ3,                                       \
        .type_size                = sizeof(block_mbq3),                           \
        .is_quantized             = true,                                         \
        .to_float                 = (ggml_to_float_t) dequantize_row_mbq3,        \
        .from_float_ref           = (ggml_from_float_t) quantize_row_mbq3_ref,    \
    },                                                                            \
    [GGML_TYPE_MBQ3_64] = {                                                       \
        .type_name                = "mbq3_64",                                    \
        .blck_size                = QKMBQ3_64,                                    \
        .type_size                = sizeof(block_mbq3_64),                        \
        .is_quantized             = true,                                         \
        .to_float                 = (ggml_to_float_t) dequantize_row_mbq3_64,     \
        .from_float_ref           = (ggml_from_float_t) quantize_row_mbq3_64_ref, \
    },
