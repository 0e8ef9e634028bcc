#pragma once

// ROPE for vision towers (GGML_ROPE_TYPE_VISION). A CTA processes one position, where all heads have the same angles, with four numbers per thread. Upstream's kernel
// (rope_vision) has a CTA of 256 threads for each head, most of them past the end of the head, and computes sine and cosine again for each. The same bits.
//
// Directly after a product of F16 weights (mbq-f16.cuh), its input is F16, and it adds the bias.

#include "common.cuh"
#include "ggml-impl.h"

struct mbq_rope_angles {
    const int32_t * pos;
    int n_dims, first, both; // angles, of the first section, of both
    float freq_scale, attn_factor, theta_scale;

    // The offset in `positions` of the positions for pair i
    __device__ __forceinline__ const int32_t * positions_of(const int i, const int positions) const {
        return pos + (i % both < first ? 0 : positions);
    }

    // The frequency of pair i, by which a position is multiplied
    __device__ __forceinline__ float power(const int i) const {
        const int sector = i % both;
        return powf(theta_scale, sector < first ? sector : sector - first);
    }

    // Cosine and sine
    __device__ __forceinline__ float2 at(const float position, const float power) const {
        const float base  = position * power;
        const float theta = freq_scale * base;
        return make_float2(cosf(theta) * attn_factor, sinf(theta) * attn_factor);
    }

    // Those of the CTA's position
    __device__ __forceinline__ void make(float * cosine, float * sine) const {
        for (int i = threadIdx.x; i < n_dims; i += blockDim.x) {
            const float2 angle = at(positions_of(i, gridDim.x)[blockIdx.x], power(i));
            cosine[i] = angle.x;
            sine[i]   = angle.y;
        }
    }
};

// Rotates a pair of numbers, with the fused operations that nvcc generates for upstream's expression
static __device__ __forceinline__ void mbq_rope_turn(float & a, float & b, const float c, const float s) {
    const float first = fmaf(a, c, -__fmul_rn(b, s));
    b = fmaf(a, s, __fmul_rn(b, c));
    a = first;
}

static __device__ __forceinline__ void mbq_rope_turn(float4 & a, float4 & b, const float4 c, const float4 s) {
    mbq_rope_turn(a.x, b.x, c.x, s.x);
    mbq_rope_turn(a.y, b.y, c.y, s.y);
    mbq_rope_turn(a.z, b.z, c.z, s.z);
    mbq_rope_turn(a.w, b.w, c.w, s.w);
}

struct mbq_rope_args {
    const float * x;
    const half  * x16;  // instead of x, as far apart; nullptr: none
    const float * bias; // of x16; nullptr: none
    float * y;
    int64_t x_head, x_column, y_head, y_column; // elements
    int threads; // heads times quads
    mbq_rope_angles angles;
};

static __device__ __forceinline__ float4 mbq_rope_load(const mbq_rope_args & args, const int head, const int d) {
    const int64_t at = blockIdx.x*args.x_column + head*args.x_head + d;
    if (!args.x16) {
        return *(const float4 *) (args.x + at);
    }
    const int2 x = *(const int2 *) (args.x16 + at);
    const float2 a = __half22float2(((const half2 *) &x)[0]), b = __half22float2(((const half2 *) &x)[1]);
    const float4 v = make_float4(a.x, a.y, b.x, b.y);
    if (!args.bias) {
        return v;
    }
    const float4 w = *(const float4 *) (args.bias + head*args.x_head + d);
    return make_float4(__fadd_rn(v.x, w.x), __fadd_rn(v.y, w.y), __fadd_rn(v.z, w.z), __fadd_rn(v.w, w.w));
}

// Each thread reads its elements before it writes them, so y may be x
static __global__ void __launch_bounds__(1024) mbq_rope_vision(const mbq_rope_args args) {
    extern __shared__ __align__(16) float mbq_angles[];
    float * cosine = mbq_angles, * sine = mbq_angles + args.angles.n_dims;
    ggml_cuda_pdl_lc();
    const int quads = args.angles.n_dims/4;
    const int head  = threadIdx.x/quads, d = 4*(threadIdx.x % quads);
    const bool has  = threadIdx.x < args.threads;
    ggml_cuda_pdl_sync();
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
    if (has) {
        a = mbq_rope_load(args, head, d);
        b = mbq_rope_load(args, head, d + args.angles.n_dims);
    }
    args.angles.make(cosine, sine);
    __syncthreads();
    if (has) {
        mbq_rope_turn(a, b, *(const float4 *) (cosine + d), *(const float4 *) (sine + d));
        float * y = args.y + blockIdx.x*args.y_column + head*args.y_head + d;
        *(float4 *) y                        = a;
        *(float4 *) (y + args.angles.n_dims) = b;
    }
}

static bool mbq_rope_takes(const ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[0];
    const int32_t * params = dst->op_params;
    const int64_t quads = x->ne[0]/8;
    return params[2] == GGML_ROPE_TYPE_VISION && x->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && !dst->src[2] && ggml_get_op_params_f32(dst, 7) == 0.0f &&
        x->ne[0] % 8 == 0 && params[1] == x->ne[0]/2 && params[11] >= 0 && params[12] >= 0 && params[11] + params[12] > 0 && x->ne[3] == 1 && quads*x->ne[1] <= 1024 &&
        x->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) &&
        ((uintptr_t) x->data | (uintptr_t) dst->data | x->nb[1] | x->nb[2] | dst->nb[1] | dst->nb[2]) % 16 == 0;
}

static mbq_rope_angles mbq_rope_angles_of(const ggml_tensor * dst) {
    const int32_t * params = dst->op_params;
    mbq_rope_angles angles = {};
    angles.pos         = (const int32_t *) dst->src[1]->data;
    angles.n_dims      = params[1];
    angles.first       = params[11];
    angles.both        = params[11] + params[12];
    angles.freq_scale  = ggml_get_op_params_f32(dst, 6);
    angles.attn_factor = ggml_get_op_params_f32(dst, 8);
    angles.theta_scale = powf(ggml_get_op_params_f32(dst, 5), -2.0f/angles.n_dims);
    return angles;
}

static void mbq_rope_run(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const half * x16 = nullptr, const float * bias = nullptr) {
    const ggml_tensor * x = dst->src[0];
    mbq_rope_args args = {};
    args.x        = (const float *) x->data;
    args.x16      = x16;
    args.bias     = bias;
    args.y        = (float *) dst->data;
    args.x_head   = x->nb[1]/sizeof(float);
    args.x_column = x->nb[2]/sizeof(float);
    args.y_head   = dst->nb[1]/sizeof(float);
    args.y_column = dst->nb[2]/sizeof(float);
    args.angles   = mbq_rope_angles_of(dst);
    args.threads  = x->ne[1]*(args.angles.n_dims/4);
    const ggml_cuda_kernel_launch_params launch(dim3(x->ne[2]), dim3(GGML_PAD(args.threads, 32)), 2*args.angles.n_dims*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_rope_vision, launch, args);
}
