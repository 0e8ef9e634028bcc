#pragma once

#include "clip-impl.h"
#include "clip-mbq-other-towers.h"
#include "clip-mbq-towers.h"
#include "clip-model.h"
#include "ggml.h"
#include "gguf.h"

#include <cmath>
#include <stdexcept>
#include <string>

// Checks of a vision file before its graph is built. Graph building would assert or dereference null if a tensor is missing or has another
// shape or an unsupported type, and gguf's functions assert if a key has another type. These checks throw instead.

// InternVL's numbers of tiles: upstream asserts their order, and builds a list of all shapes up to the maximum
static void clip_mbq_expect_tiles(const gguf_context * ctx) {
    int64_t tiles[2] = { 1, 12 };
    const char * names[2] = { KEY_PREPROC_MIN_TILES, KEY_PREPROC_MAX_TILES };
    for (int i = 0; i < 2; ++i) {
        const int64_t key = gguf_find_key(ctx, names[i]);
        if (key >= 0 && gguf_get_kv_type(ctx, key) == GGUF_TYPE_UINT32) {
            tiles[i] = gguf_get_val_u32(ctx, key);
        }
    }
    if (tiles[0] < 1 || tiles[1] < tiles[0] || tiles[1] > 1024) {
        throw std::runtime_error(string_format("%s and %s must be 1 to 1024, in this order", names[0], names[1]));
    }
}

// MiniCPM-V 4.6 merges 2 x 2 or 4 x 4 patches, as upstream asserts
static void clip_mbq_expect_merges(const gguf_context * ctx, uint32_t merges) {
    for (const char * name : { "clip.projector_type", "clip.vision.projector_type" }) {
        const int64_t key = gguf_find_key(ctx, name);
        if (key >= 0 && gguf_get_kv_type(ctx, key) == GGUF_TYPE_STRING && gguf_get_val_str(ctx, key) == PROJECTOR_TYPE_NAMES[PROJECTOR_TYPE_MINICPMV4_6]
            && merges != 2 && merges != 4) {
            throw std::runtime_error(string_format("%s must be 2 or 4", KEY_PROJ_SCALE_FACTOR));
        }
    }
}

static void clip_mbq_expect(const gguf_context * ctx, int64_t key, gguf_type type) {
    if (gguf_get_kv_type(ctx, key) != type) {
        throw std::runtime_error(string_format("%s must be of type %s", gguf_get_key(ctx, key), gguf_type_name(type)));
    }
    const std::string name = gguf_get_key(ctx, key);
    if (name == KEY_PREPROC_MIN_TILES || name == KEY_PREPROC_MAX_TILES) {
        clip_mbq_expect_tiles(ctx);
    }
    if (name == KEY_PROJ_SCALE_FACTOR) {
        clip_mbq_expect_merges(ctx, gguf_get_val_u32(ctx, key));
    }
}

// norms and biases are multiplied and added as floats, matrices need a product
static void clip_mbq_check_types(ggml_context * ctx) {
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        const std::string name = t->name;
        const auto holds = [&](const char * part) { return name.find(part) != std::string::npos; };
        const bool number = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16;
        const bool vector = ggml_n_dims(t) == 1 && (holds(".bias") || holds("norm") || holds(".ln"));
        if (vector ? !number : holds(".weight") && !number && t->type != GGML_TYPE_BF16 && !ggml_is_quantized(t->type)) {
            throw std::runtime_error(string_format("%s is of type %s, which nothing computes with", t->name, ggml_type_name(t->type)));
        }
    }
}

// for what clip_model_loader has read: T has ctx_gguf and ctx_meta
template <typename T>
static void clip_mbq_check(const T & loader, projector_type type, const clip_hparams & hparams) {
    if (!(hparams.eps >= 0) || !std::isfinite(hparams.eps)) {
        throw std::runtime_error("the epsilon of the norms must be a number from 0 up");
    }
    clip_mbq_check_types(loader.ctx_meta.get());
    clip_mbq_check_tower(clip_mbq_tower(loader.ctx_meta.get(), hparams), type);
    clip_mbq_check_other_tower(clip_mbq_tower(loader.ctx_meta.get(), hparams), type);
}
