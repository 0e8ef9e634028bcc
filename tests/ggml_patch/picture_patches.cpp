// A picture's patches (ggml/include/ggml-patches.h) on the CPU, bit for bit those of upstream's way: planes of floats, and for each patch a plane a channel of them.
// Run by test_tower_memory.py; ends with 1 where something is wrong.

#include "expect.h"
#include "ggml-patches.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <cstdint>
#include <utility>
#include <vector>

static constexpr float MEAN[3] = { 0.48145466f, 0.4578275f, 0.40821073f }, STD[3] = { 0.26862954f, 0.26130258f, 0.27577711f };

struct shape {
    int width, height, pictures, size, merge;
};

static uint8_t byte_of(size_t i) {
    return (uint32_t) (i*2654435761u) >> 24;
}

static float float_of(size_t i) {
    const float value = (float) byte_of(i) / 255.0f;
    return (value - MEAN[i%3]) / STD[i%3];
}

// what element k of patch i of a picture is
static float expected(const shape & s, int picture, int i, int k) {
    const int across = s.width/s.size, groups = across/s.merge, group = i/(s.merge*s.merge), inside = i%(s.merge*s.merge);
    const int c = k/(s.size*s.size), row = k/s.size%s.size, column = k%s.size;
    const int y = (group/groups*s.merge + inside/s.merge)*s.size + row, x = (group%groups*s.merge + inside%s.merge)*s.size + column;
    return float_of((((size_t) picture*s.height + y)*s.width + x)*3 + c);
}

static float at(const ggml_tensor * t, size_t i) {
    return t->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(((const ggml_fp16_t *) t->data)[i]) : ((const float *) t->data)[i];
}

static void check(const shape & s, ggml_type from, ggml_type to, int threads) {
    ggml_context_ptr ctx(ggml_init({ 64u << 20, nullptr, false }));
    ggml_tensor * pixels = ggml_new_tensor_4d(ctx.get(), from, 3, s.width, s.height, s.pictures);
    for (size_t i = 0; i < (size_t) ggml_nelements(pixels); i++) {
        if (from == GGML_TYPE_I8) {
            ((uint8_t *) pixels->data)[i] = byte_of(i);
        } else {
            ((float *) pixels->data)[i] = float_of(i);
        }
    }
    ggml_tensor * patches = ggml_patches(ctx.get(), pixels, to, s.size, s.merge, MEAN, STD);
    expect(ggml_is_patches(patches) && !ggml_is_patches(pixels), "the operation is told from others");
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, patches);
    expect(ggml_graph_compute_with_ctx(ctx.get(), gf, threads) == GGML_STATUS_SUCCESS, "it computes");
    const int n = s.width/s.size*(s.height/s.size), length = 3*s.size*s.size;
    expect(patches->ne[0] == length && patches->ne[1] == n && patches->ne[2] == s.pictures, "a row for each patch");
    int wrong = 0;
    for (int p = 0; p < s.pictures; p++) {
        for (int i = 0; i < n; i++) {
            for (int k = 0; k < length; k++) {
                const float value = expected(s, p, i, k);
                wrong += at(patches, ((size_t) p*n + i)*length + k) != (to == GGML_TYPE_F16 ? ggml_fp16_to_fp32(ggml_fp32_to_fp16(value)) : value);
            }
        }
    }
    expect(wrong == 0, "each number is the one of its place");
}

int main() {
    for (const shape & s : { shape{ 28, 28, 1, 14, 2 }, shape{ 84, 56, 2, 14, 2 }, shape{ 48, 80, 1, 16, 1 }, shape{ 42, 14, 3, 14, 1 } }) {
        for (const auto & types : { std::pair{ GGML_TYPE_I8, GGML_TYPE_F16 }, std::pair{ GGML_TYPE_I8, GGML_TYPE_F32 }, std::pair{ GGML_TYPE_F32, GGML_TYPE_F16 } }) {
            check(s, types.first, types.second, 1);
            check(s, types.first, types.second, 3);
        }
    }
    return failures > 0;
}
