// The kernels of the MBQ types on the CPU, against a reading of the format byte by byte: test_cuda_emulated.py makes and runs it.

#include "cuda.h"
#include "mbq-gemv.cuh"
#include "registers.cuh"
#include "dequantize.cuh"

#include <random>

char mbq_shared[256 << 10] __attribute__((aligned(128)));

static constexpr double SUMS   = 2e-6; // of the sum of absolute products: float32 sums of exact int8 products
static constexpr double HALVES = 4e-3; // of a step: fp16 weights within 8 steps of zero

static std::mt19937 rng(7);
static int failures = 0;

static double from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double v = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -v : v;
}

static uint16_t to_half(double v) {
    const __half h = __double2half(v);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}

// Weight i of a block, by docs/format.md
template <typename L> static double weight(const uint8_t * block, int i) {
    const int plane = i/(L::QK/4), byte = i%(L::QK/4), high = byte/(L::QK/8);
    const uint8_t * ql = block + 4, * qh = ql + L::QK/4;
    const int code = (ql[byte] >> 2*plane & 3) | (qh[byte%(L::QK/8)] >> ((2*plane + 2) % 8 + high) & 1) << 2;
    if (L::scales == 1) {
        return from_half(block[0] | block[1] << 8)*code + from_half(block[2] | block[3] << 8);
    }
    const uint16_t word = block[plane/2*2] | block[plane/2*2 + 1] << 8;
    return from_half(word >> 6 << 5)*(code - (word & 63)/8.0);
}

static double random_scale() {
    return std::uniform_real_distribution<double>(0.01, 0.02)(rng);
}

template <typename L> static std::vector<uint8_t> random_blocks(int n) {
    const int bytes = 4*L::block_words;
    std::vector<uint8_t> blocks(n*bytes + 16); // copies may reach behind the end
    for (uint8_t & byte : blocks) {
        byte = rng();
    }
    for (int i = 0; i < n; ++i) {
        const double d = random_scale();
        const uint16_t first[2] = { to_half(d), to_half(-3.3*d) };
        const uint16_t words[2] = { (uint16_t) (to_half(d) >> 5 << 6 | rng() % 64), (uint16_t) (to_half(random_scale()) >> 5 << 6 | rng() % 64) };
        memcpy(blocks.data() + i*bytes, L::scales == 1 ? first : words, 4);
    }
    return blocks;
}

// Integers up to 127 times a power of two for 32: int8 holds them exactly.
static std::vector<float> random_activations(int n) {
    std::vector<float> x(n);
    for (int i = 0; i < n; ++i) {
        x[i] = i % 32 == 5 ? 127 : (int) (rng() % 255) - 127;
    }
    for (int i = 0; i < n; i += 32) {
        const float scale = std::ldexp(1.0f, (int) (rng() % 5) - 2);
        std::for_each(x.begin() + i, x.begin() + i + 32, [&](float & v) { v *= scale; });
    }
    return x;
}

static void check(bool good, const char * what, int QK, int words, int columns, int rows, int k) {
    failures += !good;
    if (!good) {
        printf("%s: QK %d, %d scale words, %d columns, %d rows of %d\n", what, QK, words, columns, rows, k);
    }
}

// Columns of x [columns][k] times `rows` rows of w, as the kernel of up to 8*NT columns (NT = 0: of one) gives them; with a gate both go through SwiGLU.
template <typename L, int NT>
static std::vector<float> product(const std::vector<uint8_t> & w, const uint8_t * gate, const std::vector<float> & x, int rows, int k, int columns) {
    const int row_bytes = k/L::QK*4*L::block_words;
    std::vector<char> records((k + 127)/128*NT*mbq_record<L>::bytes, 0x55);
    std::vector<float> dst(rows*columns, NAN);
    const bool aligned = row_bytes % 16 == 0;
    mbq_mmv_args args = {};
    args.w = (const char *) w.data();
    args.gate = (const char *) gate;
    args.x = NT == 0 ? (const void *) x.data() : records.data();
    args.dst = dst.data();
    args.M = args.dst_column = rows;
    args.row_bytes = row_bytes;
    args.blocks = k/L::QK;
    args.N = columns;
    args.channel_ratio = args.sample_ratio = 1;
    args.stage_row = mbq_stage_row<L>(aligned);
    args.glu_op = GGML_GLU_OP_SWIGLU;
    if (NT > 0) {
        launch({ (k + 255u)/256, NT, 1 }, { 256, 1, 1 }, [&]() { mbq_quantize_records<L>(x.data(), records.data(), k, columns, k, 0, 0, 1, 0); });
    }
    const int64_t room = NT == 1 ? 64 << 10 : sizeof(mbq_shared); // fewer warps than for one column
    const mbq_mmv_plan plan = mbq_plan_mmv<L>(NT, gate, aligned, rows, args.blocks, 3, room);
    args.slots = plan.slots;
    memset(mbq_shared, 0x7F, sizeof(mbq_shared));
    launch({ (unsigned) plan.ctas, 1, 1 }, { 32u*plan.kw, (unsigned) plan.groups, 1 }, [&]() { mbq_mmv<L, NT, false>(args, {}); });
    return dst;
}

template <typename L, int NT> static void check_product(int rows, int k, int columns) {
    const std::vector<uint8_t> w = random_blocks<L>(rows*(k/L::QK));
    const std::vector<float> x = random_activations(columns*k);
    const std::vector<float> dst = product<L, NT>(w, nullptr, x, rows, k, columns);
    bool good = true;
    for (int i = 0; i < rows*columns; ++i) {
        double sum = 0, size = 0;
        for (int j = 0; j < k; ++j) {
            const double product = weight<L>(w.data() + (i%rows*(k/L::QK) + j/L::QK)*4*L::block_words, j%L::QK)*x[i/rows*k + j];
            sum  += product;
            size += std::fabs(product);
        }
        good = good && std::fabs(dst[i] - sum) <= SUMS*size; // not for NaN
    }
    check(good, "product", L::QK, L::scales, columns, rows, k);
}

// Each of up to 8 columns, whose activations are anything, has the bits that it has alone, and so has a gated unit of one.
template <typename L> static void check_columns(int rows, int k, int columns) {
    const std::vector<uint8_t> w = random_blocks<L>(rows*(k/L::QK)), gate = random_blocks<L>(rows*(k/L::QK));
    std::vector<float> x(columns*k);
    std::normal_distribution<float> normal;
    std::generate(x.begin(), x.end(), [&]() { return normal(rng); });
    const std::vector<float> many = product<L, 1>(w, nullptr, x, rows, k, columns), gates = product<L, 1>(gate, nullptr, x, rows, k, columns);
    bool good = true, same = true;
    for (int c = 0; c < columns; ++c) {
        const std::vector<float> column(x.begin() + c*k, x.begin() + (c + 1)*k);
        const std::vector<float> one = product<L, 0>(w, nullptr, column, rows, k, 1), unit = product<L, 0>(w, gate.data(), column, rows, k, 1);
        good = good && !memcmp(one.data(), many.data() + c*rows, 4*rows);
        for (int i = 0; i < rows; ++i) {
            same = same && unit[i] == ggml_cuda_op_silu_single(gates[c*rows + i])*many[c*rows + i];
        }
    }
    check(good, "column of several", L::QK, L::scales, columns, rows, k);
    check(same, "gated unit", L::QK, L::scales, columns, rows, k);
}

// wgmma's A operand for 128 weights of a row: in each 16, lane t has weights 4t + 0, 4t + 2, then 4t + 1, 4t + 3.
template <typename L> static void check_registers() {
    const std::vector<uint8_t> w = random_blocks<L>(128/L::QK);
    emulated_shared = w.data();
    bool good = true;
    for (int i = 0; i < 128; ++i) {
        const int row = i % 2; // registers of the one row and of the other
        half2 a[2][4][4];
        const auto words = mbq_load_words<L::QK>(0, i % 16/4);
        mbq_dequantize_64<L, 0>(words, row, a[0]);
        mbq_dequantize_64<L, 1>(words, row, a[1]);
        const float2 pair = __half22float2(a[i/64][i % 64/16][row + i % 2*2]);
        const double exact = weight<L>(w.data() + i/L::QK*4*L::block_words, i % L::QK);
        good = good && std::fabs((i % 4/2 ? pair.y : pair.x) - exact) <= HALVES*0.02;
    }
    check(good, "registers", L::QK, L::scales, 0, 1, 128);
}

template <typename L> static void check_dequantized() {
    const std::vector<uint8_t> w = random_blocks<L>(1);
    bool good = true;
    for (int i = 0; i < L::QK; ++i) {
        const float4 v = mbq_dequantize_4<L>((const uint32_t *) w.data(), i/4);
        good = good && std::fabs((&v.x)[i % 4] - weight<L>(w.data(), i)) <= (L::scales == 1 ? 1e-7 : 0); // d*(code - z/8) is exact
    }
    check(good, "dequantised", L::QK, L::scales, 0, 1, L::QK);
}

template <typename L> static void check_type() {
    for (const int k : { L::QK, 512, 2048 + L::QK }) {
        for (const int rows : { 1, 40 }) {
            check_product<L, 0>(rows, k, 1);
            check_product<L, 1>(rows, k, 5);
        }
        check_product<L, 1>(17, k, 8);
        check_product<L, 2>(17, k, 13);
        check_product<L, 4>(17, k, 32);
        check_columns<L>(19, k, 3);
    }
    check_columns<L>(50, 1536 + L::QK, 2);
    check_columns<L>(9, 2048 + 3*L::QK, 8);
    for (int i = 0; i < 50; ++i) {
        check_registers<L>();
        check_dequantized<L>();
    }
}

int main() {
    check_type<mbq_layout<128, 1>>();
    check_type<mbq_layout<64, 1>>();
    check_type<mbq_layout<128, 2>>();
    check_type<mbq_layout<64, 2>>();
    return failures > 0;
}
