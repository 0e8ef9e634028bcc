#pragma once

// Several pictures of one size in one pass of the tower, for towers whose upstream graph accepts one: those of Qwen2-VL and Qwen2.5-VL (where a batch is the
// two frames of a video), Idefics3 and SmolVLM. The operations are the same. Pictures are consecutive columns of each product, and a separate dimension
// in attention, as in clip_graph::build_vit. Qwen's graph reads bytes (ggml-patches.h), so single pictures use it too.
//
// Included by clip.cpp (clip-mbq.h) before clip_get_graph_builder(). clip-mbq-join.h decides which pictures may be joined.

#include "clip-graph.h"
#include "clip-mbq-anyres.h" // the graph of another family
#include "ggml-at-once.h"
#include "models/models.h"

#include <vector>

struct clip_graph_mbq_qwen : clip_graph_qwen2vl {
    using clip_graph_qwen2vl::clip_graph_qwen2vl;

    ggml_tensor * input_i32(const char * name, const int64_t n) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n);
        ggml_set_name(t, name);
        ggml_set_input(t);
        return t;
    }

    // reorders groups of four patches, which are rows of cur, within each picture
    ggml_tensor * reorder(ggml_tensor * cur, const char * name) {
        const int64_t n_groups = n_patches/4;
        ggml_tensor * rows = ggml_repeat_4d(ctx0, input_i32(name, n_groups), n_groups, n_batch, 1, 1);
        return ggml_get_rows(ctx0, ggml_reshape_3d(ctx0, cur, ggml_nelements(cur)/(n_groups*n_batch), n_groups, n_batch), rows);
    }

    // patch embeddings; the four patches of a token are consecutive
    ggml_tensor * patches() {
        ggml_tensor * pixels = ggml_new_tensor_4d(ctx0, clip_mbq_all_bytes(*img_batch) ? GGML_TYPE_I8 : GGML_TYPE_F32, 3, img.nx(), img.ny(), n_batch);
        ggml_set_name(pixels, "inp_pixels");
        ggml_set_input(pixels);
        const bool f16 = model.patch_embeddings_0->type == GGML_TYPE_F16 && model.patch_embeddings_1->type == GGML_TYPE_F16;
        ggml_tensor * rows = ggml_patches(ctx0, pixels, f16 ? GGML_TYPE_F16 : GGML_TYPE_F32, patch_size, 2, hparams.image_mean, hparams.image_std);
        ggml_set_name(rows, "patches");
        rows = ggml_reshape_2d(ctx0, rows, rows->ne[0], n_patches*n_batch);
        const auto product = [&](ggml_tensor * w) { return ggml_mul_mat(ctx0, ggml_reshape_2d(ctx0, w, rows->ne[0], n_embd), rows); };
        return ggml_reshape_3d(ctx0, ggml_add(ctx0, product(model.patch_embeddings_0), product(model.patch_embeddings_1)), n_embd, n_patches, n_batch);
    }

    ggml_cgraph * build() override {
        const int  n_wa    = hparams.n_wa_pattern; // every n-th layer's attention is global, the others' is within windows; 0: there are none
        ggml_tensor * cur = patches();
        ggml_tensor * positions = input_i32("positions", n_patches*4);
        build_vit_opts opts;
        if (n_wa > 0) {
            ggml_tensor * mask = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, n_patches, n_patches);
            ggml_set_name(mask, "window_mask");
            ggml_set_input(mask);
            if (flash_attn_type == CLIP_FLASH_ATTN_TYPE_ENABLED) {
                mask = ggml_cast(ctx0, mask, GGML_TYPE_F16);
            }
            for (int il = 0; il < n_layer; il++) {
                opts.attn_mask_layers.push_back((il + 1) % n_wa == 0 ? nullptr : mask);
            }
            cur = ggml_reshape_3d(ctx0, reorder(cur, "inv_window_idx"), n_embd, n_patches, n_batch);
        }
        const auto rope = [&](ggml_tensor * x, const clip_layer &) {
            int sections[4] = { d_head/4, d_head/4, d_head/4, d_head/4 };
            return ggml_rope_multi(ctx0, x, positions, nullptr, d_head/2, sections, GGML_ROPE_TYPE_VISION, 32768, 10000, 1, 0, 1, 32, 1);
        };
        const norm_type norm = proj_type == PROJECTOR_TYPE_QWEN25VL ? NORM_TYPE_RMS : NORM_TYPE_NORMAL;
        cur = build_vit(cur, n_patches, norm, hparams.ffn_op, nullptr, rope, opts);
        cur = ggml_reshape_2d(ctx0, cur, n_embd*4, n_patches/4*n_batch);
        cur = build_ffn(cur, model.mm_0_w, model.mm_0_b, nullptr, nullptr, model.mm_1_w, model.mm_1_b, FFN_GELU, -1);
        if (n_wa > 0) {
            cur = reorder(cur, "window_idx");
        }
        ggml_build_forward_expand(gf, ggml_reshape_3d(ctx0, cur, cur->ne[0], n_patches/4, n_batch));
        return gf;
    }
};

struct clip_graph_mbq_idefics3 : clip_graph_siglip {
    using clip_graph_siglip::clip_graph_siglip;

    // see clip_graph::build_patch_merge_permute
    ggml_tensor * merge(ggml_tensor * cur, const int n) {
        const int64_t width = CLIP_ALIGN(n_patches_x, n), height = CLIP_ALIGN(n_patches_y, n);
        cur = ggml_reshape_4d(ctx0, cur, n_embd, n_patches_x, n_patches_y, n_batch);
        cur = ggml_pad(ctx0, cur, 0, width - n_patches_x, height - n_patches_y, 0);
        cur = ggml_reshape_4d(ctx0, cur, n_embd*n, width/n, height, n_batch);
        cur = ggml_permute(ctx0, cur, 0, 2, 1, 3);
        cur = ggml_cont_4d(ctx0, cur, n_embd*n*n, height/n, width/n, n_batch);
        cur = ggml_permute(ctx0, cur, 0, 2, 1, 3);
        return ggml_cont_2d(ctx0, cur, cur->ne[0], width/n*(height/n)*n_batch);
    }

    ggml_cgraph * build() override {
        ggml_tensor * cur = build_vit(build_inp(), n_patches, NORM_TYPE_NORMAL, hparams.ffn_op, model.position_embeddings, nullptr);
        cur = build_mm(model.mm_fc_w, merge(cur, hparams.n_merge));
        ggml_build_forward_expand(gf, ggml_reshape_3d(ctx0, cur, cur->ne[0], cur->ne[1]/n_batch, n_batch));
        return gf;
    }
};

// writes the pixels of all entries as the tower's input, one plane per channel; one thread per picture, or four for a single large one
static void clip_mbq_planes(const clip_image_f32_batch & imgs, float * to) {
    const size_t n = (size_t) imgs.entries[0].nx()*imgs.entries[0].ny();
    const size_t parts = imgs.entries.size() == 1 && n >= 1 << 17 ? 4 : 1; // per picture: 896 x 896 floats in 0.7 ms instead of 1.8
    ggml_at_once(parts*imgs.entries.size(), [&](size_t k) {
        const size_t b = k/parts, part = k%parts;
        imgs.entries[b].pixels().to_planes(to + b*3*n, n, part*n/parts, (part + 1)*n/parts);
    });
}

// page-locked memory for n bytes; one block is enough, because a pass ends before the next picture's pixels arrive
static char * clip_mbq_staging(clip_ctx & ctx, const size_t n) {
    auto & staging = ctx.kept.staging;
    if (!staging || ggml_backend_buffer_get_size(staging.get()) < n) {
        staging.reset(ggml_backend_buft_alloc_buffer(ctx.backend_buft.back(), n));
        GGML_ASSERT(staging);
    }
    return (char *) ggml_backend_buffer_get_base(staging.get());
}

// Writes the pixels of all entries to the input of ggml_patches. Transfers to a GPU are asynchronous: the graph is queued after them.
static void clip_mbq_set_patches(clip_ctx & ctx, const clip_image_f32_batch & imgs, ggml_tensor * to) {
    const size_t n = ggml_nbytes(to)/imgs.entries.size();
    for (size_t b = 0; b < imgs.entries.size(); b++) {
        const auto & img = imgs.entries[b];
        const bool bytes  = to->type == GGML_TYPE_I8;
        const char * from = bytes ? (const char *) img.pixels().bytes() : (const char *) img.get_ro_buf().data();
        if (ggml_backend_buffer_is_host(to->buffer)) {
            memcpy((char *) to->data + b*n, from, n);
            continue;
        }
        if (!bytes || !img.pixels().is_page_locked()) {
            from = (const char *) memcpy(clip_mbq_staging(ctx, ggml_nbytes(to)) + b*n, from, n);
        }
        ggml_backend_tensor_set_async(ctx.backend, to, from, b*n, n);
    }
}

// writes the pixels to the graph's input directly; otherwise, and for sounds, upstream does it, through a vector
static bool clip_mbq_set_pixels(clip_ctx & ctx, const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    if (ggml_tensor * pixels = imgs.is_audio ? nullptr : ggml_graph_get_tensor(gf, "inp_pixels")) {
        clip_mbq_set_patches(ctx, imgs, pixels);
        return true;
    }
    ggml_tensor * input = imgs.is_audio ? nullptr : ggml_graph_get_tensor(gf, "inp_raw");
    if (!input || input->type != GGML_TYPE_F32 || !input->buffer || !ggml_backend_buffer_is_host(input->buffer)) {
        return false;
    }
    size_t n = 0;
    for (const auto & img : imgs.entries) {
        n += (size_t) img.nx()*img.ny()*3;
    }
    GGML_ASSERT(ggml_nelements(input) == (int64_t) n);
    clip_mbq_planes(imgs, (float *) input->data);
    return true;
}

// copies the tower's output to its rows (clip-mbq-rows.h); otherwise upstream does it, to a vector
static bool clip_mbq_get_rows(const clip_image_f32_batch & imgs, const ggml_tensor * output) {
    if (!imgs.rows) {
        return false;
    }
    GGML_ASSERT(imgs.rows->size() == (size_t) ggml_nelements(output));
    ggml_backend_tensor_get(output, imgs.rows->data(), 0, ggml_nbytes(output));
    return true;
}

ggml_backend_buffer_type_t clip_mbq_host_buft(const clip_ctx * ctx) {
    return ctx->backend_buft.back();
}

// the graph for several pictures; nullptr: upstream decides, or this tower encodes them one by one
static std::unique_ptr<clip_graph> clip_mbq_batch_builder(clip_ctx * ctx, const clip_image_f32 & img) {
    switch (ctx->proj_type()) {
        case PROJECTOR_TYPE_QWEN2VL:
        case PROJECTOR_TYPE_QWEN25VL: return std::make_unique<clip_graph_mbq_qwen>(ctx, img);
        case PROJECTOR_TYPE_IDEFICS3: return std::make_unique<clip_graph_mbq_idefics3>(ctx, img);
        default:                      return nullptr;
    }
}
