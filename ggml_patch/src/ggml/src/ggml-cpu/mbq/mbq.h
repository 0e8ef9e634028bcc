#pragma once

#include "ggml.h"

// The MBQ types on the CPU

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_MBQ_DECLARE(name)                                                                                                           \
    void ggml_mbq_from_float_##name(const float * x, void * y, int64_t k);                                                               \
    void ggml_vec_dot_##name##_q8_1        (int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc); \
    void ggml_vec_dot_##name##_q8_1_generic(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

GGML_MBQ_DECLARE(mbq3)
GGML_MBQ_DECLARE(mbq3_64)
GGML_MBQ_DECLARE(mbq3s)
GGML_MBQ_DECLARE(mbq3s_64)

// Matrix product, also for weights with one scale per row (row-scale.h). Returns false if the plain path (vec_dot) must compute it: a reference
// run, another type, or no kernel for this instruction set or number of rows of activations.
struct ggml_compute_params;
bool   ggml_compute_forward_mul_mat_mbq(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_mbq_work_size(int n_tasks, const struct ggml_tensor * dst);

// Flash attention for few rows, with the order of sums of many rows. Returns false if ops.cpp must compute it: many rows, a reference run, or
// another type of cache.
bool   ggml_compute_forward_flash_attn_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif

// entries of type_traits_cpu[] in ggml-cpu.c
#define GGML_MBQ_TRAITS_CPU(TYPE, name)                         \
    [GGML_TYPE_##TYPE] = {                                      \
        .from_float               = ggml_mbq_from_float_##name, \
        .vec_dot                  = ggml_vec_dot_##name##_q8_1, \
        .vec_dot_type             = GGML_TYPE_Q8_1,             \
        .nrows                    = 1,                          \
    },

#define GGML_MBQ_TYPE_TRAITS_CPU           \
    GGML_MBQ_TRAITS_CPU(MBQ3,     mbq3)    \
    GGML_MBQ_TRAITS_CPU(MBQ3_64,  mbq3_64) \
    GGML_MBQ_TRAITS_CPU(MBQ3S,    mbq3s)   \
    GGML_MBQ_TRAITS_CPU(MBQ3S_64, mbq3s_64)
