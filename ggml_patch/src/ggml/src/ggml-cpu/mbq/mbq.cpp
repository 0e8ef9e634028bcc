// Matrix products of MBQ weights with several rows of activations
//
// The activations become Q8_1 as in the plain path (same codes, same scales), laid out in panels of up to mbq_simd::cols rows. A slab of
// mbq_simd::rows rows of weights is unpacked once, transposed so that each lane is a row of weights, and then multiplied with every
// panel. A result differs from the plain path's only in the order in which its terms are added.

#include "mbq.h"
#include "mbq-gemv.h"
#include "mbq-simd.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-quants.h"
#include "quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef MBQ_SIMD_ROWS

namespace {

constexpr int ROWS = mbq_simd::rows;
constexpr int COLS = mbq_simd::cols;

constexpr size_t  ALIGNMENT    = 64;
constexpr size_t  SLABS_BYTES  = 512*1024; // unpacked weights that a thread keeps: within its L2 cache
constexpr int64_t SLABS_MAX    = 8;
#ifdef MBQ_GEMV_ROWS
constexpr int64_t MIN_COLUMNS  = 1;
#else
constexpr int64_t MIN_COLUMNS  = 2; // one row of activations does not pay for unpacking the weights
#endif

// ---- panels of activations: the codes block by block and in a block row by row, so that the kernel reads one stream; then scales and sums

struct panel {
    const int8_t * q; // [k/QK8_1][cols][QK8_1]
    const float  * d; // [k/QK8_1][cols]
    const float  * s; // [k/group][cols], sum of d * q
};

size_t panel_row_bytes(int64_t k, int64_t group) {
    return k + sizeof(float)*(k/QK8_1 + k/group);
}

panel panel_at(const uint8_t * base, int64_t k, int cols) {
    const int8_t * q = (const int8_t *) base;
    const float  * d = (const float *) (q + k*cols);
    return { q, d, d + k/QK8_1*cols };
}

constexpr int CHUNK = 16; // blocks of activations that a thread quantises at a time

// Blocks first to first + n (at most CHUNK, first a multiple of it) of a row of activations to row col of a panel of cols.
template <int group>
void quantize_to_panel(const float * x, int64_t k, int64_t first, int64_t n, uint8_t * base, int col, int cols) {
    block_q8_1 tmp[CHUNK];
    quantize_row_q8_1(x + first*QK8_1, tmp, n*QK8_1);

    int8_t * q = (int8_t *) base;
    float  * d = (float *) (q + k*cols);
    float  * s = d + k/QK8_1*cols;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = (first + i)*cols + col;
        memcpy(q + at*QK8_1, tmp[i].qs, QK8_1);
        d[at] = GGML_CPU_FP16_TO_FP32(tmp[i].d);
        float & sum = s[(first + i)/(group/QK8_1)*cols + col];
        sum = i % (group/QK8_1) == 0 ? 0.0f : sum;
        sum += GGML_CPU_FP16_TO_FP32(tmp[i].s);
    }
}

// ---- slabs of weights

struct slab {
    uint8_t * codes; // [k/4][ROWS][4]
    float   * d;     // [k/group][ROWS]
    float   * m;     // [k/group][ROWS]
};

size_t slab_bytes(int64_t k, int64_t group) {
    return GGML_PAD(ROWS*(k + 2*sizeof(float)*(k/group)), ALIGNMENT);
}

slab slab_at(uint8_t * base, int64_t k, int64_t group) {
    float * d = (float *) (base + ROWS*k);
    return { base, d, d + ROWS*(k/group) };
}

// Codes of one plane of the 4*ROWS weights whose low bits are in low, high bits in high: half 1 takes the neighbouring bit.
template <int plane, int half>
mbq_simd::ivec codes_of(mbq_simd::ivec low, mbq_simd::ivec high) {
    constexpr int right = (2*plane + 2)%8 + half - 2; // the high bit goes to bit 2
    if constexpr (right >= 0) {
        high = mbq_simd::srl<right>(high);
    } else {
        high = mbq_simd::sll<-right>(high);
    }
    return mbq_simd::merge(mbq_simd::masked(mbq_simd::srl<2*plane>(low), 0x03030303), mbq_simd::masked(high, 0x04040404));
}

template <int half>
void unpack_word(mbq_simd::ivec low, mbq_simd::ivec high, uint8_t * out, size_t plane_stride) {
    mbq_simd::store(out + 0*plane_stride, codes_of<0, half>(low, high));
    mbq_simd::store(out + 1*plane_stride, codes_of<1, half>(low, high));
    mbq_simd::store(out + 2*plane_stride, codes_of<2, half>(low, high));
    mbq_simd::store(out + 3*plane_stride, codes_of<3, half>(low, high));
}

// ROWS rows of weights, row r at x + offset[r], to a slab.
template <typename B>
void unpack_slab(const uint8_t * x, const int32_t * offset, int64_t k, const slab & to) {
    constexpr int group = 4*sizeof(B::ql);
    constexpr int words = sizeof(B::ql)/4; // of a plane
    constexpr size_t plane_stride = words*ROWS*4;

    uint8_t * out = to.codes;
    for (int64_t ib = 0; ib < k/group; ++ib, x += sizeof(B), out += group*ROWS) {
        const mbq_simd::ivec dm = mbq_simd::gather(x, offset);
        mbq_simd::fstore(to.d + ib*ROWS, mbq_simd::half_low(dm));
        mbq_simd::fstore(to.m + ib*ROWS, mbq_simd::half_high(dm));
        for (int w = 0; w < words/2; ++w) {
            const mbq_simd::ivec high = mbq_simd::gather(x + offsetof(B, qh) + 4*w, offset);
            unpack_word<0>(mbq_simd::gather(x + offsetof(B, ql) + 4*w, offset), high, out + w*ROWS*4, plane_stride);
            unpack_word<1>(mbq_simd::gather(x + offsetof(B, ql) + 4*(w + words/2), offset), high, out + (w + words/2)*ROWS*4, plane_stride);
        }
    }
}

// ---- kernel

// One slab times one panel of cols rows; nrows of the slab's rows are stored, column c of the result at dst + c*stride.
template <int group, int cols>
void multiply(const slab & x, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    mbq_simd::fvec sum[cols];
    for (int c = 0; c < cols; ++c) {
        sum[c] = mbq_simd::fzero();
    }

    const uint8_t * w = x.codes;
    const int8_t  * q = y.q;
    const float   * d = y.d;
    const float   * s = y.s;
    for (int64_t g = 0; g < k/group; ++g) {
        const mbq_simd::fvec dw = mbq_simd::fload(x.d + g*ROWS);
        const mbq_simd::fvec mw = mbq_simd::fload(x.m + g*ROWS);
        for (int b = 0; b < group/QK8_1; ++b) {
            mbq_simd::acc acc[cols];
            for (int c = 0; c < cols; ++c) {
                acc[c] = mbq_simd::zero();
            }
            for (int i = 0; i < QK8_1/4; ++i, w += 4*ROWS) {
                const mbq_simd::ivec codes = mbq_simd::load(w);
                for (int c = 0; c < cols; ++c) {
                    acc[c] = mbq_simd::dot(acc[c], codes, q + c*QK8_1 + 4*i);
                }
            }
            for (int c = 0; c < cols; ++c) {
                sum[c] = mbq_simd::fma(mbq_simd::mul(mbq_simd::to_float(acc[c]), dw), d[c], sum[c]);
            }
            q += cols*QK8_1;
            d += cols;
        }
        for (int c = 0; c < cols; ++c) {
            sum[c] = mbq_simd::fma(mw, s[c], sum[c]);
        }
        s += cols;
    }

    for (int c = 0; c < cols; ++c) {
        if (nrows == ROWS) {
            mbq_simd::fstore(dst + c*stride, sum[c]);
        } else {
            float tmp[ROWS];
            mbq_simd::fstore(tmp, sum[c]);
            memcpy(dst + c*stride, tmp, nrows*sizeof(float));
        }
    }
}

// multiply() for a number of columns known at run time
template <int group, int cols = COLS>
void multiply_any(int n, const slab & x, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    if constexpr (cols > 0) {
        if (n == cols) {
            multiply<group, cols>(x, y, k, dst, stride, nrows);
        } else {
            multiply_any<group, cols - 1>(n, x, y, k, dst, stride, nrows);
        }
    }
}

// ---- driver

bool supported(const struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    return (src0->type == GGML_TYPE_MBQ3 || src0->type == GGML_TYPE_MBQ3_64) &&
        src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && src1->ne[1] >= MIN_COLUMNS &&
        src0->nb[0] == ggml_type_size(src0->type) && src0->nb[1]*ROWS < INT32_MAX;
}

// slabs of one chunk of work
int64_t chunk_slabs(const struct ggml_tensor * src0, int nth) {
    const int64_t slabs = (src0->ne[1] + ROWS - 1)/ROWS;
    const int64_t fit   = SLABS_BYTES/slab_bytes(src0->ne[0], ggml_blck_size(src0->type));
    return std::max<int64_t>(1, std::min({ fit, SLABS_MAX, slabs/(4*nth) }));
}

size_t panels_bytes(const struct ggml_tensor * src0, const struct ggml_tensor * src1) {
    return GGML_PAD(panel_row_bytes(src0->ne[0], ggml_blck_size(src0->type))*ggml_nrows(src1), ALIGNMENT);
}

template <typename B>
void mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    constexpr int group = 4*sizeof(B::ql);

    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    GGML_TENSOR_BINARY_OP_LOCALS

    const int64_t k = ne00;
    const size_t  row_bytes = panel_row_bytes(k, group);

    uint8_t * panels = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, ALIGNMENT);
    const int64_t n_slabs = chunk_slabs(src0, params->nth);
    uint8_t * slabs = panels + panels_bytes(src0, src1) + params->ith*n_slabs*slab_bytes(k, group);

    // rows of activations: a panel of cols rows starts at its first row's place
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
        ggml_threadpool_chunk_set(params->threadpool, params->nth); // the first chunk of a thread is its own number
    }
    ggml_barrier(params->threadpool);

    const int64_t per_matrix = (ne01 + n_slabs*ROWS - 1)/(n_slabs*ROWS);
    for (int64_t chunk = params->ith; chunk < per_matrix*ne12*ne13; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i13  = chunk/(per_matrix*ne12);
        const int64_t i12  = chunk/per_matrix % ne12;
        const int64_t row0 = chunk % per_matrix * n_slabs*ROWS;
        const int64_t row1 = std::min(row0 + n_slabs*ROWS, ne01);

        const uint8_t * x = (const uint8_t *) src0->data + i13/(ne13/ne03)*nb03 + i12/(ne12/ne02)*nb02;
#ifdef MBQ_GEMV_ROWS
        if (ne11 == 1) {
            const panel y = panel_at(panels + (i13*ne12 + i12)*row_bytes, k, 1);
            float * out = (float *) ((char *) dst->data + i13*nb3 + i12*nb2);
            int64_t row = row0;
            for (; row + MBQ_GEMV_ROWS <= row1; row += MBQ_GEMV_ROWS) {
                mbq_gemv_rows<MBQ_GEMV_ROWS>((const B *) (x + row*nb01), nb01, k, y.q, y.d, y.s, out + row);
            }
            for (; row < row1; ++row) {
                mbq_gemv_rows<1>((const B *) (x + row*nb01), nb01, k, y.q, y.d, y.s, out + row);
            }
            continue;
        }
#endif
        for (int64_t row = row0; row < row1; row += ROWS) {
            int32_t offset[ROWS];
            for (int r = 0; r < ROWS; ++r) {
                offset[r] = (int32_t) (std::min<int64_t>(r, row1 - row - 1)*nb01);
            }
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
        return 0;
    }
    const struct ggml_tensor * src0 = dst->src[0];
    return ALIGNMENT + panels_bytes(src0, dst->src[1]) + n_tasks*chunk_slabs(src0, n_tasks)*slab_bytes(src0->ne[0], ggml_blck_size(src0->type));
}

bool ggml_compute_forward_mul_mat_mbq(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref || !supported(dst)) {
        return false;
    }
    if (dst->src[0]->type == GGML_TYPE_MBQ3) {
        mul_mat<block_mbq3>(params, dst);
    } else {
        mul_mat<block_mbq3_64>(params, dst);
    }
    return true;
}

#else

size_t ggml_mbq_work_size(int n_tasks, const struct ggml_tensor * dst) {
    GGML_UNUSED(n_tasks);
    GGML_UNUSED(dst);
    return 0;
}

bool ggml_compute_forward_mul_mat_mbq(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
}

#endif
