#pragma once

// A tower's graph for more than one picture: it stays, built, split and allocated, while pictures keep its shape. Upstream makes one for each, which takes 0.5 ms of a
// core for Qwen2-VL's. Included by clip-impl.h (clip-mbq-pixels.h).

#include "ggml-backend.h"

#include <algorithm>
#include <cstddef>

// what decides the graph of pictures without marks
struct clip_mbq_shape {
    int nx = 0, ny = 0; // pixels of each entry
    size_t n_entries = 0;
    bool pictures = false; // as clip_image_f32_batch has it

    bool operator==(const clip_mbq_shape & other) const {
        return nx == other.nx && ny == other.ny && n_entries == other.n_entries && pictures == other.pictures;
    }
};

// of one clip_ctx: the graph in its buf_compute_meta; nullptr where the next picture needs another
struct clip_mbq_kept_graph {
    ggml_cgraph *  gf = nullptr;
    clip_mbq_shape shape;
};

// the graph of these entries, split and allocated; nullptr if it cannot be. `build` makes one in ctx.buf_compute_meta. C is clip_ctx, B clip_image_f32_batch.
template <typename C, typename B, typename F>
static ggml_cgraph * clip_mbq_graph(C & ctx, const B & imgs, const F & build) {
    const auto & first = imgs.entries[0];
    const clip_mbq_shape shape = { first.nx(), first.ny(), imgs.entries.size(), imgs.pictures };
    const bool plain = !imgs.is_audio && std::all_of(imgs.entries.begin(), imgs.entries.end(), [&](const auto & img) {
        return img.nx() == shape.nx && img.ny() == shape.ny && !img.add_viewsep && !img.add_newline && img.lead_pad == 0 && !img.anyres.is_tiled();
    });
    if (plain && ctx.kept.gf && ctx.kept.shape == shape) {
        return ctx.kept.gf;
    }
    ctx.kept.gf = nullptr;
    ggml_backend_sched_reset(ctx.sched.get());
    ggml_cgraph * gf = build();
    if (!ggml_backend_sched_alloc_graph(ctx.sched.get(), gf)) {
        return nullptr;
    }
    if (plain) {
        ctx.kept = { gf, shape };
    }
    return gf;
}
