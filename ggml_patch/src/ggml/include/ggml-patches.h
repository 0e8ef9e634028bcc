#pragma once

// The patches of a picture, as the input of a matrix product with the weights of a vision tower's first convolution (whose stride is its kernel size). C++, header only.
//
//   src[0]  [3, width, height, pictures], interleaved RGB: I8, read as unsigned bytes, or F32
//   dst     F16 or F32 [3*size*size, patches per picture, pictures]: each patch as three planes, each plane row by row. Bytes become (byte/255 - mean)/std, every
//           operation rounded separately, the values that libmtmd's preprocessing gives; floats are only rearranged. Patches come in raster order, or, with merge = 2,
//           in groups of 2 x 2 neighbours, the order of towers that merge these.
//
// Upstream's im2col starts from floats, so four times as many bytes go to the GPU (9.6 MB for 896 x 896 pixels), and the product has to be transposed afterwards.
//
// The node is a GGML_OP_CUSTOM, which the CPU backend runs unchanged; ggml-cuda has a kernel for it (mbq-patches.cu). Its parameters follow upstream's in op_params.

#include "ggml.h"

#include <cstdint>
#include <cstring>

struct ggml_patches_params {
    uint32_t magic; // zero in every other node
    uint16_t size, merge;
    float    mean[3], std[3];
};

static constexpr uint32_t GGML_PATCHES_MAGIC  = 0x68637470;
static constexpr size_t   GGML_PATCHES_OFFSET = 32; // in op_params, after the 24 bytes of ggml_custom_op_params
static_assert(GGML_PATCHES_OFFSET + sizeof(ggml_patches_params) <= GGML_MAX_OP_PARAMS, "op_params is too small");

static inline ggml_patches_params ggml_patches_of(const ggml_tensor * dst) {
    ggml_patches_params params;
    memcpy(&params, (const char *) dst->op_params + GGML_PATCHES_OFFSET, sizeof(params));
    return params;
}

static inline bool ggml_is_patches(const ggml_tensor * dst) {
    return dst->op == GGML_OP_CUSTOM && ggml_patches_of(dst).magic == GGML_PATCHES_MAGIC;
}

// The row and column of patch i in a picture of `across` patches per row
struct ggml_patch_place {
    int64_t x, y;
};

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
__host__ __device__
#endif
static inline ggml_patch_place ggml_patch_at(const int64_t i, const int64_t across, const int merge) {
    const int64_t group = i/(merge*merge), inside = i%(merge*merge), groups = across/merge;
    return { group%groups*merge + inside%merge, group/groups*merge + inside/merge };
}

template <typename T, typename F>
static inline void ggml_patches_rows(ggml_tensor * dst, const int ith, const int nth, const F & rounded) {
    const ggml_patches_params params = ggml_patches_of(dst);
    const ggml_tensor * x = dst->src[0];
    const int64_t width = x->ne[1], height = x->ne[2], size = params.size;
    T table[3][256];
    for (int c = 0; c < 3; c++) {
        for (int i = 0; i < 256; i++) {
            const float value = (float) i / 255.0f;
            table[c][i] = rounded((value - params.mean[c]) / params.std[c]);
        }
    }
    for (int64_t row = ith; row < dst->ne[1]*dst->ne[2]; row += nth) {
        const ggml_patch_place at = ggml_patch_at(row%dst->ne[1], width/size, params.merge);
        const int64_t first = ((row/dst->ne[1]*height + at.y*size)*width + at.x*size)*3;
        T * to = (T *) dst->data + row*dst->ne[0];
        for (int c = 0; c < 3; c++) {
            for (int64_t i = 0; i < size; i++) {
                for (int64_t j = 0; j < size; j++) {
                    const int64_t from = first + (i*width + j)*3 + c;
                    *to++ = x->type == GGML_TYPE_I8 ? table[c][((const uint8_t *) x->data)[from]] : rounded(((const float *) x->data)[from]);
                }
            }
        }
    }
}

static inline void ggml_patches_compute(ggml_tensor * dst, int ith, int nth, void *) {
    if (dst->type == GGML_TYPE_F16) {
        ggml_patches_rows<ggml_fp16_t>(dst, ith, nth, [](const float x) { return ggml_fp32_to_fp16(x); });
    } else {
        ggml_patches_rows<float>(dst, ith, nth, [](const float x) { return x; });
    }
}

// type: F16 or F32
static inline ggml_tensor * ggml_patches(ggml_context * ctx, ggml_tensor * x, const ggml_type type, const int size, const int merge, const float * mean, const float * std) {
    GGML_ASSERT((x->type == GGML_TYPE_I8 || x->type == GGML_TYPE_F32) && x->ne[0] == 3 && x->ne[1]%(size*merge) == 0 && x->ne[2]%(size*merge) == 0 && ggml_is_contiguous(x));
    GGML_ASSERT(type == GGML_TYPE_F16 || type == GGML_TYPE_F32);
    ggml_tensor * dst = ggml_custom_4d(ctx, type, 3*size*size, x->ne[1]/size*(x->ne[2]/size), x->ne[3], 1, &x, 1, ggml_patches_compute, GGML_N_TASKS_MAX, nullptr);
    const ggml_patches_params params = { GGML_PATCHES_MAGIC, (uint16_t) size, (uint16_t) merge, { mean[0], mean[1], mean[2] }, { std[0], std[1], std[2] } };
    memcpy((char *) dst->op_params + GGML_PATCHES_OFFSET, &params, sizeof(params));
    return dst;
}
