#pragma once

#include "clip-impl.h"
#include "clip-mbq-act.h"
#include "clip-mbq-batch.h"
#include "clip-mbq-checks.h"
#include "clip-mbq-llama4.h"
#include "clip-mbq-row-scale.h"
#include "clip-model.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

// Reads the picture sizes that the model was trained on, if its file has them and its family limits sizes by area. Limits from the command
// line take precedence, and move the file's other limit if the two cross. T has ctx_gguf and get_u32(key, output, required), like
// clip_model_loader. A value that is not a valid number of pixels throws here; get_u32 and the preprocessors would assert.
template <typename T>
static void clip_mbq_image_limits(const T & loader, clip_hparams & hparams) {
    if (hparams.image_min_pixels <= 0 || hparams.image_max_pixels <= 0) {
        return; // the family has no dynamic size
    }
    for (const char * name : { KEY_IMAGE_MIN_PIXELS, KEY_IMAGE_MAX_PIXELS }) {
        const int64_t key = gguf_find_key(loader.ctx_gguf.get(), name);
        if (key >= 0 && gguf_get_kv_type(loader.ctx_gguf.get(), key) != GGUF_TYPE_UINT32) {
            throw std::runtime_error(string_format("%s must be a u32", name));
        }
    }
    if (hparams.custom_image_min_tokens <= 0) {
        loader.get_u32(KEY_IMAGE_MIN_PIXELS, hparams.image_min_pixels, false);
    }
    if (hparams.custom_image_max_tokens <= 0) {
        loader.get_u32(KEY_IMAGE_MAX_PIXELS, hparams.image_max_pixels, false);
    }
    if (hparams.image_min_pixels <= 0 || hparams.image_max_pixels <= 0) {
        throw std::runtime_error(string_format("%s and %s must be 1 to 2147483647", KEY_IMAGE_MIN_PIXELS, KEY_IMAGE_MAX_PIXELS));
    }
    if (hparams.custom_image_min_tokens > 0 && hparams.custom_image_max_tokens <= 0) {
        hparams.image_max_pixels = std::max(hparams.image_max_pixels, hparams.image_min_pixels);
    } else if (hparams.custom_image_max_tokens > 0 && hparams.custom_image_min_tokens <= 0) {
        hparams.image_min_pixels = std::min(hparams.image_min_pixels, hparams.image_max_pixels);
    }
    // no picture is larger, so the one that memory is reserved for need not be either
    const int64_t side = (int64_t) hparams.patch_size * hparams.n_merge;
    if (side > 0) {
        const int64_t most = std::max((int64_t) 1, (int64_t) std::sqrt(hparams.image_max_pixels) / side) * side;
        hparams.warmup_image_size = (int) std::min((int64_t) hparams.warmup_image_size, most);
    }
}

// a graph that replaces upstream's, for one picture or several; nullptr: use upstream's
static std::unique_ptr<clip_graph> clip_mbq_builder(clip_ctx * ctx, const clip_image_f32_batch & imgs) {
    const clip_image_f32 & img = imgs.entries[0];
    const bool qwen = ctx->proj_type() == PROJECTOR_TYPE_QWEN2VL || ctx->proj_type() == PROJECTOR_TYPE_QWEN25VL;
    if (ctx->proj_type() == PROJECTOR_TYPE_LLAMA4) {
        return std::make_unique<clip_graph_mbq_llama4>(ctx, img);
    }
    if (ctx->proj_type() == PROJECTOR_TYPE_GEMMA4V) {
        return std::make_unique<clip_graph_mbq_gemma4>(ctx, img);
    }
    const bool from_bytes = qwen && imgs.entries.size() == 1 && clip_mbq_all_bytes(imgs);
    return imgs.pictures || from_bytes ? clip_mbq_batch_builder(ctx, img) : nullptr;
}

// to be called when all metadata of a vision file has been read, and none of its tensors
template <typename T>
static void clip_mbq_load_hparams(const T & loader, projector_type type, clip_hparams & hparams) {
    clip_mbq_image_limits(loader, hparams);
    if (type == PROJECTOR_TYPE_MBQ_ANYRES) {
        loader.get_u32(KEY_PREPROC_MAX_TILES, hparams.preproc_max_tiles, false);
    }
    clip_mbq_check(loader, type, hparams);
    clip_mbq_set_row_scale(loader.ctx_gguf.get(), loader.ctx_meta.get());
}
