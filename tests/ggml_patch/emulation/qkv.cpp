// What makes q, k and v ready for attention (mbq-qkv.cuh) on the CPU, against the kernels that do it one by one (mbq-rope.cuh, mbq-cast.cuh) and the scaling that
// attention does, bit for bit, with q in the place of its floats. test_cuda_emulated.py makes and runs it.

#include "cuda.h"

#include <random>

static float __fadd_rn(float a, float b) { return a + b; }
static float __fmul_rn(float a, float b) { return a*b; }
static float mbq_angles[1024];

#include "qkv.cuh"

static int wrong = 0;
static void check(const bool good, const char * what, const int head, const int columns) {
    if (!good) { printf("%s: %d of %d\n", what, columns, head); }
    wrong += !good;
}

static void check_qkv(const int D, const int H, const int N, std::mt19937 & rng) {
    std::normal_distribution<float> normal;
    std::vector<float> x[3];
    for (auto & v : x) { v.resize((size_t) N*H*D); for (float & f : v) { f = normal(rng); } }
    std::vector<int> pos(4*N);
    for (int & p : pos) { p = rng() % 64; }
    const mbq_rope_angles angles = { pos.data(), D/2, D/4, D/2, 1.0f, 1.0f, powf(10000.0f, -4.0f/D) };
    const three grid = { (unsigned) N, 1, 1 }, block = { (unsigned) (H*(D/8) + 31)/32*32, 1, 1 };

    std::vector<float> turned[2] = { x[0], x[1] };
    for (auto & v : turned) {
        mbq_rope_args args = {};
        args.x = v.data(); args.y = v.data(); args.x_head = args.y_head = D; args.x_column = args.y_column = H*D; args.threads = H*(D/8); args.angles = angles;
        launch(grid, block, [&] { mbq_rope_vision(args); });
    }
    std::vector<half> k(x[0].size()), v(k.size()), made_k(k.size()), made_v(k.size());
    const auto cast = [&](const std::vector<float> & from, std::vector<half> & to) {
        const int quads = N*H*D/4;
        const mbq_cast_args args = { (const char *) from.data(), (half2 *) to.data(), quads, D/4, N, H, H*D*4, D*4, N*H*D*4 };
        launch({ (unsigned) (quads + 31)/32, 1, 1 }, { 32, 1, 1 }, [&] { mbq_cast(args); });
    };
    cast(turned[1], k);
    cast(x[2], v);

    std::vector<float> q = x[0];
    mbq_qkv_args args = {};
    args.x[0] = q.data(); args.x[1] = x[1].data(); args.x[2] = x[2].data();
    args.x_column = H*D; args.q = (half *) q.data(); args.k = made_k.data(); args.v = made_v.data(); args.threads = H*(D/8); args.scale = 0.16f; args.angles = angles;
    launch(grid, block, [&] { mbq_qkv(args); });
    bool same = true;
    for (size_t i = 0; i < q.size(); ++i) { // each head's numbers from where its floats began
        const half expected = __float2half(turned[0][i]*args.scale);
        same = same && memcmp(&expected, (const half *) q.data() + 2*(i/D*D) + i % D, sizeof(half)) == 0;
    }
    check(same, "q", D, N);
    check(memcmp(k.data(), made_k.data(), k.size()*sizeof(half)) == 0, "k", D, N);
    check(memcmp(v.data(), made_v.data(), v.size()*sizeof(half)) == 0, "v", D, N);

    std::vector<float> alone = x[0]; // values are left to their product
    args.x[0] = alone.data(); args.x[2] = nullptr; args.q = (half *) alone.data(); args.v = nullptr;
    std::fill(made_k.begin(), made_k.end(), __float2half(0.0f));
    launch(grid, block, [&] { mbq_qkv(args); });
    check(memcmp(q.data(), alone.data(), q.size()*sizeof(float)) == 0 && memcmp(k.data(), made_k.data(), k.size()*sizeof(half)) == 0, "without v", D, N);
}

int main() {
    std::mt19937 rng(5);
    check_qkv(80, 16, 9, rng);
    check_qkv(72, 3, 5, rng);
    check_qkv(128, 2, 3, rng);
    return wrong != 0;
}
