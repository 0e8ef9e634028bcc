// What is behind a product of F16 weights (mbq-f16.cuh) on the CPU, against the same sums one by one, bit for bit. test_cuda_emulated.py makes and runs it.

#include "cuda.h"

#include <random>

static float __fadd_rn(float a, float b) { return a + b; }
static uint2 fast_div_modulo(uint32_t n, uint3 d) { return make_uint2(n/d.z, n%d.z); }
enum mbq_w4a8_function { MBQ_W4A8_SWIGLU, MBQ_W4A8_GELU };
template <mbq_w4a8_function> struct mbq_w4a8_gelu { static float of(float x) { return 0.5f*x*x; } };

#include "behind.cuh"

static int wrong = 0;
static void check(const bool good, const char * what, const int k, const int columns) {
    if (!good) { printf("%s: %d of %d\n", what, columns, k); }
    wrong += !good;
}

template <int f> static void check_end(const int M, const int N, const bool bias, const bool more, const bool floats, std::mt19937 & rng) {
    const int pitch = M + 12;
    std::normal_distribution<float> normal;
    std::vector<half>  y((size_t) M*N), halves(y.size());
    std::vector<float> b(M), m((size_t) pitch*N), out(y.size());
    for (half  & v : y) { v = __float2half(normal(rng)); }
    for (float & v : b) { v = normal(rng); }
    for (float & v : m) { v = normal(rng); }
    mbq_f16_end_args args = {};
    args.y = y.data(); args.bias = bias ? b.data() : nullptr; args.more = more ? m.data() : nullptr; args.more_column = pitch;
    args.out = floats ? out.data() : nullptr; args.halves = floats ? nullptr : halves.data();
    args.units = M*N/8; args.column.z = M/8;
    launch({ (unsigned) (args.units + 255)/256, 1, 1 }, { 256, 1, 1 }, [&] { mbq_f16_end<f>(args); });
    bool same = true;
    for (int i = 0; i < M*N; ++i) {
        float v = __half2float(y[i]);
        v = bias ? v + b[i % M] : v;
        v = more ? v + m[(size_t) (i/M)*pitch + i % M] : v;
        v = f == MBQ_F16_NO_FUNCTION ? v : 0.5f*v*v;
        const half h = __float2half(v);
        same = same && (floats ? memcmp(&v, &out[i], 4) : memcmp(&h, &halves[i], 2)) == 0;
    }
    check(same, "behind a product", M, N);
}

int main() {
    std::mt19937 rng(3);
    check_end<MBQ_F16_NO_FUNCTION>(40, 17, true, true, true, rng);
    check_end<MBQ_F16_NO_FUNCTION>(1280, 3, false, false, true, rng);
    check_end<MBQ_F16_NO_FUNCTION>(8, 700, false, true, true, rng);
    check_end<MBQ_W4A8_GELU>(5120, 2, true, false, false, rng);
    return wrong != 0;
}
