#include "mbq.cuh"

#include <algorithm>

// The CUDA kernel of ggml-patches.h

struct mbq_patches_args {
    const uint8_t * bytes; // if nullptr:
    const float   * floats;
    void * dst;
    ggml_patches_params of;
    int width, height;    // pixels
    int patches, rows;    // patches per picture, and in total
};

static constexpr int MBQ_PATCHES_THREADS = 256;

// A CTA computes several patches, because its table takes as long as two or three of them. Rounded divisions even with -use_fast_math: the bits of the CPU backend.
template <typename T>
static __global__ void __launch_bounds__(MBQ_PATCHES_THREADS) mbq_patches(const mbq_patches_args args) {
    __shared__ T table[3][256];
    ggml_cuda_pdl_lc();
    for (int c = 0; c < 3; ++c) {
        table[c][threadIdx.x] = (T) __fdiv_rn(__fsub_rn(__fdiv_rn((float) threadIdx.x, 255.0f), args.of.mean[c]), args.of.std[c]);
    }
    __syncthreads();
    ggml_cuda_pdl_sync();
    const int size = args.of.size, square = size*size;
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const ggml_patch_place at = ggml_patch_at(row%args.patches, args.width/size, args.of.merge);
        const int64_t first = (((int64_t) row/args.patches*args.height + at.y*size)*args.width + at.x*size)*3;
        T * to = (T *) args.dst + (int64_t) row*3*square;
        for (int i = threadIdx.x; i < 3*square; i += MBQ_PATCHES_THREADS) {
            const int c = i/square, y = i%square/size, x = i%size; // size divides square
            const int64_t from = first + (y*args.width + x)*3 + c;
            to[i] = args.bytes ? table[c][args.bytes[from]] : (T) args.floats[from];
        }
    }
}

void ggml_cuda_mbq_patches(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[0];
    const bool bytes = x->type == GGML_TYPE_I8;
    const int  rows  = dst->ne[1]*dst->ne[2];
    const mbq_patches_args args = { bytes ? (const uint8_t *) x->data : nullptr, bytes ? nullptr : (const float *) x->data, dst->data, ggml_patches_of(dst),
        (int) x->ne[1], (int) x->ne[2], (int) dst->ne[1], rows };
    const int ctas = std::min(rows, 8*ggml_cuda_info().devices[ctx.device].nsm);
    const ggml_cuda_kernel_launch_params params(dim3(ctas), dim3(MBQ_PATCHES_THREADS), 0, ctx.stream());
    const auto kernel = dst->type == GGML_TYPE_F16 ? &mbq_patches<half> : &mbq_patches<float>;
    ggml_cuda_kernel_launch(kernel, params, args);
}
