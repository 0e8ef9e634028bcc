#include "mbq.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-quants.h"
#include "simd-mappings.h"

#include <assert.h>

void ggml_mbq_from_float_mbq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_mbq3_ref(x, y, k);
}

void ggml_mbq_from_float_mbq3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_mbq3_64_ref(x, y, k);
}

// Sum of code * q over one block of n weights and its n/32 blocks of activations, d8 included.
static inline float mbq3_block_dot(const uint8_t * GGML_RESTRICT ql, const uint8_t * GGML_RESTRICT qh, const block_q8_1 * GGML_RESTRICT y, int n) {
    float sum = 0.0f;
    for (int ib = 0; ib < n/QK8_1; ++ib) {
        int sumi = 0;
        for (int j = 0; j < QK8_1; ++j) {
            const int i     = ib*QK8_1 + j;
            const int plane = i / (n/4);
            const int byte  = i % (n/4);
            const int low   = (ql[byte] >> (2*plane)) & 3;
            const int high  = (qh[byte % (n/8)] >> ((2*plane + 2)%8 + byte/(n/8))) & 1;
            sumi += (low | high << 2)*y[ib].qs[j];
        }
        sum += GGML_CPU_FP16_TO_FP32(y[ib].d)*sumi;
    }
    return sum;
}

void ggml_vec_dot_mbq3_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QKMBQ3 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);

    const block_mbq3 * GGML_RESTRICT x = vx;
    const block_q8_1 * GGML_RESTRICT y = vy;

    float sum = 0.0f;
    for (int ib = 0; ib < n/QKMBQ3; ++ib, y += QKMBQ3/QK8_1) {
        float s8 = 0.0f;
        for (int j = 0; j < QKMBQ3/QK8_1; ++j) {
            s8 += GGML_CPU_FP16_TO_FP32(y[j].s);
        }
        sum += GGML_CPU_FP16_TO_FP32(x[ib].d)*mbq3_block_dot(x[ib].ql, x[ib].qh, y, QKMBQ3) + GGML_CPU_FP16_TO_FP32(x[ib].m)*s8;
    }
    *s = sum;
}

void ggml_vec_dot_mbq3_64_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QKMBQ3_64 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);

    const block_mbq3_64 * GGML_RESTRICT x = vx;
    const block_q8_1    * GGML_RESTRICT y = vy;

    float sum = 0.0f;
    for (int ib = 0; ib < n/QKMBQ3_64; ++ib, y += QKMBQ3_64/QK8_1) {
        const float s8 = GGML_CPU_FP16_TO_FP32(y[0].s) + GGML_CPU_FP16_TO_FP32(y[1].s);
        sum += GGML_CPU_FP16_TO_FP32(x[ib].d)*mbq3_block_dot(x[ib].ql, x[ib].qh, y, QKMBQ3_64) + GGML_CPU_FP16_TO_FP32(x[ib].m)*s8;
    }
    *s = sum;
}
