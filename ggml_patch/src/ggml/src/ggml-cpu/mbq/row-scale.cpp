// Products of weights that have one scale a row: int32 over all of K, one epilogue (the contract: ggml-row-scale.h)
//
// As in mbq.cpp, activations are quantised once a product into panels of up to COLS rows, and slabs of ROWS rows of weights are unpacked
// once and multiplied with every panel. A single row of activations is multiplied along the rows of weights as they lie. Integer sums do
// not depend on their order, so all ways give the same bits.

#include "row-scale.h"
#include "row-scale-simd.h"

#include "ggml-cpu-impl.h"
#include "ggml-quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int    QK        = 32; // weights of a block of either type
constexpr size_t ALIGNMENT = 64;

template <typename B> constexpr bool is_wide = std::is_same_v<B, block_q8_0>;

template <typename B> float scale_of(const B * row) { return GGML_CPU_FP16_TO_FP32(row->d); }

// ---- panels of activations: blocks of QK, in a block row by row, so that the kernel reads one stream; then of each row its scale, and
// the sum of its quantised activations

struct panel {
    int8_t  * q;   // [k/QK][cols][QK]
    float   * s;   // [cols]
    int32_t * sum; // [cols]
};

size_t panel_row_bytes(int64_t k) { return k + sizeof(float) + sizeof(int32_t); }

panel panel_at(uint8_t * base, int64_t k, int cols) {
    float * s = (float *) (base + k*cols);
    return { (int8_t *) base, s, (int32_t *) (s + cols) };
}

float largest(const float * x, int64_t k) {
    uint32_t most = 0; // floats without their sign order as integers do
    for (int64_t i = 0; i < k; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        most = std::max(most, bits & 0x7FFFFFFF);
    }
    float amax;
    memcpy(&amax, &most, sizeof(amax));
    return amax;
}

// QK activations times inverse, rounded half to even; no addition follows a product, or compilers would fuse them
void quantize_block(const float * x, float inverse, int8_t * q) {
#if defined(__AVX2__)
    __m256i v[4];
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8*i), _mm256_set1_ps(inverse)));
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256((__m256i *) q, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    for (int i = 0; i < QK; i += 8) {
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i),     inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
        vst1_s8(q + i, vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
    }
#else
    for (int i = 0; i < QK; ++i) {
        q[i] = (int8_t) (int) fmaxf(-127.0f, fminf(127.0f, rintf(x[i]*inverse))); // in bounds even if x is not finite
    }
#endif
}

void quantize_row(const float * x, int64_t k, const panel & to, int col, int cols) {
    const float amax    = largest(x, k);
    const float inverse = amax < GGML_ROW_SCALE_AMAX_MIN ? 0.0f : 127.0f/amax;

    int32_t sum = 0;
    for (int64_t b = 0; b < k/QK; ++b) {
        int8_t * q = to.q + (b*cols + col)*QK;
        quantize_block(x + b*QK, inverse, q);
        for (int i = 0; i < QK; ++i) {
            sum += q[i];
        }
    }
    to.s[col]   = amax < GGML_ROW_SCALE_AMAX_MIN ? 0.0f : amax/127.0f;
    to.sum[col] = sum;
}

// ---- plain: no vectors, or a reference run

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

#ifdef MBQ_SIMD_ROWS

using simd = row_scale_simd;

constexpr int ROWS = simd::rows;
#if MBQ_SIMD_ROWS == 8 && defined(__AVX2__)
constexpr int COLS = 6; // sums of 16 and of 32 bits in 12 of 16 registers
#else
constexpr int COLS = simd::cols;
#endif

constexpr size_t  SLABS_BYTES = 512*1024; // unpacked weights that a thread keeps: within its L2 cache
constexpr int64_t SLABS_MAX   = 8;
constexpr int     LINES       = 4; // rows of weights that one row of activations meets at once

// ---- slabs of weights: codes [k/4][ROWS][4], then a scale a row

size_t slab_bytes(int64_t k) { return GGML_PAD(ROWS*(k + sizeof(float)), ALIGNMENT); }

template <typename B>
void unpack_slab(const uint8_t * x, const int32_t * offset, int64_t k, uint8_t * out) {
    for (int r = 0; r < ROWS; ++r) {
        ((float *) (out + ROWS*k))[r] = scale_of((const B *) (x + offset[r]));
    }
    for (int64_t b = 0; b < k/QK; ++b, x += sizeof(B), out += QK*ROWS) {
        for (int i = 0; i < (int) sizeof(B::qs)/4; ++i) {
            const simd::ivec v = simd::gather(x + offsetof(B, qs) + 4*i, offset);
            if constexpr (is_wide<B>) {
                simd::store(out + i*ROWS*4, simd::stored(v));
            } else {
                simd::store(out + i*ROWS*4, simd::masked(v, 0x0F0F0F0F));
                simd::store(out + (i + 4)*ROWS*4, simd::masked(simd::template srl<4>(v), 0x0F0F0F0F));
            }
        }
    }
}

// One slab times one panel of cols rows; nrows of the slab's rows are stored, column c of the result at dst + c*stride.
template <bool wide, int cols>
void multiply(const uint8_t * w, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    simd::acc sum[cols];
    for (int c = 0; c < cols; ++c) {
        sum[c] = simd::zero();
    }
    const int8_t * q = y.q;
    for (int64_t b = 0; b < k/QK; ++b, q += cols*QK) {
        simd::acc part[cols];
        for (int c = 0; c < cols; ++c) {
            part[c] = simd::zero();
        }
        for (int i = 0; i < QK/4; ++i, w += 4*ROWS) {
            const simd::ivec codes = simd::load(w);
            for (int c = 0; c < cols; ++c) {
                part[c] = simd::template dot<wide>(part[c], codes, q + c*QK + 4*i);
            }
        }
        for (int c = 0; c < cols; ++c) {
            sum[c] = simd::template fold<wide>(sum[c], part[c]);
        }
    }
    for (int c = 0; c < cols; ++c) {
        float tmp[ROWS];
        simd::epilogue(nrows == ROWS ? dst + c*stride : tmp, sum[c], simd::zero_point(wide)*y.sum[c], (const float *) w, y.s[c]);
        if (nrows != ROWS) {
            memcpy(dst + c*stride, tmp, nrows*sizeof(float));
        }
    }
}

// multiply() for a number of columns known at run time
template <bool wide, int cols = COLS>
void multiply_any(int n, const uint8_t * w, const panel & y, int64_t k, float * dst, size_t stride, int nrows) {
    if constexpr (cols > 0) {
        if (n == cols) {
            multiply<wide, cols>(w, y, k, dst, stride, nrows);
        } else {
            multiply_any<wide, cols - 1>(n, w, y, k, dst, stride, nrows);
        }
    }
}

// ---- one row of activations: n rows of weights as they lie. The next ones are fetched ahead: short rows end before the hardware has
// learnt where they go.

template <typename B, int n>
void multiply_lines(const uint8_t * w, size_t stride, const panel & y, int64_t k, float * dst) {
    using line = row_scale_line;
    constexpr bool wide = is_wide<B>;

    line::acc sum[n];
    for (int r = 0; r < n; ++r) {
        sum[r] = line::zero();
    }
    for (int64_t first = 0; first < k/QK; first += 8) {
        line::acc part[n];
        for (int r = 0; r < n; ++r) {
            part[r] = line::zero();
            const char * ahead = (const char *) ((const B *) (w + (r + n)*stride) + first);
            for (size_t at = 0; at < 8*sizeof(B); at += 64) {
                __builtin_prefetch(ahead + at);
            }
        }
        for (int64_t b = first; b < std::min<int64_t>(first + 8, k/QK); ++b) {
            const auto q = line::activations(y.q + b*QK);
            for (int r = 0; r < n; ++r) {
                part[r] = line::template add<wide>(part[r], (const uint8_t *) ((const B *) (w + r*stride))[b].qs, q);
            }
        }
        for (int r = 0; r < n; ++r) {
            sum[r] = line::template fold<wide>(sum[r], part[r]);
        }
    }
    for (int r = 0; r < n; ++r) {
        const int32_t acc = line::total(sum[r]) - line::zero_point(wide)*y.sum[0];
        dst[r] = (float) acc*scale_of((const B *) (w + r*stride))*y.s[0];
    }
}

// slabs of one chunk of work
int64_t chunk_slabs(const struct ggml_tensor * src0, int nth) {
    const int64_t slabs = (src0->ne[1] + ROWS - 1)/ROWS;
    const int64_t fit   = SLABS_BYTES/slab_bytes(src0->ne[0]);
    return std::max<int64_t>(1, std::min({ fit, SLABS_MAX, slabs/(4*nth) }));
}

#else

constexpr int ROWS = 8;
constexpr int COLS = 1;

size_t slab_bytes(int64_t) { return 0; }

int64_t chunk_slabs(const struct ggml_tensor *, int) { return 1; }

#endif

size_t panels_bytes(const struct ggml_tensor * src1) {
    return GGML_PAD(panel_row_bytes(src1->ne[0])*ggml_nrows(src1), ALIGNMENT);
}

// Rows row0 to row1 of one matrix at x, times the ne11 rows of activations whose panels begin at base.
template <typename B>
void multiply_chunk(const struct ggml_tensor * dst, bool plain, const uint8_t * x, int64_t row0, int64_t row1, uint8_t * base, uint8_t * slabs, float * out) {
    const int64_t k    = dst->src[0]->ne[0];
    const size_t  nb01 = dst->src[0]->nb[1];
    const int64_t ne11 = dst->src[1]->ne[1];
    const size_t  nb1  = dst->nb[1]/sizeof(float);

    if (plain) {
        for (int64_t i = 0; i < ne11; ++i) {
            const panel y = panel_at(base + i*panel_row_bytes(k), k, 1);
            for (int64_t row = row0; row < row1; ++row) {
                multiply_plain((const B *) (x + row*nb01), y, k, out + i*nb1 + row);
            }
        }
        return;
    }
#ifdef MBQ_SIMD_ROWS
    if (ne11 == 1) {
        const panel y = panel_at(base, k, 1);
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
        unpack_slab<B>(x + row*nb01, offset, k, slabs + (row - row0)/ROWS*slab_bytes(k));
    }
    for (int64_t i = 0; i < ne11; i += COLS) {
        const int   cols = (int) std::min<int64_t>(COLS, ne11 - i);
        const panel y    = panel_at(base + i*panel_row_bytes(k), k, cols);
        for (int64_t row = row0; row < row1; row += ROWS) {
            const uint8_t * w = slabs + (row - row0)/ROWS*slab_bytes(k);
            multiply_any<is_wide<B>>(cols, w, y, k, out + i*nb1 + row, nb1, (int) std::min<int64_t>(ROWS, row1 - row));
        }
    }
#else
    GGML_UNUSED(slabs);
#endif
}

template <typename B>
void mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(nb00 == sizeof(B) && nb10 == sizeof(float) && nb0 == sizeof(float));

#ifdef MBQ_SIMD_ROWS
    const bool plain = params->use_ref || nb01 > INT32_MAX/ROWS; // offsets of gather() are 32 bits
#else
    const bool plain = true;
#endif
    const int64_t k         = ne00;
    const size_t  row_bytes = panel_row_bytes(k);

    uint8_t * panels = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, ALIGNMENT);
    uint8_t * slabs  = panels + panels_bytes(src1);
    int64_t n_slabs  = chunk_slabs(src0, params->nth);
    if (!plain) {
        // with fewer threads than planned for, a thread's share may come out larger than the work memory allows
        const size_t left = params->wsize - ALIGNMENT - panels_bytes(src1);
        n_slabs = std::min<int64_t>(n_slabs, left/(params->nth*slab_bytes(k)));
        slabs  += params->ith*n_slabs*slab_bytes(k);
    }

    // rows of activations: a panel of cols rows starts at its first row's place
    for (int64_t i = params->ith; i < ne11*ne12*ne13; i += params->nth) {
        const int64_t i13 = i/(ne12*ne11);
        const int64_t i12 = i/ne11 % ne12;
        const int64_t i11 = i % ne11;
        const int     col  = plain ? 0 : i11 % COLS;
        const int     cols = plain ? 1 : (int) std::min<int64_t>(COLS, ne11 - (i11 - col));
        const float * x = (const float *) ((const char *) src1->data + i13*nb13 + i12*nb12 + i11*nb11);
        quantize_row(x, k, panel_at(panels + (i - col)*row_bytes, k, cols), col, cols);
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
        float * out = (float *) ((char *) dst->data + i13*nb3 + i12*nb2);
        multiply_chunk<B>(dst, plain, x, row0, row1, panels + (i13*ne12 + i12)*ne11*row_bytes, slabs, out);
    }
}

} // namespace

size_t ggml_row_scale_work_size(int n_tasks, const struct ggml_tensor * dst) {
    if (!ggml_is_row_scale_mul_mat(dst)) {
        return 0;
    }
    return ALIGNMENT + panels_bytes(dst->src[1]) + n_tasks*chunk_slabs(dst->src[0], n_tasks)*slab_bytes(dst->src[0]->ne[0]);
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
