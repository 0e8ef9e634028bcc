#pragma once

// What fuzz.cpp makes up and kernels.cpp feeds to the kernels.

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

using rng_t = std::mt19937_64;

inline int64_t between(rng_t & rng, int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

// Bytes on the heap, not one more than asked for, so that the sanitizer sees the first one behind.
struct exact {
    explicit exact(size_t n) : size(n), data(new uint8_t[n]) {}
    float * floats() { return (float *) data.get(); }
    size_t size;
    std::unique_ptr<uint8_t[]> data;
};

// Floats: numbers as weights have, with some that are not finite, denormal, huge or zero among them, or any bits at all.
void make_floats(rng_t & rng, float * x, size_t n);

// Rows of blocks: quantised from such floats and then changed, or any bytes at all.
void make_blocks(rng_t & rng, enum ggml_type type, uint8_t * rows, int64_t n_rows, int64_t k);

// One kernel; a call feeds it some rows and returns how many, or -1 after having said what is wrong.
struct kernel {
    std::string name;
    int64_t (*feed)(rng_t & rng, enum ggml_type type);
    enum ggml_type type;
};

std::vector<kernel> all_kernels();

int64_t feed_attention(rng_t & rng, enum ggml_type type); // of the cache
