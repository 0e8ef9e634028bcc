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

static int mbq3_code(float x, float m, float id) {
    const float v = (x - m)*id;
    return (int) rintf(v < 0.0f ? 0.0f : v > MBQ3_LEVELS ? MBQ3_LEVELS : v); // ties to even
}

// Block with the given scale and minimum, and the nearest codes.
static void mbq3_pack_block(const float * GGML_RESTRICT x, int n, ggml_half hd, ggml_half hm, uint8_t * GGML_RESTRICT ql, uint8_t * GGML_RESTRICT qh) {
    const float d  = GGML_FP16_TO_FP32(hd);
    const float m  = GGML_FP16_TO_FP32(hm);
    const float id = d > 0.0f ? 1.0f/d : 0.0f;

    memset(ql, 0, n/4);
    memset(qh, 0, n/8);
    for (int i = 0; i < n; ++i) {
        const int code  = mbq3_code(x[i], m, id);
        const int plane = i / (n/4);
        const int byte  = i % (n/4);
        ql[byte] |= (uint8_t) ((code & 3) << (2*plane));
        qh[byte % (n/8)] |= (uint8_t) ((code >> 2) << ((2*plane + 2)%8 + byte/(n/8)));
    }
}

static void mbq3_quantize_block(const float * GGML_RESTRICT x, int n, ggml_half * hd, ggml_half * hm, uint8_t * GGML_RESTRICT ql, uint8_t * GGML_RESTRICT qh) {
    float d;
    float m;
    mbq3_range(x, n, &d, &m);
    *hd = GGML_FP32_TO_FP16(d);
    *hm = GGML_FP32_TO_FP16(m);
    mbq3_pack_block(x, n, *hd, *hm, ql, qh);
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

// ---- with an importance matrix: the scale and minimum with the least error weighted by it

#define MBQ3_CANDIDATES 24

// Weighted squared error of the nearest codes on a grid that is rounded to fp16 first.
static double mbq3_weighted_error(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, float d, float m) {
    d = GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(d));
    m = GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(m));
    const float id = d > 0.0f ? 1.0f/d : 0.0f;
    double error = 0.0;
    for (int i = 0; i < n; ++i) {
        const double e = (double) d*mbq3_code(x[i], m, id) + m - x[i];
        error += w[i]*e*e;
    }
    return error;
}

// Scale and minimum with the least weighted squared error for the codes that id and m0 give; false where the codes are all equal.
static bool mbq3_fit(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, float m0, float id, float * d, float * m) {
    double sw = 0.0, sq = 0.0, sqq = 0.0, sx = 0.0, sqx = 0.0;
    for (int i = 0; i < n; ++i) {
        const int q = mbq3_code(x[i], m0, id);
        sw  += w[i];
        sq  += (double) w[i]*q;
        sqq += (double) w[i]*q*q;
        sx  += (double) w[i]*x[i];
        sqx += (double) w[i]*q*x[i];
    }
    const double det = sw*sqq - sq*sq;
    if (!(det > 0.0)) {
        return false;
    }
    *d = (float) ((sw*sqx - sq*sx)/det);
    *m = (float) ((sqq*sx - sq*sqx)/det);
    return *d > 0.0f && *d <= MBQ3_F16_MAX && fabsf(*m) <= MBQ3_F16_MAX;
}

// Start from the full range and from ranges with fewer and more steps in it, fit each to its codes, and keep the best; so never worse
// than mbq3_quantize_block.
static void mbq3_quantize_block_weighted(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, ggml_half * hd, ggml_half * hm, uint8_t * GGML_RESTRICT ql, uint8_t * GGML_RESTRICT qh) {
    float d;
    float m;
    mbq3_range(x, n, &d, &m);
    const float lo   = m;
    const float step = d;
    double best = mbq3_weighted_error(x, w, n, d, m);
    for (int c = 0; step > 0.0f && c < MBQ3_CANDIDATES; ++c) {
        const float steps = MBQ3_LEVELS + 0.1f*(c - 10); // 6 to 8.3
        float fd;
        float fm;
        if (!mbq3_fit(x, w, n, lo, steps/(MBQ3_LEVELS*step), &fd, &fm)) {
            continue;
        }
        const double error = mbq3_weighted_error(x, w, n, fd, fm);
        if (error < best) {
            best = error;
            d = fd;
            m = fm;
        }
    }
    *hd = GGML_FP32_TO_FP16(d);
    *hm = GGML_FP32_TO_FP16(m);
    mbq3_pack_block(x, n, *hd, *hm, ql, qh);
}

size_t quantize_mbq3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    if (!imatrix) {
        quantize_row_mbq3_ref(src, dst, nrows*n_per_row);
    } else {
        block_mbq3 * y = dst;
        for (int64_t i = 0; i < nrows*n_per_row; i += QKMBQ3, ++y) {
            mbq3_quantize_block_weighted(src + i, imatrix + i % n_per_row, QKMBQ3, &y->d, &y->m, y->ql, y->qh);
        }
    }
    return nrows*ggml_row_size(GGML_TYPE_MBQ3, n_per_row);
}

size_t quantize_mbq3_64(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    if (!imatrix) {
        quantize_row_mbq3_64_ref(src, dst, nrows*n_per_row);
    } else {
        block_mbq3_64 * y = dst;
        for (int64_t i = 0; i < nrows*n_per_row; i += QKMBQ3_64, ++y) {
            mbq3_quantize_block_weighted(src + i, imatrix + i % n_per_row, QKMBQ3_64, &y->d, &y->m, y->ql, y->qh);
        }
    }
    return nrows*ggml_row_size(GGML_TYPE_MBQ3_64, n_per_row);
}
