#include "mbq.cuh"
#include "unary.cuh"
#include "mbq-launch.cuh"
#include "mbq-rope.cuh"
#include "ggml-mbq-common.h"

#include <climits>

// With more columns: mbq_gemm, or dequantise to fp16 and cuBLAS.
static constexpr int64_t MBQ_MMV_MAX_COLUMNS = 64;

// Calls `with` with the layout of a type
template <typename F> static auto mbq_with_layout(const ggml_type type, const F & with) {
    switch (type) {
        case GGML_TYPE_MBQ3:     return with(mbq_layout<QKMBQ3, 1>());
        case GGML_TYPE_MBQ3_64:  return with(mbq_layout<QKMBQ3_64, 1>());
        case GGML_TYPE_MBQ3S:    return with(mbq_layout<QKMBQ3, 2>());
        case GGML_TYPE_MBQ3S_64: return with(mbq_layout<QKMBQ3_64, 2>());
        default:                 GGML_ABORT("not an MBQ type");
    }
}

// Dequantisation. Lane r of the QK/4 of a block writes weights 4r..4r+3: plane r / (QK/16), word r % (QK/16) of ql.

template <typename L>
static __device__ __forceinline__ float4 mbq_dequantize_4(const uint32_t * block, const int r) {
    constexpr int QK = L::QK;
    const int    plane = r / (QK/16);
    const int    word  = r % (QK/16);
    const float2 dm    = mbq_scale<L>(L::scales == 1 ? *block : ((const uint16_t *) block)[plane/2], 0);
    const uint32_t ql  = block[1 + word] >> 2*plane & 0x03030303u;
    const uint32_t qh  = block[1 + QK/16 + word % (QK/32)] >> ((2*plane + 2)%8 + word/(QK/32)) & 0x01010101u;
    const uint32_t q   = ql | qh << 2;
    const float4   f   = make_float4(q & 0xFF, q >> 8 & 0xFF, q >> 16 & 0xFF, q >> 24);
    if constexpr (L::scales == 1) {
        return make_float4(f.x*dm.x + dm.y, f.y*dm.x + dm.y, f.z*dm.x + dm.y, f.w*dm.x + dm.y);
    } else {
        return make_float4((f.x + dm.y)*dm.x, (f.y + dm.y)*dm.x, (f.z + dm.y)*dm.x, (f.w + dm.y)*dm.x);
    }
}

template <typename T> static __device__ __forceinline__ void mbq_write_4(T * y, const float4 v) {
    y[0] = ggml_cuda_cast<T>(v.x);
    y[1] = ggml_cuda_cast<T>(v.y);
    y[2] = ggml_cuda_cast<T>(v.z);
    y[3] = ggml_cuda_cast<T>(v.w);
}

template <> __device__ __forceinline__ void mbq_write_4(half * y, const float4 v) { // one 8-byte store
    const half2 h[2] = { __floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w) };
    *(int2 *) y = *(const int2 *) h;
}

template <> __device__ __forceinline__ void mbq_write_4(float * y, const float4 v) {
    *(float4 *) y = v;
}

template <typename L, typename T>
static __global__ void mbq_dequantize(const uint32_t * x, T * y, const int64_t n) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    for (int64_t i = (int64_t) blockIdx.x*blockDim.x + threadIdx.x; i < n/4; i += (int64_t) gridDim.x*blockDim.x) {
        mbq_write_4(y + 4*i, mbq_dequantize_4<L>(x + i/(L::QK/4)*L::block_words, i % (L::QK/4)));
    }
}

template <typename L, typename T>
static void mbq_dequantize_cuda(const void * x, T * y, const int64_t n, cudaStream_t stream) {
    const int64_t ctas = std::min<int64_t>((n/4 + 255)/256, 1 << 16);
    ggml_cuda_kernel_launch(mbq_dequantize<L, T>, ggml_cuda_kernel_launch_params(dim3(ctas), dim3(256), 0, stream), (const uint32_t *) x, y, n);
}

template <typename T> static to_t_cuda_t<T> mbq_to_t(const ggml_type type) {
    if (!ggml_cuda_mbq_type(type)) {
        return nullptr;
    }
    return mbq_with_layout(type, [](auto layout) -> to_t_cuda_t<T> { return mbq_dequantize_cuda<decltype(layout), T>; });
}

to_fp16_cuda_t ggml_cuda_mbq_to_fp16(const ggml_type type) { return mbq_to_t<half>(type); }
to_bf16_cuda_t ggml_cuda_mbq_to_bf16(const ggml_type type) { return mbq_to_t<nv_bfloat16>(type); }
to_fp32_cuda_t ggml_cuda_mbq_to_fp32(const ggml_type type) { return mbq_to_t<float>(type); }

// Rows by index. Grid: (indices, pieces of a row, the other dimensions of the indices); strides in bytes, s10.. in elements.
template <typename L>
static __global__ void mbq_get_rows(const char * src0, const int32_t * ids, float * dst, const int64_t k, const int64_t ne11, const int64_t ne12,
        const int64_t nb01, const int64_t nb02, const int64_t nb03, const int64_t s10, const int64_t s11, const int64_t s12,
        const int64_t s1, const int64_t s2, const int64_t s3) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    for (int64_t z = blockIdx.z; z < ne11*ne12; z += gridDim.z) {
        const int64_t i11 = z % ne11;
        const int64_t i12 = z / ne11;
        const int64_t row = ids[blockIdx.x*s10 + i11*s11 + i12*s12];
        const uint32_t * x = (const uint32_t *) (src0 + row*nb01 + i11*nb02 + i12*nb03);
        float * y = dst + blockIdx.x*s1 + i11*s2 + i12*s3;
        for (int64_t i = (int64_t) blockIdx.y*blockDim.x + threadIdx.x; i < k/4; i += (int64_t) gridDim.y*blockDim.x) {
            mbq_write_4(y + 4*i, mbq_dequantize_4<L>(x + i/(L::QK/4)*L::block_words, i % (L::QK/4)));
        }
    }
}

void ggml_cuda_mbq_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    GGML_TENSOR_BINARY_OP_LOCALS
    GGML_ASSERT(src1->type == GGML_TYPE_I32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(ne13 == 1 && nb00 == ggml_type_size(src0->type) && nb0 == sizeof(float));

    const auto kernel = mbq_with_layout(src0->type, [](auto layout) { return &mbq_get_rows<decltype(layout)>; });
    const dim3 grid(ne10, std::min<int64_t>((ne00/4 + 255)/256, UINT16_MAX), std::min<int64_t>(ne11*ne12, UINT16_MAX));
    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(256), 0, ctx.stream()),
        (const char *) src0->data, (const int32_t *) src1->data, (float *) dst->data, ne00, ne11, ne12, (int64_t) nb01, (int64_t) nb02, (int64_t) nb03,
        (int64_t) (nb10/sizeof(int32_t)), (int64_t) (nb11/sizeof(int32_t)), (int64_t) (nb12/sizeof(int32_t)),
        (int64_t) (nb1/sizeof(float)), (int64_t) (nb2/sizeof(float)), (int64_t) (nb3/sizeof(float)));
}

// Products

bool ggml_cuda_mbq_supports(const ggml_tensor * op, const int cc) {
    if (op->op == GGML_OP_GET_ROWS) {
        return op->type == GGML_TYPE_F32;
    }
    const bool f32 = op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_F32;
    if (op->op == GGML_OP_MUL_MAT_ID) {
        return f32 && ggml_cuda_mbq_can_fuse(op, cc);
    }
    return f32 && (turing_mma_available(cc) || ggml_is_contiguously_allocated(op->src[0])); // as cuBLAS wants it
}

bool ggml_cuda_mbq_can_fuse(const ggml_tensor * mul_mat, const int cc) {
    if (ggml_is_row_scale_mul_mat(mul_mat)) {
        return false; // not a product for mul_mat_vec_q
    }
    // One column of 32768 activations and the rings of two warps fit into every card's shared memory (Turing: 64 KiB).
    return turing_mma_available(cc) && mul_mat->src[0]->ne[0] <= 32768 && std::max({ mul_mat->ne[1], mul_mat->ne[2], mul_mat->ne[3] }) <= UINT16_MAX;
}

// Arguments common to MUL_MAT and MUL_MAT_ID. Strides of x in elements.
static mbq_mmv_args mbq_args(const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * dst) {
    GGML_ASSERT(src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(src0->nb[0] == ggml_type_size(src0->type) && src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    GGML_ASSERT(src0->ne[1] <= INT_MAX && src0->nb[1] <= INT_MAX && src1->ne[0] <= INT_MAX);
    mbq_mmv_args args = {};
    args.w         = (const char *) src0->data;
    args.x         = src1->data;
    args.dst       = (float *) dst->data;
    args.row_bytes = src0->nb[1];
    args.w_channel = src0->nb[2];
    args.w_sample  = src0->nb[3];
    args.M         = src0->ne[1];
    args.blocks    = src0->ne[0]/ggml_blck_size(src0->type);
    args.w_channels = src0->ne[2];
    args.w_samples  = src0->ne[3];
    args.channel_ratio = 1;
    args.sample_ratio  = 1;
    args.x_channels    = 1;
    args.x_aligned     = mbq_aligned(src1->data, src1->nb[1], src1->nb[2], src1->nb[3]);
    return args;
}

bool ggml_cuda_mbq_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    if (ggml_is_row_scale_mul_mat(dst)) {
        return ggml_cuda_w4a8_mul_mat(ctx, src0, src1, dst);
    }
    GGML_TENSOR_BINARY_OP_LOCALS
    constexpr int64_t step = 32; // columns per pass over the weights
    const bool many = ne11 > MBQ_MMV_MAX_COLUMNS && ggml_is_contiguously_allocated(src0); // the conversion does not support strides
    if (!turing_mma_available(ggml_cuda_info().devices[ctx.device].cc)) {
        return false;
    }
    mbq_mmv_args args  = mbq_args(src0, src1, dst);
    args.x_column      = nb11/sizeof(float);
    args.x_channel     = nb12/sizeof(float);
    args.x_sample      = nb13/sizeof(float);
    args.dst_column    = nb1/sizeof(float);
    args.dst_channel   = nb2/sizeof(float);
    args.dst_sample    = nb3/sizeof(float);
    args.channel_ratio = ne12/ne02;
    args.sample_ratio  = ne13/ne03;
    args.N       = ne11;
    if (many) {
        const auto gemm = mbq_with_layout(src0->type, [](auto layout) { return &mbq_mul_mat_gemm<decltype(layout)>; });
        return ne12*ne13 == 1 && ggml_get_op_params_i32(dst, 0) != GGML_PREC_F32 && gemm(ctx, args);
    }
    for (int64_t i = 0; i < ne11; i += step) {
        args.x       = (const char *) src1->data + i*nb11;
        args.dst     = (float *) ((char *) dst->data + i*nb1);
        args.N = std::min(step, ne11 - i);
        const auto product = mbq_with_layout(src0->type, [](auto layout) { return &mbq_mul_mat_mmv<decltype(layout)>; });
        if (!product(ctx, args, ne12, ne13)) {
            GGML_ASSERT(i == 0);
            return false;
        }
    }
    return true;
}

void ggml_cuda_mbq_mul_mat_vec(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
        ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion) {
    GGML_TENSOR_BINARY_OP_LOCALS
    GGML_ASSERT(!ids || (ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t)));
    GGML_ASSERT(ids || ne11 == 1);
    mbq_mmv_args args = mbq_args(src0, src1, dst);
    args.N = 1;
    if (ids) { // a channel is a slot, a sample a token
        args.ids         = (const int32_t *) ids->data;
        args.ids_stride  = ids->nb[1]/sizeof(int32_t);
        args.x_channels  = ne11;
        args.x_channel   = nb11/sizeof(float);
        args.x_sample    = nb12/sizeof(float);
        args.dst_channel = nb1/sizeof(float);
        args.dst_sample  = nb2/sizeof(float);
    } else {
        args.x_channel     = nb12/sizeof(float);
        args.x_sample      = nb13/sizeof(float);
        args.dst_channel   = nb2/sizeof(float);
        args.dst_sample    = nb3/sizeof(float);
        args.channel_ratio = ne12/ne02;
        args.sample_ratio  = ne13/ne03;
    }
    if (fusion) {
        GGML_ASSERT(!fusion->x_scale && !fusion->gate_scale); // only made for NVFP4
        for (const ggml_tensor * bias : { fusion->x_bias, fusion->gate_bias }) {
            GGML_ASSERT(!bias || (bias->type == GGML_TYPE_F32 && bias->ne[0] == ne0 && (!ids || bias->ne[1] == ne02)));
            args.bias_channel = bias && ids ? bias->nb[1]/sizeof(float) : args.bias_channel;
        }
        GGML_ASSERT(!fusion->gate || (fusion->gate->type == src0->type && ggml_are_same_stride(fusion->gate, src0)));
        args.bias      = fusion->x_bias    ? (const float *) fusion->x_bias->data    : nullptr;
        args.gate_bias = fusion->gate_bias ? (const float *) fusion->gate_bias->data : nullptr;
        args.gate      = fusion->gate      ? (const char *)  fusion->gate->data      : nullptr;
        args.glu_op    = fusion->glu_op;
        args.glu_limit = fusion->glu_limit;
    }
    const auto launch = mbq_with_layout(src0->type, [](auto layout) { return &mbq_launch_mmv<decltype(layout), 0>; });
    GGML_ASSERT(launch(ctx, args, ids ? ne1 : ne12, ids ? ne2 : ne13));
}

bool ggml_cuda_mbq_rope(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const bool takes = mbq_rope_takes(dst);
    if (takes) {
        mbq_rope_run(ctx, dst);
    }
    return takes;
}
