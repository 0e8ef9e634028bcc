// LayerNorm by one warp a column (mbq-w4a8-layer-norm.cuh) on the CPU, against the sums that ggml's own kernel makes, bit for bit, and against the quantiser of
// mbq-w4a8-quantize.cuh. test_cuda_emulated.py makes and runs it.

#include "cuda.h"

#include <climits>
#include <random>

#define GGML_PAD(x, n) (((x) + (n) - 1)/(n)*(n))
#define GGML_ROW_SCALE_AMAX_MIN 1e-30f
static float __fmul_rn(float a, float b) { return a*b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float mbq_mul_rn(float a, float b) { return a*b; }
static float mbq_div_rn(float a, float b) { return a/b; }
static float rsqrtf(float x) { return 1/sqrtf(x); }
static int   __float_as_int(float f) { return (int) __float_as_uint(f); }
static float2 warp_reduce_sum(float2 a) {
    for (int h = 16; h > 0; h /= 2) {
        a.x += __shfl_xor_sync(~0u, a.x, h);
        a.y += __shfl_xor_sync(~0u, a.y, h);
    }
    return a;
}
#include "layer_norm.cuh"

static int wrong = 0;
static void check(const bool good, const char * what, const int k, const int columns) {
    if (!good) { printf("%s: %d of %d\n", what, columns, k); }
    wrong += !good;
}

static float2 summed(float2 * v, const int n, const int stride) { // 32 lanes' sums, as warp_reduce_sum
    for (int h = 16; h > 0; h /= 2) {
        float2 next[32];
        for (int i = 0; i < 32; ++i) { next[i] = make_float2(v[i*stride].x + v[(i ^ h)*stride].x, v[i*stride].y + v[(i ^ h)*stride].y); }
        for (int i = 0; i < n; ++i) { v[i*stride] = next[i]; }
    }
    return v[0];
}

// As norm_f32 of 1024 threads, and MUL and ADD
static void layer_norm(const float * x, const float * y, const float * z, float * out, const int K, const float eps) {
    float2 threads_[1024], warps[32];
    for (int t = 0; t < 1024; ++t) {
        threads_[t] = make_float2(0.0f, 0.0f);
        for (int i = t; i < K; i += 1024) { threads_[t].x += x[i]; threads_[t].y += x[i]*x[i]; }
    }
    for (int w = 0; w < 32; ++w) { warps[w] = summed(threads_ + 32*w, 32, 1); }
    const float2 all = summed(warps, 32, 1);
    const float mean = all.x/K, var = all.y/K - mean*mean, inv_std = rsqrtf(var + eps);
    for (int i = 0; i < K; ++i) { out[i] = (x[i] - mean)*inv_std*y[i]; out[i] = z ? out[i] + z[i] : out[i]; }
}

template <int R> static void check_norm(const int K, const int N, const bool biased, std::mt19937 & rng) {
    const int pitch = K + 4, padded = GGML_PAD(K, 256), tiles = (N + 127)/128;
    std::normal_distribution<float> normal(0.3f);
    const auto random = [&](const size_t n) { std::vector<float> v(n); for (float & f : v) { f = normal(rng); } return v; };
    const auto x = random((size_t) N*pitch), y = random(K), z = random(K);
    std::vector<float> out((size_t) N*K), scale(N), expected((size_t) N*K);
    std::vector<int4>  q((size_t) tiles*128*padded/16, make_int4(-1, -1, -1, -1));
    std::vector<int>   flags(7, 1);
    mbq_w4a8_fused_args args = {};
    args.x = x.data(); args.y = y.data(); args.z = biased ? z.data() : nullptr;
    args.out = out.data();
    args.x_column = pitch; args.out_column = K; args.eps = 1e-6f;
    args.q = q.data(); args.scale = scale.data(); args.flags = flags.data(); args.n_flags = flags.size();
    args.K = K; args.padded = padded;
    launch({ (unsigned) (N + MBQ_LAYER_NORM_WARPS - 1)/MBQ_LAYER_NORM_WARPS, 1, 1 }, { 32*MBQ_LAYER_NORM_WARPS, 1, 1 }, [&] { mbq_w4a8_layer_norm_of_warp<R>(args, N); });
    bool same = true, same_codes = true;
    for (int n = 0; n < N; ++n) {
        float * e = &expected[(size_t) n*K];
        layer_norm(&x[(size_t) n*pitch], y.data(), args.z, e, K, args.eps);
        same = same && memcmp(e, &out[(size_t) n*K], K*4) == 0;
        float most = 0.0f;
        for (int i = 0; i < K; ++i) {
            most = std::max(most, std::fabs(e[i]));
        }
        same_codes = same_codes && scale[n] == most/127.0f;
        std::vector<float> column(padded);
        std::copy(e, e + K, column.begin());
        for (int u = 0; u < padded/16; ++u) {
            mbq_w4a8_unit unit;
            unit.load<true>(column.data(), u, padded, true);
            const int4 codes = unit.codes(127.0f/most);
            same_codes = same_codes && memcmp(&codes, &q[mbq_w4a8_unit_at<true>(u, n, N, padded)], 16) == 0;
        }
    }
    check(same, "LayerNorm", K, N);
    check(same_codes, "LayerNorm, int8", K, N);
    check(std::count(flags.begin(), flags.end(), 0) == 7, "flags", K, N);
}

// Every half code from -130 to 130, next to it, and what the scale of a static range leaves outside
static void check_codes() {
    bool same = true;
    for (int i = -260; i <= 260; ++i) {
        const float x = 0.5f*i, v[4] = { x, nextafterf(x, 1000.0f), nextafterf(x, -1000.0f), 1e30f*x };
        const int codes = mbq_w4a8_four_codes(make_float4(v[0], v[1], v[2], v[3]), 1.0f);
        for (int j = 0; j < 4; ++j) {
            same = same && (int8_t) (codes >> 8*j) == (int) nearbyintf(std::min(std::max(v[j], -127.0f), 127.0f));
        }
    }
    check(same, "codes", 0, 0);
}

int main() {
    std::mt19937 rng(3);
    check_codes();
    check_norm<10>(1280, 9, true, rng);
    check_norm<10>(1024, 130, true, rng);
    check_norm<10>(1152, 5, false, rng);
    check_norm<12>(1536, 4, true, rng);
    check_norm<12>(1408, 3, true, rng);
    return wrong != 0;
}
