#pragma once

// A tower's graph for more than one picture: it stays, built, split and allocated, while pictures keep its shape. Upstream makes one for each, which takes 0.5 ms of a
// core for Qwen2-VL's. Where shapes change, each of the last four has its nodes at addresses of its own, since ggml-cuda knows the CUDA graph it has of them by these.
// Included by clip-impl.h (clip-mbq-pixels.h).

#include "ggml-backend.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

// what decides the graph of pictures without marks; no entries: another graph
struct clip_mbq_shape {
    int nx = 0, ny = 0; // pixels of each entry
    size_t n_entries = 0;
    bool pictures = false; // as clip_image_f32_batch has it

    bool operator==(const clip_mbq_shape & other) const {
        return nx == other.nx && ny == other.ny && n_entries == other.n_entries && pictures == other.pictures;
    }
};

// memory for the nodes of a shape's graph
struct clip_mbq_nodes {
    clip_mbq_shape       shape;
    std::vector<uint8_t> meta;
};

// of one clip_ctx
struct clip_mbq_kept_graph {
    ggml_cgraph *  gf = nullptr; // in its buf_compute_meta; nullptr where the next picture needs another
    clip_mbq_shape shape;        // whose place that is
    std::vector<clip_mbq_nodes> others; // of other shapes, the last used first

    static constexpr size_t most = 3; // others, of 3 MB each

    // gives `meta` the place of another shape
    void move_to(const clip_mbq_shape & other, std::vector<uint8_t> & meta) {
        if (other == shape) {
            return;
        }
        auto at = std::find_if(others.begin(), others.end(), [&](const clip_mbq_nodes & p) { return p.shape == other; });
        if (at == others.end() && others.size() < most) {
            at = others.insert(at, { other, std::vector<uint8_t>(meta.size()) });
        } else if (at == others.end()) {
            --at; // the one that was not used for longest
        }
        std::swap(at->meta, meta);
        at->shape = shape;
        shape     = other;
        std::rotate(others.begin(), at, at + 1);
    }
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
    ctx.kept.move_to(plain ? shape : clip_mbq_shape(), ctx.buf_compute_meta);
    ggml_backend_sched_reset(ctx.sched.get());
    ggml_cgraph * gf = build();
    if (!ggml_backend_sched_alloc_graph(ctx.sched.get(), gf)) {
        return nullptr;
    }
    ctx.kept.gf = plain ? gf : nullptr;
    return gf;
}
