#include "ggml-quants.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define MBQ3_LEVELS 7        // the largest 3-bit code
#define MBQ3_F16_MAX 65504.0f

// The functions below do the same float operations in the same order as converter/mbq_gguf/formats/mbq3.py, so that both write
// the same bytes. Contraction to fma cannot change a result: (x - m)*id is no multiply-add, and d*code is exact in float.

// Scale and minimum of a block by its range, before rounding to fp16.
static void mbq3_range(const float * GGML_RESTRICT x, int n, float * d, float * m) {
    float lo = x[0];
    float hi = x[0];
    for (int i = 1; i < n; ++i) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    lo += 0.0f; // -0 becomes +0: which of the two equal zeros a minimum returns depends on its order
    hi += 0.0f;
    const float range = hi/MBQ3_LEVELS - lo/MBQ3_LEVELS; // hi - lo could overflow
    *d = range < MBQ3_F16_MAX ? range : MBQ3_F16_MAX;
    *m = lo < -MBQ3_F16_MAX ? -MBQ3_F16_MAX : lo > MBQ3_F16_MAX ? MBQ3_F16_MAX : lo;
}

static void mbq3_quantize_block(const float * GGML_RESTRICT x, int n, ggml_half * hd, ggml_half * hm, uint8_t * GGML_RESTRICT ql, uint8_t * GGML_RESTRICT qh) {
    float d;
    float m;
    mbq3_range(x, n, &d, &m);
    *hd = GGML_FP32_TO_FP16(d);
    *hm = GGML_FP32_TO_FP16(m);

    d = GGML_FP16_TO_FP32(*hd);
    m = GGML_FP16_TO_FP32(*hm);
    const float id = d > 0.0f ? 1.0f/d : 0.0f;

    memset(ql, 0, n/4);
    memset(qh, 0, n/8);
    for (int i = 0; i < n; ++i) {
        const float v = (x[i] - m)*id;
        const int code = (int) rintf(v < 0.0f ? 0.0f : v > MBQ3_LEVELS ? MBQ3_LEVELS : v); // ties to even
        const int plane = i / (n/4);
        const int byte  = i % (n/4);
        ql[byte] |= (uint8_t) ((code & 3) << (2*plane));
        qh[byte % (n/8)] |= (uint8_t) ((code >> 2) << ((2*plane + 2)%8 + byte/(n/8)));
    }
}

static void mbq3_dequantize_block(ggml_half hd, ggml_half hm, const uint8_t * GGML_RESTRICT ql, const uint8_t * GGML_RESTRICT qh, int n, float * GGML_RESTRICT y) {
    const float d = GGML_FP16_TO_FP32(hd);
    const float m = GGML_FP16_TO_FP32(hm);
    for (int plane = 0; plane < 4; ++plane) {
        for (int byte = 0; byte < n/4; ++byte) {
            const int low  = (ql[byte] >> (2*plane)) & 3;
            const int high = (qh[byte % (n/8)] >> ((2*plane + 2)%8 + byte/(n/8))) & 1;
            *y++ = (float) (low | high << 2)*d + m;
        }
    }
}

void quantize_row_mbq3_ref(const float * GGML_RESTRICT x, block_mbq3 * GGML_RESTRICT y, int64_t k) {
    assert(k % QKMBQ3 == 0);
    for (int64_t i = 0; i < k/QKMBQ3; ++i) {
        mbq3_quantize_block(x + i*QKMBQ3, QKMBQ3, &y[i].d, &y[i].m, y[i].ql, y[i].qh);
    }
}

void quantize_row_mbq3_64_ref(const float * GGML_RESTRICT x, block_mbq3_64 * GGML_RESTRICT y, int64_t k) {
    assert(k % QKMBQ3_64 == 0);
    for (int64_t i = 0; i < k/QKMBQ3_64; ++i) {
        mbq3_quantize_block(x + i*QKMBQ3_64, QKMBQ3_64, &y[i].d, &y[i].m, y[i].ql, y[i].qh);
    }
}

void dequantize_row_mbq3(const block_mbq3 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QKMBQ3 == 0);
    for (int64_t i = 0; i < k/QKMBQ3; ++i) {
        mbq3_dequantize_block(x[i].d, x[i].m, x[i].ql, x[i].qh, QKMBQ3, y + i*QKMBQ3);
    }
}

void dequantize_row_mbq3_64(const block_mbq3_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QKMBQ3_64 == 0);
    for (int64_t i = 0; i < k/QKMBQ3_64; ++i) {
        mbq3_dequantize_block(x[i].d, x[i].m, x[i].ql, x[i].qh, QKMBQ3_64, y + i*QKMBQ3_64);
    }
}

size_t quantize_mbq3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    GGML_UNUSED(imatrix); // the range is exact for every weight; mbq-gguf's converter uses the calibration data
    quantize_row_mbq3_ref(src, dst, nrows*n_per_row);
    return nrows*ggml_row_size(GGML_TYPE_MBQ3, n_per_row);
}

size_t quantize_mbq3_64(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    GGML_UNUSED(imatrix);
    quantize_row_mbq3_64_ref(src, dst, nrows*n_per_row);
    return nrows*ggml_row_size(GGML_TYPE_MBQ3_64, n_per_row);
}
