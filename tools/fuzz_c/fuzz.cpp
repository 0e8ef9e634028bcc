// Random and mutated rows for every kernel of the patch that the CPU runs, under sanitizers: nothing may be read or written outside a
// tensor, no conversion or shift be undefined, whatever the bytes; and a product is the same bits however its columns are cut.
//
//   fuzz [rows a kernel = 100000] [seed = 1] [part of a kernel's name]
//
// Exit status 1 where a product differs or a NaN is not found; the sanitizers end the program themselves.
//
// stdout has a line for each kernel; stderr is full of what ggml says of blocks that are not valid.

#include "fuzz.h"

#include "ggml-cpu.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

void make_floats(rng_t & rng, float * x, size_t n) {
    static const float SPECIAL[] = { NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-45f, -1e-45f, 65504.0f, 65536.0f, 1e-8f };
    std::normal_distribution<float> normal(0.0f, std::exp2((float) between(rng, -20, 10)));
    const int64_t kind  = between(rng, 0, 9);
    const int64_t every = between(rng, 1, 64);
    for (size_t i = 0; i < n; ++i) {
        if (kind == 0) {
            const uint32_t bits = (uint32_t) rng();
            memcpy(x + i, &bits, 4);
        } else if (kind == 1 && i > 0) {
            x[i] = x[0];
        } else if (kind < 6 && between(rng, 0, every) == 0) {
            x[i] = SPECIAL[between(rng, 0, sizeof(SPECIAL)/sizeof(*SPECIAL) - 1)];
        } else {
            x[i] = normal(rng);
        }
    }
}

void make_blocks(rng_t & rng, enum ggml_type type, uint8_t * rows, int64_t n_rows, int64_t k) {
    static const uint16_t WORDS[] = { 0x0000, 0x8000, 0x0001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0xF7FF, 0xF7C0 };
    const size_t size = n_rows*ggml_row_size(type, k);
    if (between(rng, 0, 3) == 0) {
        for (size_t i = 0; i < size; ++i) {
            rows[i] = (uint8_t) rng();
        }
        return;
    }
    std::vector<float> x(n_rows*k);
    make_floats(rng, x.data(), x.size());
    ggml_quantize_chunk(type, x.data(), rows, 0, n_rows, k, nullptr);
    const int64_t changes = between(rng, 0, 2) == 0 ? 0 : between(rng, 1, 20);
    for (int64_t i = 0; i < changes; ++i) {
        if (between(rng, 0, 1) == 0) {
            rows[between(rng, 0, size - 1)] ^= 1 << between(rng, 0, 7);
        } else { // the numbers that a block begins with
            const size_t block = between(rng, 0, size/ggml_type_size(type) - 1)*ggml_type_size(type);
            memcpy(rows + block + 2*between(rng, 0, 1), &WORDS[between(rng, 0, sizeof(WORDS)/sizeof(*WORDS) - 1)], 2);
        }
    }
}

int main(int argc, char ** argv) {
    const int64_t  rows = argc > 1 ? atoll(argv[1]) : 100000;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
    ggml_cpu_init(); // tables of fp16
    for (const kernel & k : all_kernels()) {
        if (argc > 3 && k.name.find(argv[3]) == std::string::npos) {
            continue;
        }
        rng_t rng(seed);
        int64_t done = 0;
        while (done < rows) {
            const int64_t n = k.feed(rng, k.type);
            if (n < 0) {
                printf("%s: wrong after %lld rows with seed %llu\n", k.name.c_str(), (long long) done, (unsigned long long) seed);
                return 1;
            }
            done += n;
        }
        printf("%s %lld\n", k.name.c_str(), (long long) done);
        fflush(stdout);
    }
    return 0;
}
