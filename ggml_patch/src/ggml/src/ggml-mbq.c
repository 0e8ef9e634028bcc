#include "ggml-quants.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MBQ3_LEVELS 7         // the largest 3-bit code
#define MBQ3_F16_MAX 65504.0f
#define MBQ3S_SCALE_MAX 0x3DF // bits 5 to 14 of the largest fp16
#define MBQ3S_ZERO_MAX 63
#define MBQ3S_NAN 0xFC00      // scale NaN, zero point 0

// The functions below do the same float operations in the same order as converter/mbq_gguf/formats/, so that both write the same bytes.
// Contraction to fma cannot change a result: (x - m)*id is not a multiply-add, and d*code is exact in float, as is d*code + m if d and m
// come from a scale word.
//
// Blocks of all types are two 16-bit numbers followed by the codes of n weights: n/4 bytes of low bits, n/8 bytes of high bits. The numbers
// are fp16 d and m (halves = 1), or one scale word for each half of the block (halves = 2).

// the weights of a group are d*code + m
struct mbq3_grid {
    float d;
    float m;
};

static struct mbq3_grid mbq3_f16_grid(const uint16_t words[2]) {
    const struct mbq3_grid g = { GGML_FP16_TO_FP32(words[0]), GGML_FP16_TO_FP32(words[1]) };
    return g;
}

static struct mbq3_grid mbq3s_grid(uint16_t word) {
    const float d = GGML_FP16_TO_FP32((word & 0xFFC0) >> 1);
    const struct mbq3_grid g = { d, -(d*(word & MBQ3S_ZERO_MAX))/8 };
    return g;
}

// returns low for NaN
static float mbq3_clamp(float x, float low, float high) {
    return !(x > low) ? low : x > high ? high : x;
}

static float mbq3_inverse(float d) {
    return d > 0.0f ? 1.0f/d : 0.0f;
}

static int mbq3_code(float x, float m, float id) {
    return (int) rintf(mbq3_clamp((x - m)*id, 0.0f, MBQ3_LEVELS)); // ties to even
}

// Returns false if there is a NaN. Its code is then 0, and the group's scale becomes NaN, so that ggml_validate_row_data detects it.
static bool mbq3_range(const float * GGML_RESTRICT x, int n, float * lo, float * hi) {
    *lo = x[0];
    *hi = x[0];
    bool nan = isnan(x[0]);
    for (int i = 1; i < n; ++i) {
        *lo = x[i] < *lo ? x[i] : *lo;
        *hi = x[i] > *hi ? x[i] : *hi;
        nan |= isnan(x[i]);
    }
    *lo += 0.0f; // -0 becomes +0: which of the two zeros a minimum returns depends on the order of comparisons
    *hi += 0.0f;
    return !nan;
}

static float mbq3_step(float lo, float hi) {
    const float step = hi/MBQ3_LEVELS - lo/MBQ3_LEVELS; // hi - lo could overflow
    return step < MBQ3_F16_MAX ? step : MBQ3_F16_MAX;
}

// Scale and minimum of a block from its range, before rounding to fp16.
static struct mbq3_grid mbq3_range_grid(const float * GGML_RESTRICT x, int n) {
    float lo, hi;
    if (!mbq3_range(x, n, &lo, &hi)) {
        return (struct mbq3_grid) { NAN, 0.0f };
    }
    const struct mbq3_grid g = { mbq3_step(lo, hi), mbq3_clamp(lo, -MBQ3_F16_MAX, MBQ3_F16_MAX) };
    return g;
}

static bool mbq3s_range(const float * GGML_RESTRICT x, int n, float * lo, float * hi) {
    const bool numbers = mbq3_range(x, n, lo, hi);
    *lo = *lo < 0.0f ? *lo : 0.0f;
    *hi = *hi > 0.0f ? *hi : 0.0f;
    return numbers;
}

// Scale word of a group from its range extended to 0.
static uint16_t mbq3s_range_word(const float * GGML_RESTRICT x, int n) {
    float lo, hi;
    if (!mbq3s_range(x, n, &lo, &hi)) {
        return MBQ3S_NAN;
    }
    const int h = GGML_FP32_TO_FP16(mbq3_step(lo, hi));
    const int r = (h + 15 + (h >> 5 & 1)) >> 5; // ties to even
    const int scale = r < MBQ3S_SCALE_MAX ? r : MBQ3S_SCALE_MAX;
    const float id = mbq3_inverse(GGML_FP16_TO_FP32(scale << 5));
    return (uint16_t) (scale << 6 | (int) rintf(mbq3_clamp(-lo*8*id, 0.0f, MBQ3S_ZERO_MAX)));
}

// ---- with an importance matrix: the scale and minimum with the least weighted error

#define MBQ3_CANDIDATES 24

// Weighted squared error of the nearest codes.
static double mbq3_weighted_error(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, struct mbq3_grid g) {
    const float id = mbq3_inverse(g.d);
    double error = 0.0;
    for (int i = 0; i < n; ++i) {
        const double e = (double) g.d*mbq3_code(x[i], g.m, id) + g.m - x[i];
        error += w[i]*e*e;
    }
    return error;
}

static void mbq3_f16_words(struct mbq3_grid g, uint16_t words[2]) {
    words[0] = GGML_FP32_TO_FP16(g.d);
    words[1] = GGML_FP32_TO_FP16(g.m);
}

static double mbq3_f16_error(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, struct mbq3_grid g) {
    uint16_t words[2];
    mbq3_f16_words(g, words);
    return mbq3_weighted_error(x, w, n, mbq3_f16_grid(words));
}

// Scale and minimum with the least weighted squared error for the codes from id and m0; returns false if all codes are equal.
static bool mbq3_fit(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, float m0, float id, struct mbq3_grid * g) {
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
    g->d = (float) ((sw*sqx - sq*sx)/det);
    g->m = (float) ((sqq*sx - sq*sqx)/det);
    return g->d > 0.0f && g->d <= MBQ3_F16_MAX && fabsf(g->m) <= MBQ3_F16_MAX;
}

// Starts from the full range and from ranges divided into fewer and more steps, fits each to its codes, and keeps the best. The result is
// never worse than the plain range.
static struct mbq3_grid mbq3_search(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n) {
    const struct mbq3_grid range = mbq3_range_grid(x, n);
    struct mbq3_grid best = range;
    double least = mbq3_f16_error(x, w, n, best);
    for (int c = 0; range.d > 0.0f && c < MBQ3_CANDIDATES; ++c) {
        const float steps = MBQ3_LEVELS + 0.1f*(c - 10); // 6 to 8.3
        struct mbq3_grid g;
        if (!mbq3_fit(x, w, n, range.m, steps/(MBQ3_LEVELS*range.d), &g)) {
            continue;
        }
        const double error = mbq3_f16_error(x, w, n, g);
        if (error < least) {
            least = error;
            best = g;
        }
    }
    return best;
}

static void mbq3s_try(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n, int scale, int zero, uint16_t * best, double * least) {
    if (scale < 1 || scale > MBQ3S_SCALE_MAX || zero < 0 || zero > MBQ3S_ZERO_MAX) {
        return;
    }
    const uint16_t word = (uint16_t) (scale << 6 | zero);
    const double error = mbq3_weighted_error(x, w, n, mbq3s_grid(word));
    if (error < *least) {
        *least = error;
        *best = word;
    }
}

// The same for a scale word: tries a coarse grid of scales and, for each, of zero points between those that preserve the lower and the upper
// end of the range, then moves to better neighbours until there are none. On normal and heavy-tailed weights the error is within 5 % of that
// of the best word near the range, with about 70 trials instead of 2700.
static uint16_t mbq3s_search(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int n) {
    float lo, hi;
    if (!mbq3s_range(x, n, &lo, &hi)) {
        return MBQ3S_NAN;
    }
    uint16_t best = mbq3s_range_word(x, n);
    double least = mbq3_weighted_error(x, w, n, mbq3s_grid(best));
    const int range = best >> 6;
    for (int scale = MAX(range - 24, 1); scale <= MIN(range + 6, MBQ3S_SCALE_MAX); scale += 3) { // 32 steps are a factor of 2
        const float id = mbq3_inverse(GGML_FP16_TO_FP32(scale << 5));
        const float low  = mbq3_clamp(-lo*8*id, 0.0f, MBQ3S_ZERO_MAX);
        const float high = mbq3_clamp(8*MBQ3_LEVELS - hi*8*id, 0.0f, MBQ3S_ZERO_MAX);
        for (int step = 0; step < 5; ++step) {
            mbq3s_try(x, w, n, scale, (int) rintf(low + (high - low)*step/4), &best, &least);
        }
    }
    for (uint16_t from = 0; from != best; ) {
        from = best;
        for (int i = 0; i < 9; ++i) {
            mbq3s_try(x, w, n, (from >> 6) + i/3 - 1, (from & MBQ3S_ZERO_MAX) + i%3 - 1, &best, &least);
        }
    }
    return best;
}

// ---- rows

static void mbq3_put_codes(const float * GGML_RESTRICT x, int first, int last, struct mbq3_grid g, int n, uint8_t * GGML_RESTRICT ql, uint8_t * GGML_RESTRICT qh) {
    const float id = mbq3_inverse(g.d);
    for (int i = first; i < last; ++i) {
        const int code  = mbq3_code(x[i], g.m, id);
        const int plane = i / (n/4);
        const int byte  = i % (n/4);
        ql[byte] |= (uint8_t) ((code & 3) << (2*plane));
        qh[byte % (n/8)] |= (uint8_t) ((code >> 2) << ((2*plane + 2)%8 + byte/(n/8)));
    }
}

// k weights; with an importance matrix, in rows of n_per_row weights
static void mbq3_quantize(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k, int n, int halves, const float * imatrix, int64_t n_per_row) {
    assert(k % n == 0);
    uint8_t * block = y;
    for (int64_t i = 0; i < k; i += n, x += n, block += 4 + 3*n/8) {
        const float * w = imatrix ? imatrix + i % n_per_row : NULL;
        uint16_t * words = (uint16_t *) block;
        uint8_t * ql = block + 4;
        uint8_t * qh = ql + n/4;
        memset(ql, 0, 3*n/8);
        if (halves == 1) {
            mbq3_f16_words(w ? mbq3_search(x, w, n) : mbq3_range_grid(x, n), words);
            mbq3_put_codes(x, 0, n, mbq3_f16_grid(words), n, ql, qh);
        } else {
            for (int h = 0; h < 2; ++h) {
                words[h] = w ? mbq3s_search(x + h*n/2, w + h*n/2, n/2) : mbq3s_range_word(x + h*n/2, n/2);
                mbq3_put_codes(x, h*n/2, (h + 1)*n/2, mbq3s_grid(words[h]), n, ql, qh);
            }
        }
    }
}

static void mbq3_dequantize(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k, int n, int halves) {
    assert(k % n == 0);
    const uint8_t * block = x;
    for (int64_t i = 0; i < k; i += n, block += 4 + 3*n/8) {
        const uint16_t * words = (const uint16_t *) block;
        const uint8_t * ql = block + 4;
        const uint8_t * qh = ql + n/4;
        for (int plane = 0; plane < 4; ++plane) {
            const struct mbq3_grid g = halves == 1 ? mbq3_f16_grid(words) : mbq3s_grid(words[plane/2]);
            for (int byte = 0; byte < n/4; ++byte) {
                const int low  = (ql[byte] >> (2*plane)) & 3;
                const int high = (qh[byte % (n/8)] >> ((2*plane + 2)%8 + byte/(n/8))) & 1;
                *y++ = (float) (low | high << 2)*g.d + g.m;
            }
        }
    }
}

#define MBQ3_CONVERSIONS(name, n, halves)                                                                                              \
    void quantize_row_##name##_ref(const float * GGML_RESTRICT x, block_##name * GGML_RESTRICT y, int64_t k) {                         \
        mbq3_quantize(x, y, k, n, halves, NULL, k);                                                                                    \
    }                                                                                                                                  \
    void dequantize_row_##name(const block_##name * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {                             \
        mbq3_dequantize(x, y, k, n, halves);                                                                                           \
    }                                                                                                                                  \
    size_t quantize_##name(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nrows, int64_t n_per_row, const float * w) { \
        mbq3_quantize(x, y, nrows*n_per_row, n, halves, w, n_per_row);                                                                 \
        return nrows*(n_per_row/n)*sizeof(block_##name);                                                                               \
    }

MBQ3_CONVERSIONS(mbq3,     QKMBQ3,    1)
MBQ3_CONVERSIONS(mbq3_64,  QKMBQ3_64, 1)
MBQ3_CONVERSIONS(mbq3s,    QKMBQ3,    2)
MBQ3_CONVERSIONS(mbq3s_64, QKMBQ3_64, 2)

bool ggml_mbq3s_validate(const void * data, size_t nb, size_t size) {
    for (size_t i = 0; i < nb; ++i) {
        const uint16_t * words = (const uint16_t *) ((const char *) data + i*size);
        if (words[0] >> 6 > MBQ3S_SCALE_MAX || words[1] >> 6 > MBQ3S_SCALE_MAX) {
            fprintf(stderr, "%s: found inf/nan scale in block %zu\n", __func__, i);
            return false;
        }
    }
    return true;
}
