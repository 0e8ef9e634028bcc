#pragma once

#include "ggml.h"
#include "ggml-mbq-common.h"

// Reference conversions of the MBQ types (included by ggml-quants.h, after ggml-common.h)

#ifdef __cplusplus
extern "C" {
#endif

GGML_API void quantize_row_mbq3_ref    (const float * GGML_RESTRICT x, block_mbq3     * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_mbq3_64_ref (const float * GGML_RESTRICT x, block_mbq3_64  * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_mbq3s_ref   (const float * GGML_RESTRICT x, block_mbq3s    * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_mbq3s_64_ref(const float * GGML_RESTRICT x, block_mbq3s_64 * GGML_RESTRICT y, int64_t k);

GGML_API void dequantize_row_mbq3    (const block_mbq3     * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_mbq3_64 (const block_mbq3_64  * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_mbq3s   (const block_mbq3s    * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_mbq3s_64(const block_mbq3s_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

GGML_API size_t quantize_mbq3    (const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_mbq3_64 (const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_mbq3s   (const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_mbq3s_64(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

// Whether the scales of nb blocks of MBQ3S or MBQ3S_64, size bytes each, are finite; prints the first that is not.
bool ggml_mbq3s_validate(const void * data, size_t nb, size_t size);

#ifdef __cplusplus
}
#endif

// entries of type_traits[] in ggml.c
#define GGML_MBQ_TRAITS(TYPE, name, weights)                                       \
    [GGML_TYPE_##TYPE] = {                                                         \
        .type_name                = #name,                                         \
        .blck_size                = weights,                                       \
        .type_size                = sizeof(block_##name),                          \
        .is_quantized             = true,                                          \
        .to_float                 = (ggml_to_float_t) dequantize_row_##name,       \
        .from_float_ref           = (ggml_from_float_t) quantize_row_##name##_ref, \
    },

#define GGML_MBQ_TYPE_TRAITS                       \
    GGML_MBQ_TRAITS(MBQ3,     mbq3,     QKMBQ3)    \
    GGML_MBQ_TRAITS(MBQ3_64,  mbq3_64,  QKMBQ3_64) \
    GGML_MBQ_TRAITS(MBQ3S,    mbq3s,    QKMBQ3)    \
    GGML_MBQ_TRAITS(MBQ3S_64, mbq3s_64, QKMBQ3_64)
