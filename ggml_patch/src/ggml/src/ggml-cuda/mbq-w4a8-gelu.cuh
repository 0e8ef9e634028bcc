#pragma once

// Activation functions that can be fused with the quantisation of their result. The expressions are upstream's (unary.cu).

#include "unary.cuh"

enum mbq_w4a8_function { MBQ_W4A8_NONE, MBQ_W4A8_SWIGLU, MBQ_W4A8_GELU, MBQ_W4A8_GELU_ERF, MBQ_W4A8_GELU_QUICK };

// See unary_op_kernel
template <mbq_w4a8_function f> struct mbq_w4a8_gelu {
    static __device__ __forceinline__ float of(const float x) {
        if constexpr (f == MBQ_W4A8_GELU) {
            return ggml_cuda_op_gelu_single(x);
        } else if constexpr (f == MBQ_W4A8_GELU_ERF) {
            return 0.5f*x*(1.0f + erff(x*0.70710678118654752440084436210484f));
        } else {
            return x * (1.0f / (1.0f + expf(-1.702f * x)));
        }
    }
};

// The node's function, if it is one of them
static mbq_w4a8_function mbq_w4a8_function_of(const ggml_tensor * node) {
    if (node->view_src) {
        return MBQ_W4A8_NONE;
    }
    if (node->op == GGML_OP_GLU) {
        return ggml_get_glu_op(node) == GGML_GLU_OP_SWIGLU && node->src[1] ? MBQ_W4A8_SWIGLU : MBQ_W4A8_NONE;
    }
    if (node->op != GGML_OP_UNARY) {
        return MBQ_W4A8_NONE;
    }
    switch (ggml_get_unary_op(node)) {
        case GGML_UNARY_OP_GELU:       return MBQ_W4A8_GELU;
        case GGML_UNARY_OP_GELU_ERF:   return MBQ_W4A8_GELU_ERF;
        case GGML_UNARY_OP_GELU_QUICK: return MBQ_W4A8_GELU_QUICK;
        default:                       return MBQ_W4A8_NONE;
    }
}
