// The end of a tile whose sums become int8 of an activation function (mbq_w4a8_store_codes) on the CPU, against a function of each sum and the quantiser's order; and
// which rows of weights such a tile has. test_cuda_emulated.py makes and runs it.

#include "cuda.h"

#include <climits>
#include <random>

#define GGML_ROW_SCALE_AMAX_MIN 1e-30f
static float __fadd_rn(float a, float b) { return a + b; }
static float mbq_mul_rn(float a, float b) { return a*b; }
static float mbq_div_rn(float a, float b) { return a/b; }
static int   __float_as_int(float f) { return (int) __float_as_uint(f); }
static float mbq_w4a8_scale(int sum, float d, float s) { return (float) sum*d*s; }
struct mbq_gemm_args { int N; };
struct mbq_gemm_thread { int rank, warp, lane; };
struct mbq_w4a8_gemm_matrix { const float * bias, * more; };
template <int bits> struct mbq_w4a8_layout { static constexpr int shift = bits == 4 ? 4 : 0; };
template <int bits_, int BM_, int BN_> struct tile {
    static constexpr int  bits = bits_, BM = BM_, BN = BN_, WARPS = BM/16;
    static constexpr bool codes = true, heads = false;
};
#include "codes.cuh"

static int wrong = 0;
static void check(const bool good, const char * what, const int BM, const int BN) {
    if (!good) { printf("%s: tiles of %d x %d\n", what, BM, BN); }
    wrong += !good;
}

// Slots as the tensor memory accelerator fills them from mbq_w4a8_make_codes_map's box: [64 rows][16 of these][parity][half of them]
template <typename T> static void check_rows() {
    bool same = true;
    for (int first = 0; first < 512; first += T::BM) {
        for (int warp = 0; warp < T::WARPS; ++warp) {
            for (int i = 0; i < 16; ++i) {
                const int g = i/2, r = i % 2, slot = mbq_w4a8_tile_rows<T>::slot(warp, g, r);
                const int sixteen = slot/16, of_64 = sixteen/(T::BM/64), part = sixteen % (T::BM/64);
                const int row = (first/256*4 + of_64)*64 + (first%256/64 + part)*16 + slot%8*2 + slot/8%2;
                same = same && row == mbq_w4a8_tile_rows<T>::row(first, warp, g, 0) + r;
            }
        }
    }
    check(same, "rows", T::BM, T::BN);
}

template <typename T> static void check_codes(const int M, const int N, const bool biased) {
    using R = mbq_w4a8_tile_rows<T>;
    constexpr int each = T::BM == 64 ? 2 : 1; // tiles that the two groups take at a time
    constexpr int shift = mbq_w4a8_layout<T::bits>::shift;
    std::mt19937 rng(T::BM + T::BN);
    std::normal_distribution<float> normal;
    const int padded = (N + 255)/256*256, n_tiles = (N + T::BN - 1)/T::BN;
    std::vector<int> sums((size_t) M*padded);
    for (int & sum : sums) { sum = (int) (1000*normal(rng)) << shift; }
    std::vector<float> d_w(M), bias(M), scale(N), to_scale(N);
    for (float & f : d_w)   { f = 0.01f + 0.001f*std::fabs(normal(rng)); }
    for (float & f : bias)  { f = normal(rng); }
    for (float & f : scale) { f = 0.1f + 0.01f*std::fabs(normal(rng)); }
    std::vector<int4> q((size_t) M*padded/16, make_int4(-1, -1, -1, -1));
    const float range = 3.0f, inverse = 127.0f/range;
    mbq_w4a8_args args = {};
    args.gemm.N = N;
    args.scale  = scale.data();
    args.codes  = { q.data(), to_scale.data(), nullptr, 0, &range, M, MBQ_W4A8_GELU_QUICK };
    const mbq_w4a8_gemm_matrix m = { biased ? bias.data() : nullptr, nullptr };
    launch({ (unsigned) (M/T::BM*n_tiles/each), 1, 1 }, { 256, 1, 1 }, [&] {
        const mbq_gemm_thread at = { 0, (int) threadIdx.x/32, (int) threadIdx.x % 32 };
        const int n = blockIdx.x*each + (each == 2 ? at.warp/4 : 0), first = n/n_tiles*T::BM, n_tile = n % n_tiles, g = at.lane/4, t = at.lane % 4;
        const int row = R::row(first, at.warp, g, 0);
        int d[T::BN/2];
        for (int i = 0; i < T::BN/8; ++i) {
            for (int j = 0; j < 4; ++j) { d[4*i + j] = sums[(size_t) (row + j/2)*padded + n_tile*T::BN + 8*i + 2*t + j%2]; }
        }
        const mbq_w4a8_end end = { m, { d_w[row], d_w[row + 1] }, { biased ? bias[row] : 0.0f, biased ? bias[row + 1] : 0.0f } };
        mbq_w4a8_store_codes<T>(args, end, n_tile, row, at, mbq_w4a8_column_scale(__float_as_int(range)), d);
    });
    bool same = true, scales = true, words = true;
    for (int n = 0; n < N; ++n) {
        std::vector<float> column(M);
        for (int row = 0; row < M; ++row) {
            const float v = (float) (sums[(size_t) row*padded + n] >> shift)*d_w[row]*scale[n] + (biased ? bias[row] : 0.0f);
            column[row] = v*(1.0f/(1.0f + expf(-1.702f*v)));
        }
        for (int u = 0; u < M/16; ++u) {
            mbq_w4a8_unit unit;
            unit.load<true>(column.data(), u, M, true);
            const int4 codes = unit.codes(inverse);
            const int4 * found = &q[mbq_w4a8_unit_at<true>(u, n, N, M)];
            same = same && memcmp(&codes, found, 16) == 0;
            for (int i = 0; i < 4; ++i) {
                words = words && args.codes.word(mbq_w4a8_unit_k<true>(u, i), n) == (const uint32_t *) found + i;
            }
        }
        scales = scales && to_scale[n] == range/127.0f;
    }
    check(same, "codes", T::BM, T::BN);
    check(scales, "scales", T::BM, T::BN);
    check(words, "words", T::BM, T::BN);
}

int main() {
    check_rows<tile<8, 64, 256>>();
    check_codes<tile<8, 64, 256>>(512, 300, true);
    check_codes<tile<4, 64, 176>>(512, 130, false);
    check_codes<tile<8, 64, 176>>(256, 353, true);
    check_codes<tile<4, 64, 256>>(256, 65, true);
    return wrong != 0;
}
