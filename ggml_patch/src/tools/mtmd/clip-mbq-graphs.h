#pragma once

// Reuses a tower's graph: it stays built, split and allocated while pictures have the same shape. Upstream builds one for each picture, which takes 0.5 ms of a core
// for Qwen2-VL's. If shapes alternate, each of the last four has its nodes at separate addresses, because ggml-cuda identifies its CUDA graphs by these.
// Included by clip-impl.h (clip-mbq-pixels.h).

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-patches.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// what determines the graph; without entries it matches no graph
struct clip_mbq_shape {
    int nx = 0, ny = 0; // pixels of each entry
    size_t n_entries = 0;
    bool pictures = false; // as in clip_image_f32_batch
    bool bytes    = false; // whether all entries have them, see clip_mbq_pixels

    bool operator==(const clip_mbq_shape & other) const {
        return nx == other.nx && ny == other.ny && n_entries == other.n_entries && pictures == other.pictures && bytes == other.bytes;
    }
};

// memory for the nodes of one shape's graph
struct clip_mbq_nodes {
    clip_mbq_shape       shape;
    std::vector<uint8_t> meta;
};

// the reusable graph of a clip_ctx
struct clip_mbq_kept_graph {
    ggml_cgraph *  gf = nullptr; // in its buf_compute_meta; nullptr if the next picture needs another one
    clip_mbq_shape shape;        // the shape that this memory belongs to
    std::vector<clip_mbq_nodes> others; // of other shapes, most recently used first
    ggml_backend_buffer_ptr staging;    // page-locked memory for pixels that lie elsewhere

    static constexpr size_t most = 3; // others, of 3 MB each

    // switches `meta` to the memory of another shape
    void move_to(const clip_mbq_shape & other, std::vector<uint8_t> & meta) {
        if (other == shape) {
            return;
        }
        auto at = std::find_if(others.begin(), others.end(), [&](const clip_mbq_nodes & p) { return p.shape == other; });
        if (at == others.end() && others.size() < most) {
            at = others.insert(at, { other, std::vector<uint8_t>(meta.size()) });
        } else if (at == others.end()) {
            --at; // the least recently used one
        }
        std::swap(at->meta, meta);
        at->shape = shape;
        shape     = other;
        std::rotate(others.begin(), at, at + 1);
    }
};

template <typename B>
static bool clip_mbq_all_bytes(const B & imgs) {
    return std::all_of(imgs.entries.begin(), imgs.entries.end(), [](const auto & img) { return img.pixels().bytes() != nullptr; });
}

// whether a backend has a kernel for ggml_patches: it supports this custom operation and no other. The RPC and virtgpu backends claim to support every operation.
static bool clip_mbq_has_patches(ggml_backend_t backend, const ggml_tensor * patches) {
    ggml_tensor other = *patches;
    memset(other.op_params, 0, sizeof(other.op_params));
    return ggml_backend_supports_op(backend, patches) && !ggml_backend_supports_op(backend, &other);
}

// Assigns the inputs of a graph with ggml_patches to a backend. If the GPU has a kernel for it, inputs are written straight to its memory (clip_mbq_set_pixels):
// the scheduler would copy each from the host and wait for it. Otherwise the operation stays on the CPU, because it holds a pointer.
template <typename C>
static void clip_mbq_place_inputs(C & ctx, ggml_cgraph * gf) {
    ggml_tensor * patches = ggml_graph_get_tensor(gf, "patches"); // LLaVA's graph has an input of this name
    if (!patches || !ggml_is_patches(patches) || ctx.backend == ctx.backend_cpu) {
        return;
    }
    if (!clip_mbq_has_patches(ctx.backend, patches)) {
        ggml_backend_sched_set_tensor_backend(ctx.sched.get(), patches, ctx.backend_cpu);
        return;
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        for (ggml_tensor * src : ggml_graph_node(gf, i)->src) {
            if (src && src->flags & GGML_TENSOR_FLAG_INPUT) {
                ggml_backend_sched_set_tensor_backend(ctx.sched.get(), src, ctx.backend);
            }
        }
    }
}

// the graph for these entries, split and allocated; nullptr on failure. `build` builds one in ctx.buf_compute_meta. C is clip_ctx, B clip_image_f32_batch.
template <typename C, typename B, typename F>
static ggml_cgraph * clip_mbq_graph(C & ctx, const B & imgs, const F & build) {
    const auto & first = imgs.entries[0];
    const clip_mbq_shape shape = { first.nx(), first.ny(), imgs.entries.size(), imgs.pictures, clip_mbq_all_bytes(imgs) };
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
    clip_mbq_place_inputs(ctx, gf);
    if (!ggml_backend_sched_alloc_graph(ctx.sched.get(), gf)) {
        return nullptr;
    }
    ctx.kept.gf = plain ? gf : nullptr;
    return gf;
}
