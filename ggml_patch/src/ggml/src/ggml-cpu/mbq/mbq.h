#pragma once

#include "ggml.h"

// CPU side of the MBQ types

#ifdef __cplusplus
extern "C" {
#endif

void ggml_mbq_from_float_mbq3   (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void ggml_mbq_from_float_mbq3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_mbq3_q8_1   (int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_mbq3_64_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

void ggml_vec_dot_mbq3_q8_1_generic   (int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_mbq3_64_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// Matrix product with 4 and more rows of activations; false where the plain path (vec_dot) is to do it: fewer rows, a reference run,
// another type, no kernel for this instruction set.
struct ggml_compute_params;
bool   ggml_compute_forward_mul_mat_mbq(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_mbq_work_size(int n_tasks, const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif

// entries of type_traits_cpu[] in ggml-cpu.c
#define GGML_MBQ_TYPE_TRAITS_CPU                                   \
    [GGML_TYPE_MBQ3] = {                                           \
        .from_float               = ggml_mbq_from_float_mbq3,      \
        .vec_dot                  = ggml_vec_dot_mbq3_q8_1,        \
        .vec_dot_type             = GGML_TYPE_Q8_1,                \
        .nrows                    = 1,                             \
    },                                                             \
    [GGML_TYPE_MBQ3_64] = {                                        \
        .from_float               = ggml_mbq_from_float_mbq3_64,   \
        .vec_dot                  = ggml_vec_dot_mbq3_64_q8_1,     \
        .vec_dot_type             = GGML_TYPE_Q8_1,                \
        .nrows                    = 1,                             \
    },
