// Matrix products of MBQ weights with float activations: mbq-gemv.h for one row of them, mbq-gemm.h for several
//
// Activations are quantised to Q8_1 as in the plain path (same codes, same scales), in panels of up to mbq_simd::cols rows. A slab of
// mbq_simd::rows rows of weights is unpacked once, transposed so that each lane is a row of weights, and then multiplied with every panel. A
// result does not depend on the number of rows of activations (mbq-panel.h). It differs from the plain path only in the order of additions.

#include "mbq.h"
#include "mbq-simd.h"
#include "row-scale.h"

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef MBQ_SIMD_ROWS

#include "mbq-gemm.h"
#include "mbq-gemv.h"

namespace {

constexpr size_t  SLABS_BYTES = 512*1024; // unpacked weights per thread: fits its L2 cache
constexpr int64_t SLABS_MAX   = 8;
#ifdef MBQ_GEMV
constexpr int64_t MIN_COLUMNS = 1;
#else
constexpr int64_t MIN_COLUMNS = 2; // unpacking weights does not pay off for one row of activations; vec_dot adds in the same order
#endif

// weights per grid; 0 for other types
int64_t group_of(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_MBQ3:     return mbq_group<block_mbq3>;
        case GGML_TYPE_MBQ3_64:  return mbq_group<block_mbq3_64>;
        case GGML_TYPE_MBQ3S:    return mbq_group<block_mbq3s>;
        case GGML_TYPE_MBQ3S_64: return mbq_group<block_mbq3s_64>;
        default:                 return 0;
    }
}

bool supported(const struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    return group_of(src0->type) != 0 &&
        src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && src1->ne[1] >= MIN_COLUMNS &&
        src0->nb[0] == ggml_type_size(src0->type) && src0->nb[1]*ROWS < INT32_MAX;
}

// slabs of one chunk of work
int64_t chunk_slabs(const struct ggml_tensor * src0, int nth) {
    const int64_t slabs = (src0->ne[1] + ROWS - 1)/ROWS;
    const int64_t fit   = SLABS_BYTES/slab_bytes(src0->ne[0], group_of(src0->type));
    return std::max<int64_t>(1, std::min({ fit, SLABS_MAX, slabs/(4*nth) }));
}

size_t panels_bytes(const struct ggml_tensor * src0, const struct ggml_tensor * src1) {
    return GGML_PAD(panel_row_bytes(src0->ne[0], group_of(src0->type))*ggml_nrows(src1), ALIGNMENT);
}

// The offsets of ROWS rows, of which `left` exist; the last one is repeated.
void row_offsets(int32_t offset[ROWS], int64_t left, size_t nb01) {
    for (int r = 0; r < ROWS; ++r) {
        offset[r] = (int32_t) (std::min<int64_t>(r, left - 1)*nb01);
    }
}

template <typename B>
void mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    constexpr int group = mbq_group<B>;

    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    GGML_TENSOR_BINARY_OP_LOCALS

    const int64_t k = ne00;
    const size_t  row_bytes = panel_row_bytes(k, group);

    uint8_t * panels = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, ALIGNMENT);
    // with fewer threads than planned for, a thread's share may exceed the work memory
    const size_t  left    = params->wsize - ALIGNMENT - panels_bytes(src0, src1);
    const int64_t n_slabs = std::min<int64_t>(chunk_slabs(src0, params->nth), left/(params->nth*slab_bytes(k, group)));
    uint8_t * slabs = panels + panels_bytes(src0, src1) + params->ith*n_slabs*slab_bytes(k, group);

    // quantise the activations: a panel of cols rows starts at the place of its first row
    const int64_t blocks = k/QK8_1;
    const int64_t parts  = (blocks + CHUNK - 1)/CHUNK;
    for (int64_t part = params->ith; part < parts*ne11*ne12*ne13; part += params->nth) {
        const int64_t i   = part/parts;
        const int64_t i13 = i/(ne12*ne11);
        const int64_t i12 = i/ne11 % ne12;
        const int64_t i11 = i % ne11;
        const int     col = i11 % COLS;
        const float * x = (const float *) ((const char *) src1->data + i13*nb13 + i12*nb12 + i11*nb11);
        const int64_t first = part % parts * CHUNK;
        quantize_to_panel<group>(x, k, first, std::min<int64_t>(CHUNK, blocks - first),
            panels + (i - col)*row_bytes, col, (int) std::min<int64_t>(COLS, ne11 - (i11 - col)));
    }

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth); // the first chunk of a thread is its index
    }
    ggml_barrier(params->threadpool);

    // One row of activations needs no slabs, and prefetches rows; at the end of a chunk those belong to another thread, so use fewer chunks.
    const int64_t chunk_rows = ne11 == 1 ? GGML_PAD((ne01 + 4*params->nth - 1)/(4*params->nth), ROWS) : n_slabs*ROWS;
    const int64_t per_matrix = (ne01 + chunk_rows - 1)/chunk_rows;
    for (int64_t chunk = params->ith; chunk < per_matrix*ne12*ne13; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i13  = chunk/(per_matrix*ne12);
        const int64_t i12  = chunk/per_matrix % ne12;
        const int64_t row0 = chunk % per_matrix * chunk_rows;
        const int64_t row1 = std::min(row0 + chunk_rows, ne01);

        const uint8_t * x = (const uint8_t *) src0->data + i13/(ne13/ne03)*nb03 + i12/(ne12/ne02)*nb02;
#ifdef MBQ_GEMV
        if (ne11 == 1) {
            const panel y = panel_at(panels + (i13*ne12 + i12)*row_bytes, k, 1);
            float * out = (float *) ((char *) dst->data + i13*nb3 + i12*nb2);
            for (int64_t row = row0; row < row1; row += ROWS) {
                int32_t offset[ROWS];
                row_offsets(offset, row1 - row, nb01);
                mbq_gemv<B>(x + row*nb01, offset, ROWS*nb01, k, y, out + row, (int) std::min<int64_t>(ROWS, row1 - row));
            }
            continue;
        }
#endif
        for (int64_t row = row0; row < row1; row += ROWS) {
            int32_t offset[ROWS];
            row_offsets(offset, row1 - row, nb01);
            unpack_slab<B>(x + row*nb01, offset, k, slab_at(slabs + (row - row0)/ROWS*slab_bytes(k, group), k, group));
        }

        for (int64_t i11 = 0; i11 < ne11; i11 += COLS) {
            const int   cols = (int) std::min<int64_t>(COLS, ne11 - i11);
            const panel y = panel_at(panels + ((i13*ne12 + i12)*ne11 + i11)*row_bytes, k, cols);
            float * out = (float *) ((char *) dst->data + i13*nb3 + i12*nb2 + i11*nb1);
            for (int64_t row = row0; row < row1; row += ROWS) {
                const slab w = slab_at(slabs + (row - row0)/ROWS*slab_bytes(k, group), k, group);
                multiply_any<group>(cols, w, y, k, out + row, nb1/sizeof(float), (int) std::min<int64_t>(ROWS, row1 - row));
            }
        }
    }
}

} // namespace

size_t ggml_mbq_work_size(int n_tasks, const struct ggml_tensor * dst) {
    if (!supported(dst)) {
        return ggml_row_scale_work_size(n_tasks, dst);
    }
    const struct ggml_tensor * src0 = dst->src[0];
    return ALIGNMENT + panels_bytes(src0, dst->src[1]) + n_tasks*chunk_slabs(src0, n_tasks)*slab_bytes(src0->ne[0], group_of(src0->type));
}

bool ggml_compute_forward_mul_mat_mbq(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (ggml_compute_forward_mul_mat_row_scale(params, dst)) {
        return true;
    }
    if (params->use_ref || !supported(dst)) {
        return false;
    }
    switch (dst->src[0]->type) {
        case GGML_TYPE_MBQ3:    mul_mat<block_mbq3>    (params, dst); return true;
        case GGML_TYPE_MBQ3_64: mul_mat<block_mbq3_64> (params, dst); return true;
        case GGML_TYPE_MBQ3S:   mul_mat<block_mbq3s>   (params, dst); return true;
        default:                mul_mat<block_mbq3s_64>(params, dst); return true;
    }
}

#else

size_t ggml_mbq_work_size(int n_tasks, const struct ggml_tensor * dst) {
    return ggml_row_scale_work_size(n_tasks, dst);
}

bool ggml_compute_forward_mul_mat_mbq(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    return ggml_compute_forward_mul_mat_row_scale(params, dst);
}

#endif
