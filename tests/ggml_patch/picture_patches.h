#pragma once

// A picture's patches (ggml/include/ggml-patches.h) by a backend, bit for bit those of upstream's way: planes of floats, and for each patch a plane a channel of them.

#include "expect.h"
#include "ggml-patches.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
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

static void check(ggml_backend_t backend, const shape & s, ggml_type from, ggml_type to) {
    ggml_context_ptr ctx(ggml_init({ 1u << 20, nullptr, true }));
    ggml_tensor * pixels  = ggml_new_tensor_4d(ctx.get(), from, 3, s.width, s.height, s.pictures);
    ggml_tensor * patches = ggml_patches(ctx.get(), pixels, to, s.size, s.merge, MEAN, STD);
    expect(ggml_is_patches(patches) && !ggml_is_patches(pixels), "the operation is told from others");
    expect(ggml_backend_supports_op(backend, patches), "the backend runs it");
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, patches);
    ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    std::vector<uint8_t> bytes(ggml_nelements(pixels));
    std::vector<float> floats(bytes.size());
    for (size_t i = 0; i < bytes.size(); i++) {
        bytes[i]  = byte_of(i);
        floats[i] = float_of(i);
    }
    ggml_backend_tensor_set(pixels, from == GGML_TYPE_I8 ? (const void *) bytes.data() : floats.data(), 0, ggml_nbytes(pixels));
    expect(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS, "it computes");
    const int n = s.width/s.size*(s.height/s.size), length = 3*s.size*s.size;
    expect(patches->ne[0] == length && patches->ne[1] == n && patches->ne[2] == s.pictures, "a row for each patch");
    std::vector<uint8_t> out(ggml_nbytes(patches));
    ggml_backend_tensor_get(patches, out.data(), 0, out.size());
    int wrong = 0;
    for (size_t i = 0; i < (size_t) ggml_nelements(patches); i++) {
        const float value = expected(s, i/length/n, i/length%n, i%length);
        wrong += to == GGML_TYPE_F16 ? ((const ggml_fp16_t *) out.data())[i] != ggml_fp32_to_fp16(value) : ((const float *) out.data())[i] != value;
    }
    expect(wrong == 0, "each number is the one of its place");
}

static void check_all(ggml_backend_t backend) {
    for (const shape & s : { shape{ 28, 28, 1, 14, 2 }, shape{ 84, 56, 2, 14, 2 }, shape{ 48, 80, 1, 16, 1 }, shape{ 42, 14, 3, 14, 1 } }) {
        check(backend, s, GGML_TYPE_I8, GGML_TYPE_F16);
        check(backend, s, GGML_TYPE_I8, GGML_TYPE_F32);
        check(backend, s, GGML_TYPE_F32, GGML_TYPE_F16);
    }
}
