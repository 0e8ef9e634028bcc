// Flash attention for few rows of queries: generation, and the ends of prompts
//
// ops.cpp computes many rows per sequence in tiles in fp32, few rows one by one in fp16, and a single row with the cache split among threads,
// so that a row's bits depend on how a batch is split and on its other rows. Here few rows are summed in the same order as tiles: tiles of KV
// cells from the start of the cache, a score as the sum over the head's dimensions in ascending order, one new maximum and sum per tile, and
// values added in the order of cells. All query heads that share a head of the cache share its tiles.

#include "mbq.h"

#include "common.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "simd-gemm.h"
#include "vec.h"

#if defined(__AVX2__) && defined(__F16C__)
#include "flash-attn-x86.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t ROWS = ggml_fa_tile_config::Q;  // maximum rows of queries per tile; upstream uses tiles from this many rows on
constexpr int64_t KV   = ggml_fa_tile_config::KV; // cells of the cache per tile

// whether upstream would use tiles if there were more rows
bool supported(const ggml_compute_params * params, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
#if defined(GGML_SIMD) && !defined(__x86_64__) && !defined(_M_X64)
#if defined(__ARM_FEATURE_SVE)
    const int64_t lanes = svcntw();
#else
    const int64_t lanes = GGML_F32_EPR;
#endif
    if (v->ne[0] % lanes != 0) {
        return false;
    }
#endif
    return !params->use_ref && q->ne[1] < ROWS && q->type == GGML_TYPE_F32 && k->type == v->type &&
        (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_F32) && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3];
}

// a thread's work memory, no more than ggml_graph_plan() reserves for a tile
struct scratch {
    float * q;    // [ROWS][DK]
    float * kq;   // [ROWS][KV]
    float * mask; // [ROWS][KV]
    float * out;  // [ROWS][DV]
    float * k;    // [DK][KV]
    float * v;    // [KV][DV]

    scratch(const ggml_compute_params * params, int64_t DK, int64_t DV) {
        q    = (float *) params->wdata + params->ith*(ROWS*(DK + 2*KV + DV) + KV*(DK + DV));
        kq   = q    + ROWS*DK;
        mask = kq   + ROWS*KV;
        out  = mask + ROWS*KV;
        k    = out  + ROWS*DV;
        v    = k    + KV*DK;
    }
};

// transposes cells of the cache, so that each score is a lane: y[d][i] = x[i][d]
void transpose_f16(const char * x, size_t stride, int64_t n, int64_t width, float * y) {
    int64_t d = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; d + 8 <= width; d += 8) {
        for (int64_t i = 0; i < n; i += 8) {
            __m256 t[8];
            load_transposed(x + i*stride + d*sizeof(ggml_fp16_t), stride, std::min<int64_t>(8, n - i), t);
            for (int j = 0; j < 8; ++j) {
                _mm256_storeu_ps(y + (d + j)*KV + i, t[j]);
            }
        }
    }
#endif
    for (int64_t i = 0; i < n; ++i) {
        const ggml_fp16_t * cell = (const ggml_fp16_t *) (x + i*stride);
        for (int64_t j = d; j < width; ++j) {
            y[j*KV + i] = GGML_CPU_FP16_TO_FP32(cell[j]);
        }
    }
}

// the products of a few rows with a stored tile of the cache, for each number of rows; null if there are none
struct few_rows {
    void (*scores)(const float * q, int64_t width, const char * k, size_t stride, const char * v, size_t v_stride, int64_t v_width,
                   int64_t n, float * kq);
    void (*values)(const float * kq, const char * v, size_t stride, int64_t n, int64_t width, float * out);
};

const few_rows * few_rows_for(int64_t n, const ggml_tensor * k, const ggml_tensor * v) {
#ifdef FLASH_ATTN_FEW
    static const few_rows BY_ROWS[FLASH_ATTN_FEW] = {
        { few_scores<1, KV>, few_values<1, KV> }, { few_scores<2, KV>, few_values<2, KV> },
        { few_scores<3, KV>, few_values<3, KV> }, { few_scores<4, KV>, few_values<4, KV> },
    };
    if (n <= FLASH_ATTN_FEW && k->type == GGML_TYPE_F16 && k->ne[0] % 8 == 0 && v->ne[0] % 8 == 0) {
        return &BY_ROWS[n - 1];
    }
#endif
    GGML_UNUSED(n);
    GGML_UNUSED(k);
    GGML_UNUSED(v);
    return nullptr;
}

// rows [row_0, row_1) of a head of the cache; row r is query r % n_q of the head's query head r / n_q
void attend(const ggml_compute_params * params, ggml_tensor * dst, int64_t head, int64_t i3, int64_t row_0, int64_t row_1) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const int64_t DK = k->ne[0];
    const int64_t DV = v->ne[0];
    const int64_t n_q     = q->ne[1];
    const int64_t n_heads = q->ne[2];
    const int64_t shared  = n_heads/k->ne[2]; // query heads per head of the cache
    const int64_t k3      = i3/(q->ne[3]/k->ne[3]);
    const int64_t n       = row_1 - row_0;
    const bool    is_f16  = k->type == GGML_TYPE_F16;
    const auto *  few     = few_rows_for(n, k, v);

    float scale         = ggml_get_op_params_f32(dst, 0);
    const float bias    = ggml_get_op_params_f32(dst, 1);
    const float softcap = ggml_get_op_params_f32(dst, 2);
    if (softcap != 0.0f) {
        scale /= softcap;
    }
    const uint32_t n_log2 = 1u << (uint32_t) floor(log2(n_heads));
    const float m0 = powf(2.0f, -bias/n_log2);
    const float m1 = powf(2.0f, -(bias/2.0f)/n_log2);

    const scratch buf(params, DK, DV);
    float S[ROWS], M[ROWS], slope[ROWS];
    const char * mask_row[ROWS];
    for (int64_t r = 0; r < n; ++r) {
        const int64_t h  = head*shared + (row_0 + r)/n_q;
        const int64_t i1 = (row_0 + r) % n_q;
        S[r] = 0.0f;
        M[r] = -INFINITY;
        slope[r] = bias <= 0.0f ? 1.0f : h < n_log2 ? powf(m0, h + 1) : powf(m1, 2*(h - n_log2) + 1);
        mask_row[r] = mask ? (const char *) mask->data + i1*mask->nb[1] + (h % mask->ne[2])*mask->nb[2] + (i3 % mask->ne[3])*mask->nb[3] : nullptr;
        memcpy(buf.q + r*DK, (const char *) q->data + i1*q->nb[1] + h*q->nb[2] + i3*q->nb[3], DK*sizeof(float));
    }
    memset(buf.out, 0, n*DV*sizeof(float));

    for (int64_t i = 0; i < k->ne[1]; i += KV) {
        const int64_t cells = std::min(KV, k->ne[1] - i);

        bool seen = mask == nullptr;
        for (int64_t r = 0; r < n && mask; ++r) {
            const ggml_fp16_t * m = (const ggml_fp16_t *) mask_row[r] + i;
            for (int64_t j = 0; j < cells; ++j) {
                buf.mask[r*KV + j] = slope[r]*GGML_CPU_FP16_TO_FP32(m[j]);
                seen |= buf.mask[r*KV + j] != -INFINITY;
            }
            std::fill(buf.mask + r*KV + cells, buf.mask + (r + 1)*KV, -INFINITY);
        }
        if (!seen) {
            continue;
        }

        const char * k_data = (const char *) k->data + i*k->nb[1] + head*k->nb[2] + k3*k->nb[3];
        const char * v_data = (const char *) v->data + i*v->nb[1] + head*v->nb[2] + k3*v->nb[3];
        for (int64_t j = 0; j < cells && !few; ++j) {
            if (is_f16) {
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) (v_data + j*v->nb[1]), buf.v + j*DV, DV);
            } else {
                memcpy(buf.v + j*DV, v_data + j*v->nb[1], DV*sizeof(float));
                for (int64_t d = 0; d < DK; ++d) {
                    buf.k[d*KV + j] = ((const float *) (k_data + j*k->nb[1]))[d];
                }
            }
        }
        if (is_f16 && !few) {
            transpose_f16(k_data, k->nb[1], cells, DK, buf.k);
        }
        if (cells < KV && !few) { // clear data of the previous tile, which must not be NaN
            for (int64_t d = 0; d < DK; ++d) {
                std::fill(buf.k + d*KV + cells, buf.k + (d + 1)*KV, 0.0f);
            }
            memset(buf.v + cells*DV, 0, (KV - cells)*DV*sizeof(float));
        }

        if (few) {
            few->scores(buf.q, DK, k_data, k->nb[1], v_data, v->nb[1], DV, cells, buf.kq);
        } else {
            memset(buf.kq, 0, n*KV*sizeof(float));
            simd_gemm(buf.kq, buf.q, buf.k, n, DK, KV);
        }
        ggml_vec_scale_f32(n*KV, buf.kq, scale);
        if (softcap != 0.0f) {
            ggml_vec_tanh_f32(n*KV, buf.kq, buf.kq);
            ggml_vec_scale_f32(n*KV, buf.kq, softcap);
        }
        for (int64_t r = 0; r < n; ++r) {
            std::fill(buf.kq + r*KV + cells, buf.kq + (r + 1)*KV, -INFINITY);
        }
        if (mask) {
            ggml_vec_add_f32(n*KV, buf.kq, buf.kq, buf.mask);
        }

        for (int64_t r = 0; r < n; ++r) {
            float * kq = buf.kq + r*KV;
            float max;
            ggml_vec_max_f32(KV, &max, kq);
            if (max == -INFINITY) {
                memset(kq, 0, KV*sizeof(float));
                continue;
            }
            const float M_old = M[r];
            M[r] = fmaxf(M_old, max);
            if (M[r] > M_old) {
                const float ms = expf(M_old - M[r]);
                ggml_vec_scale_f32(DV, buf.out + r*DV, ms);
                S[r] *= ms;
            }
            S[r] += ggml_vec_soft_max_f32(KV, kq, kq, M[r]);
        }
        if (few) {
            few->values(buf.kq, v_data, v->nb[1], cells, DV, buf.out);
        } else {
            simd_gemm(buf.out, buf.kq, buf.v, n, KV, DV);
        }
    }

    for (int64_t r = 0; r < n; ++r) {
        const int64_t h  = head*shared + (row_0 + r)/n_q;
        const int64_t i1 = (row_0 + r) % n_q;
        float * out = buf.out + r*DV;
        if (sinks) {
            const float s = ((const float *) sinks->data)[h];
            float ms = 1.0f;
            float vs = 1.0f;
            if (s > M[r]) {
                ms = expf(M[r] - s);
                ggml_vec_scale_f32(DV, out, ms);
            } else {
                vs = expf(s - M[r]);
            }
            S[r] = S[r]*ms + vs;
        }
        ggml_vec_scale_f32(DV, out, S[r] == 0.0f ? 0.0f : 1.0f/S[r]);
        memcpy((char *) dst->data + (i3*dst->ne[2]*dst->ne[1] + h + i1*dst->ne[1])*dst->nb[1], out, DV*sizeof(float));
    }
}

} // namespace

bool ggml_compute_forward_flash_attn_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (!supported(params, dst)) {
        return false;
    }
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];

    // splits a head of the cache into as few pieces as keep all threads busy
    const int64_t heads  = k->ne[2]*q->ne[3];
    const int64_t rows   = q->ne[1]*(q->ne[2]/k->ne[2]);
    const int64_t pieces = std::max((rows + ROWS - 1)/ROWS, std::min(rows, (params->nth + heads - 1)/heads));
    for (int64_t item = params->ith; item < heads*pieces; item += params->nth) {
        const int64_t head = item / pieces, piece = item % pieces;
        attend(params, dst, head % k->ne[2], head / k->ne[2], rows*piece/pieces, rows*(piece + 1)/pieces);
    }
    return true;
}
