// The end of a tile of q, k or v (mbq_w4a8_store_heads) on the CPU, against biases, rotary embeddings, attention's scaling and rounding one by one, bit for bit; and which
// rows of weights such a tile has. test_cuda_emulated.py makes and runs it.

#include "cuda.h"

#include <climits>
#include <random>

static float __fadd_rn(float a, float b) { return a + b; }
static float __fmul_rn(float a, float b) { return a*b; }
static float mbq_w4a8_scale(int sum, float d, float s) { return (float) sum*d*s; }
struct mbq_gemm_args { int N; };
struct mbq_w4a8_gemm_matrix { const float * bias, * more; float * dst; int64_t dst_column, dst_head; int M; float turn; };
template <int bits> struct mbq_w4a8_layout { static constexpr int shift = bits == 4 ? 4 : 0; };
template <int bits_, int BM_, int BN_> struct tile {
    static constexpr int  bits = bits_, BM = BM_, BN = BN_, WARPS = BM/16;
    static constexpr bool codes = false, heads = true;
};
struct mbq_gemm_thread { int rank, warp, lane; };
static void mbq_store_past_l1(half * to, const int4 v) { memcpy((void *) to, &v, 16); }
static void mbq_store_matrices(int4 * to, const uint32_t (&m)[4]) {
    const int g = threadIdx.x % 32/4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) {
            int4 * place = __shfl_sync(0xFFFFFFFF, to, i*8 + 2*t + j);
            memcpy((char *) place + 2*g, (const char *) &m[i] + 2*j, 2);
        }
    }
}
#include "heads.cuh"

static int wrong = 0;
static void check(const bool good, const char * what, const int BN, const int D, const int N) {
    if (!good) { printf("%s: tiles of %d columns, %d of heads of %d\n", what, BN, N, D); }
    wrong += !good;
}

// Slots as boxes of 8 rows fill them: each row of M is in one tile, once
template <typename T> static void check_rows(const int D, const int M) {
    using R = mbq_w4a8_tile_rows<T>;
    const int pairs = D/2;
    std::vector<int> found((M + T::BM)/T::BM*T::BM*2 + 2*D);
    bool same = true;
    for (int first = 0; first < M; first += T::BM) {
        for (int box = 0; box < T::BM/8; ++box) {
            const int row = R::row(first, box/2, 0, pairs) + box%2*pairs;
            for (int g = 0; g < 8; ++g) {
                same = same && R::row(first, box/2, g, pairs) + box%2*R::apart(pairs) == row + g && R::slot(box/2, g, box%2) == box*8 + g;
                found[row + g]++;
            }
        }
    }
    for (int row = 0; row < M; ++row) { same = same && found[row] == 1; }
    check(same, "rows", T::BN, D, M);
}

template <typename T> static void check_heads(const int D, const int H, const int N) {
    constexpr int shift = mbq_w4a8_layout<T::bits>::shift;
    using R = mbq_w4a8_tile_rows<T>;
    std::mt19937 rng(T::BN + D + N);
    std::normal_distribution<float> normal;
    const int M = D*H, pairs = D/2, n_tiles = (N + T::BN - 1)/T::BN, m_tiles = (M + T::BM - 1)/T::BM, columns = n_tiles*T::BN;
    std::vector<int> sums((size_t) M*columns), pos(2*N);
    for (int & sum : sums) { sum = (int) (1000*normal(rng)) << shift; }
    for (int & p : pos) { p = rng() % 64; }
    std::vector<float> d_w(M), bias(M), scale(N + 2);
    for (float & f : d_w)   { f = 0.01f + 0.001f*std::fabs(normal(rng)); }
    for (float & f : bias)  { f = normal(rng); }
    for (float & f : scale) { f = 0.1f + 0.01f*std::fabs(normal(rng)); }
    mbq_w4a8_args args = {};
    args.gemm.N = N;
    args.scale  = scale.data();
    args.angles = { pos.data(), pairs, pairs/2, pairs, 1.0f, 1.0f, powf(10000.0f, -2.0f/pairs) };
    struct { const char * name; int64_t column, head; float turn; bool biased; } of[] = { { "q", 2*M, 2*D, 0.16f, true }, { "k", D, (int64_t) D*N, 1.0f, true }, { "v", 2*M, D, 0.0f, false } };
    for (const auto & o : of) {
        const half untouched = __float2half(-999.0f);
        std::vector<half> made((size_t) 2*M*N, untouched), expected = made;
        const mbq_w4a8_gemm_matrix m = { o.biased ? bias.data() : nullptr, nullptr, (float *) made.data(), o.column, o.head, M, o.turn };
        launch({ (unsigned) (m_tiles*n_tiles), 1, 1 }, { 32*T::WARPS, 1, 1 }, [&] {
            const mbq_gemm_thread at = { 0, (int) threadIdx.x/32, (int) threadIdx.x % 32 };
            const int g = at.lane/4, t = at.lane % 4, n_tile = blockIdx.x % n_tiles, first_row = blockIdx.x/n_tiles*T::BM;
            const int row = R::row(first_row, at.warp, g, pairs);
            const int rows[2] = { std::min(row, M - 1), std::min(row + pairs, M - 1) };
            int d[T::BN/2];
            for (int i = 0; i < T::BN/8; ++i) {
                for (int j = 0; j < 4; ++j) { d[4*i + j] = sums[(size_t) rows[j/2]*columns + n_tile*T::BN + 8*i + 2*t + j%2]; }
            }
            const mbq_w4a8_end end = { m, { d_w[rows[0]], d_w[rows[1]] }, { bias[rows[0]], bias[rows[1]] } };
            mbq_w4a8_store_heads<T>(args, end, n_tile, first_row, row, at, d);
        });
        for (int n = 0; n < N; ++n) {
            for (int head = 0; head < H; ++head) {
                for (int i = 0; i < pairs; ++i) {
                    float v[2];
                    for (int r = 0; r < 2; ++r) {
                        const int row = head*D + i + r*pairs;
                        v[r] = (float) (sums[(size_t) row*columns + n] >> shift)*d_w[row]*scale[n] + (o.biased ? bias[row] : 0.0f);
                    }
                    if (o.turn != 0.0f) {
                        const int p = i < pairs/2 ? i : i - pairs/2;
                        const float theta = pos[i < pairs/2 ? n : n + N]*powf(args.angles.theta_scale, p);
                        mbq_rope_turn(v[0], v[1], cosf(theta), sinf(theta));
                        v[0] *= o.turn;
                        v[1] *= o.turn;
                    }
                    for (int r = 0; r < 2; ++r) { expected[head*o.head + n*o.column + i + r*pairs] = __float2half(v[r]); }
                }
            }
        }
        check(memcmp(made.data(), expected.data(), made.size()*sizeof(half)) == 0, o.name, T::BN, D, N);
    }
}

int main() {
    check_rows<tile<8, 64, 256>>(80, 1280);
    check_rows<tile<8, 64, 256>>(16, 48);
    check_rows<tile<8, 64, 256>>(128, 384);
    check_heads<tile<8, 64, 256>>(80, 4, 300);
    check_heads<tile<8, 64, 176>>(80, 3, 177); // half a tile of rows, a tile of one column
    check_heads<tile<4, 64, 176>>(16, 4, 9);
    check_heads<tile<4, 64, 256>>(128, 1, 256);
    return wrong != 0;
}
