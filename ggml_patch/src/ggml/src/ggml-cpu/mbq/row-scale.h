#pragma once

#include "ggml-row-scale.h"

// Products of weights with one scale per row on the CPU (ggml-row-scale.h).

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// returns false if dst is not such a product
bool   ggml_compute_forward_mul_mat_row_scale(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_row_scale_work_size(int n_tasks, const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
