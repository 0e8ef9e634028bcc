// Products of weights with one scale per row: int32 over all of K, one epilogue (specified in ggml-row-scale.h)
//
// As in mbq.cpp, activations are quantised once per product to panels of up to COLS rows, and slabs of ROWS rows of weights are unpacked once
// and multiplied with every panel; with AMX in tiles (row-scale-amx.h), whose panels are larger. A single row of activations is multiplied
// along the stored rows of weights. Integer sums do not depend on their order, so all kernels give the same bits.

#include "row-scale.h"
#include "row-scale-panel.h"
#include "row-scale-simd.h"

#ifdef MBQ_SIMD_ROWS
#include "row-scale-gemm.h"
#include "row-scale-gemv.h"
#endif

namespace {

// ---- plain C: no vectors, or a reference run

template <typename B>
void multiply_plain(const B * w, const panel & y, int64_t k, float * out) {
    int32_t acc = 0;
    for (int64_t b = 0; b < k/QK; ++b) {
        const int8_t * q = y.q + b*QK;
        for (int i = 0; i < QK; ++i) {
            if constexpr (is_wide<B>) {
                acc += w[b].qs[i]*q[i];
            } else {
                acc += ((i < QK/2 ? w[b].qs[i] & 15 : w[b].qs[i - QK/2] >> 4) - 8)*q[i];
            }
        }
    }
    *out = (float) acc*scale_of(w)*y.s[0];
}

#ifndef MBQ_SIMD_ROWS

constexpr int ROWS = 8;
constexpr int COLS = 1;

size_t slab_bytes(int64_t) { return 0; }

int64_t chunk_slabs(int64_t, int64_t, int) { return 1; }

#endif

constexpr panel_shape SINGLE = { 1, QK, 1 };
constexpr panel_shape PANELS = { COLS, QK, 1 };

panel_shape shape_for(const struct ggml_tensor * dst, bool plain) {
    if (plain || dst->src[1]->ne[1] == 1) {
        return SINGLE;
    }
#ifdef ROW_SCALE_AMX
    if (row_scale_amx::ready()) {
        return TILES;
    }
#endif
    return PANELS;
}

size_t panels_bytes(const struct ggml_tensor * src1, const panel_shape & shape) {
    return GGML_PAD(shape.row_bytes(src1->ne[0])*shape.rows(src1->ne[1])*src1->ne[2]*src1->ne[3], ALIGNMENT);
}

// Multiplies rows row0 to row1 of one matrix at x with the ne11 rows of activations whose panels start at base.
template <typename B>
void multiply_chunk(const struct ggml_tensor * dst, const panel_shape & shape, bool plain, const uint8_t * x, int64_t row0, int64_t row1,
        uint8_t * base, uint8_t * slabs, float * out) {
    const int64_t k         = dst->src[0]->ne[0];
    const int64_t filled    = shape.k(k);
    const size_t  row_bytes = shape.row_bytes(k);
    const size_t  nb01      = dst->src[0]->nb[1];
    const int64_t ne11      = dst->src[1]->ne[1];
    const size_t  nb1       = dst->nb[1]/sizeof(float);

    if (plain) {
        for (int64_t i = 0; i < ne11; ++i) {
            const panel y = panel_at(base + i*row_bytes, k, 1, shape);
            for (int64_t row = row0; row < row1; ++row) {
                multiply_plain((const B *) (x + row*nb01), y, k, out + i*nb1 + row);
            }
        }
        return;
    }
#ifdef MBQ_SIMD_ROWS
    if (ne11 == 1) {
        const panel y = panel_at(base, k, 1, shape);
        int64_t row = row0;
        for (; row + LINES <= row1; row += LINES) {
            multiply_lines<B, LINES>(x + row*nb01, nb01, y, k, out + row);
        }
        for (; row < row1; ++row) {
            multiply_lines<B, 1>(x + row*nb01, nb01, y, k, out + row);
        }
        return;
    }
    for (int64_t row = row0; row < row1; row += ROWS) {
        int32_t offset[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            offset[r] = (int32_t) (std::min<int64_t>(r, row1 - row - 1)*nb01);
        }
        unpack_slab<B>(x + row*nb01, offset, k, filled, slabs + (row - row0)/ROWS*slab_bytes(filled));
    }
    for (int64_t i = 0; i < ne11; i += shape.cols) {
        const int   n = (int) std::min<int64_t>(shape.cols, ne11 - i);
        const panel y = panel_at(base + i*row_bytes, k, (int) shape.rows(n), shape);
#ifdef ROW_SCALE_AMX
        if (shape.step == TILES.step) {
            const row_scale_amx::tiles configured;
            for (int64_t row = row0; row < row1; row += 2*ROWS) {
                const uint8_t * w = slabs + (row - row0)/ROWS*slab_bytes(filled);
                multiply_tiles<is_wide<B>>(n, w, y, filled, out + i*nb1 + row, nb1, (int) std::min<int64_t>(2*ROWS, row1 - row));
            }
            continue;
        }
#endif
        for (int64_t row = row0; row < row1; row += ROWS) {
            const uint8_t * w = slabs + (row - row0)/ROWS*slab_bytes(filled);
            multiply_any<is_wide<B>>(n, w, y, k, out + i*nb1 + row, nb1, (int) std::min<int64_t>(ROWS, row1 - row));
        }
    }
#else
    GGML_UNUSED(slabs);
    GGML_UNUSED(filled);
#endif
}

template <typename B>
void mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(nb00 == sizeof(B) && nb10 == sizeof(float) && nb0 == sizeof(float));
    GGML_ASSERT(dst->src[2] == nullptr || (dst->src[2]->type == GGML_TYPE_F32 && dst->src[2]->ne[1] == ne11));

#ifdef MBQ_SIMD_ROWS
    const bool plain = params->use_ref || nb01 > INT32_MAX/ROWS; // offsets of rows are 32 bits
#else
    const bool plain = true;
#endif
    const panel_shape shape = shape_for(dst, plain);
    const int64_t k         = ne00;
    const size_t  slab      = slab_bytes(shape.k(k));
    const size_t  matrix    = shape.rows(ne11)*shape.row_bytes(k); // bytes of the panels of one matrix of activations

    uint8_t * panels = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, ALIGNMENT);
    uint8_t * slabs  = panels + panels_bytes(src1, shape);
    int64_t n_slabs  = chunk_slabs(ne01, shape.k(k), params->nth);
    if (!plain) {
        // with fewer threads than planned for, a thread's share may exceed the work memory
        const size_t left = params->wsize - ALIGNMENT - panels_bytes(src1, shape);
        n_slabs = std::min<int64_t>(n_slabs, left/(params->nth*slab));
        slabs  += params->ith*n_slabs*slab;
    }

    for (int64_t i = params->ith; i < ne11*ne12*ne13; i += params->nth) {
        const int64_t i13 = i/(ne12*ne11);
        const int64_t i12 = i/ne11 % ne12;
        const int64_t i11 = i % ne11;
        const int     col  = i11 % shape.cols;
        const int     cols = (int) std::min<int64_t>(shape.cols, shape.rows(ne11) - (i11 - col));
        const float * x = (const float *) ((const char *) src1->data + i13*nb13 + i12*nb12 + i11*nb11);
        const panel to  = panel_at(panels + (i13*ne12 + i12)*matrix + (i11 - col)*shape.row_bytes(k), k, cols, shape);
        quantize_row(x, k, ggml_row_scale_range(dst->src[2], i11), to, col);
    }

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth); // the first chunk of a thread is its index
    }
    ggml_barrier(params->threadpool);

    const int64_t per_matrix = (ne01 + n_slabs*ROWS - 1)/(n_slabs*ROWS);
    for (int64_t chunk = params->ith; chunk < per_matrix*ne12*ne13; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i13  = chunk/(per_matrix*ne12);
        const int64_t i12  = chunk/per_matrix % ne12;
        const int64_t row0 = chunk % per_matrix * n_slabs*ROWS;
        const int64_t row1 = std::min(row0 + n_slabs*ROWS, ne01);

        const uint8_t * x = (const uint8_t *) src0->data + i13/(ne13/ne03)*nb03 + i12/(ne12/ne02)*nb02;
        float * out = (float *) ((char *) dst->data + i13*nb3 + i12*nb2);
        multiply_chunk<B>(dst, shape, plain, x, row0, row1, panels + (i13*ne12 + i12)*matrix, slabs, out);
    }
}

} // namespace

size_t ggml_row_scale_work_size(int n_tasks, const struct ggml_tensor * dst) {
    if (!ggml_is_row_scale_mul_mat(dst)) {
        return 0;
    }
    const panel_shape shape = shape_for(dst, false);
    const int64_t     k     = shape.k(dst->src[0]->ne[0]);
    return ALIGNMENT + panels_bytes(dst->src[1], shape) + n_tasks*chunk_slabs(dst->src[0]->ne[1], k, n_tasks)*slab_bytes(k);
}

bool ggml_compute_forward_mul_mat_row_scale(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (!ggml_is_row_scale_mul_mat(dst)) {
        return false;
    }
    if (dst->src[0]->type == GGML_TYPE_Q4_0) {
        mul_mat<block_q4_0>(params, dst);
    } else {
        mul_mat<block_q8_0>(params, dst);
    }
    return true;
}
