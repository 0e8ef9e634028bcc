// Which pictures find the graph of the last (tools/mtmd/clip-mbq-graphs.h), with ggml's scheduler, on the CPU. Run by test_tower_memory.py; ends with 1 where
// something is wrong.

#include "expect.h"
#include "clip-mbq-graphs.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstdint>
#include <vector>

// what clip_mbq_graph() reads of clip_ctx, clip_image_f32 and clip_image_f32_batch
struct picture {
    int width, height;
    bool add_viewsep = false, add_newline = false;
    int lead_pad = 0;
    struct grid { bool tiled = false; bool is_tiled() const { return tiled; } } anyres = {};
    struct colours { uint8_t byte; const uint8_t * bytes() const { return byte ? &byte : nullptr; } } colour = { 1 };

    const colours & pixels() const { return colour; }
    int nx() const { return width; }
    int ny() const { return height; }
};

struct batch {
    std::vector<picture> entries;
    bool is_audio = false, pictures = false;
};

struct context {
    std::vector<uint8_t> buf_compute_meta = std::vector<uint8_t>(16*ggml_tensor_overhead() + ggml_graph_overhead());
    clip_mbq_kept_graph kept;
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    ggml_backend_t backend = cpu.get(), backend_cpu = cpu.get();
    ggml_backend_sched_ptr sched;

    context() {
        sched.reset(ggml_backend_sched_new(&backend, nullptr, 1, 64, false, true));
    }
};

static int n_built = 0;

// twice each number of a picture
static ggml_cgraph * graph_of(context & ctx, const batch & imgs) {
    return clip_mbq_graph(ctx, imgs, [&] {
        n_built++;
        ggml_context_ptr ggml(ggml_init({ ctx.buf_compute_meta.size(), ctx.buf_compute_meta.data(), true }));
        ggml_tensor * in = ggml_new_tensor_2d(ggml.get(), GGML_TYPE_F32, imgs.entries[0].nx(), imgs.entries[0].ny());
        ggml_set_input(in);
        ggml_set_name(in, "in");
        ggml_cgraph * gf = ggml_new_graph(ggml.get());
        ggml_build_forward_expand(gf, ggml_scale(ggml.get(), in, 2.0f));
        return gf;
    });
}

// computes, with other numbers each time
static void pass(context & ctx, const batch & imgs) {
    static float start = 0.0f;
    ggml_cgraph * gf = graph_of(ctx, imgs);
    std::vector<float> in((size_t) imgs.entries[0].nx()*imgs.entries[0].ny()), out(in.size());
    for (float & x : in) {
        x = start += 1.0f;
    }
    ggml_backend_tensor_set(ggml_graph_get_tensor(gf, "in"), in.data(), 0, in.size()*sizeof(float));
    expect(ggml_backend_sched_graph_compute(ctx.sched.get(), gf) == GGML_STATUS_SUCCESS, "it computes");
    ggml_backend_tensor_get(ggml_graph_node(gf, -1), out.data(), 0, out.size()*sizeof(float));
    for (size_t i = 0; i < in.size(); i++) {
        expect(out[i] == 2.0f*in[i], "each picture's own numbers");
    }
}

static int built(context & ctx, const batch & imgs) {
    const int before = n_built;
    pass(ctx, imgs);
    return n_built - before;
}

// where inputs and the operation of ggml-patches.h run beside a backend that supports every custom operation, as RPC's claims to: another one of the CPU
static void places() {
    ggml_backend_ptr other(ggml_backend_cpu_init()), cpu(ggml_backend_cpu_init());
    ggml_backend_t backends[2] = { other.get(), cpu.get() };
    alignas(64) uint8_t bytes[64];
    ggml_backend_buffer_ptr mapped(ggml_backend_cpu_buffer_from_ptr(bytes, sizeof(bytes))); // for a type of memory that is not the CPU's usual one
    ggml_backend_buffer_type_t bufts[2] = { ggml_backend_buffer_get_type(mapped.get()), ggml_backend_cpu_buffer_type() };
    context ctx;
    ctx.backend = other.get();
    ctx.backend_cpu = cpu.get();
    ctx.sched.reset(ggml_backend_sched_new(backends, bufts, 2, 64, false, true));
    const float mean[3] = { 0, 0, 0 }, std[3] = { 1, 1, 1 };
    for (const bool ours : { true, false }) {
        ggml_context_ptr ggml(ggml_init({ ctx.buf_compute_meta.size(), ctx.buf_compute_meta.data(), true }));
        ggml_tensor * in = ggml_new_tensor_3d(ggml.get(), GGML_TYPE_F32, 3, 4, 4);
        ggml_set_input(in);
        ggml_tensor * out = ours ? ggml_patches(ggml.get(), in, GGML_TYPE_F32, 2, 1, mean, std) : ggml_scale(ggml.get(), in, 2.0f);
        ggml_set_name(ours ? out : in, "patches");
        ggml_cgraph * gf = ggml_new_graph(ggml.get());
        ggml_build_forward_expand(gf, out);
        ggml_backend_sched_reset(ctx.sched.get());
        clip_mbq_place_inputs(ctx, gf);
        expect(ggml_backend_sched_alloc_graph(ctx.sched.get(), gf), "it is allocated");
        expect(ggml_backend_sched_get_tensor_backend(ctx.sched.get(), in) == ctx.backend_cpu, "inputs stay on the CPU");
        expect(!ours || ggml_backend_sched_get_tensor_backend(ctx.sched.get(), out) == ctx.backend_cpu, "and the operation with its pointer");
        expect(ggml_backend_sched_graph_compute(ctx.sched.get(), gf) == GGML_STATUS_SUCCESS, "it computes");
    }
}

int main() {
    places();
    context ctx;
    const batch small{ { { 4, 4 } } }, large{ { { 8, 8 } } };

    expect(built(ctx, small) == 1 && built(ctx, small) == 0 && built(ctx, small) == 0, "a graph stays for the same size");
    const batch two{ { { 4, 4 }, { 4, 4 } } };
    batch joined = two;
    joined.pictures = true;
    batch floats = small;
    floats.entries[0].colour.byte = 0;
    for (const batch & other : { large, batch{ { { 4, 8 } } }, two, joined, floats }) {
        expect(built(ctx, other) == 1 && built(ctx, other) == 0, "another shape has another graph");
    }

    batch marked[5] = { small, small, small, small, small };
    marked[0].entries[0].add_viewsep = true;
    marked[1].entries[0].add_newline = true;
    marked[2].entries[0].lead_pad = 1;
    marked[3].entries[0].anyres.tiled = true;
    marked[4].is_audio = true;
    pass(ctx, small);
    for (const batch & other : marked) {
        expect(built(ctx, other) == 1 && built(ctx, other) == 1, "what has marks, and sounds, each have their own");
        expect(built(ctx, small) == 1, "and leave nothing for others");
    }
    const batch turns[] = { { { { 4, 4 } } }, { { { 4, 5 } } }, { { { 4, 6 } } }, { { { 4, 7 } } }, { { { 4, 8 } } } };
    const void * nodes[5];
    for (int i = 0; i < 4; i++) {
        nodes[i] = ggml_graph_node(graph_of(ctx, turns[i]), 0);
        expect(std::find(nodes, nodes + i, nodes[i]) == nodes + i, "each of four shapes has its nodes where no other has");
    }
    for (int i : { 3, 0, 1, 2, 0 }) {
        expect(ggml_graph_node(graph_of(ctx, turns[i]), 0) == nodes[i], "and has them there again");
    }
    expect(ggml_graph_node(graph_of(ctx, turns[4]), 0) == nodes[3], "a fifth takes the place of the one that was not used for longest");
    for (const batch & other : turns) {
        pass(ctx, other);
    }

    expect(built(ctx, batch{ { { 4, 4 }, { 8, 8 } } }) == 1 && built(ctx, batch{ { { 4, 4 }, { 8, 8 } } }) == 1, "nor have entries of two sizes");
    return failures > 0;
}
