#pragma once

#include "clip-impl.h"
#include "clip-model.h"
#include "ggml.h"
#include "gguf.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

// What a vision file must hold before its graph is built: the graph's functions assert, or follow a null pointer, where a tensor is
// missing, of another shape or of a type that cannot be computed with, and gguf's where a key is of another type. Errors here are thrown.

static void clip_mbq_expect(const gguf_context * ctx, int64_t key, gguf_type type) {
    if (gguf_get_kv_type(ctx, key) != type) {
        throw std::runtime_error(string_format("%s must be of type %s", gguf_get_key(ctx, key), gguf_type_name(type)));
    }
}

struct clip_mbq_tensors {
    ggml_context * ctx;

    const ggml_tensor * get(const std::string & name) const {
        const ggml_tensor * found = ggml_get_tensor(ctx, name.c_str());
        if (found == nullptr) {
            throw std::runtime_error(string_format("unable to find tensor %s", name.c_str()));
        }
        return found;
    }

    void shape(const std::string & name, std::initializer_list<int64_t> ne) const {
        const ggml_tensor * found = get(name);
        int i = 0;
        for (const int64_t n : ne) {
            if (found->ne[i++] != n) {
                throw std::runtime_error(string_format("%s has %d in dimension %d, it must have %d",
                    name.c_str(), (int) found->ne[i - 1], i - 1, (int) n));
            }
        }
    }

    // matrix [n_in, n_out] and bias; returns n_out
    int64_t linear(const std::string & name, int64_t n_in) const {
        const int64_t n_out = get(name + ".weight")->ne[1];
        shape(name + ".weight", { n_in, n_out, 1, 1 });
        shape(name + ".bias", { n_out, 1, 1, 1 });
        return n_out;
    }
};

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

// the tensors of Qwen2-VL and Qwen2.5-VL, with the shapes that their graph takes for granted
static void clip_mbq_check_qwen2vl(const clip_mbq_tensors & tensors, const clip_hparams & hparams, bool rms) {
    const int64_t n_embd = hparams.n_embd;
    if (hparams.n_layer < 1 || hparams.n_head < 1 || n_embd % hparams.n_head != 0 || n_embd / hparams.n_head % 4 != 0) {
        throw std::runtime_error(string_format("%d layers with %d heads over %d channels: heads must have a multiple of 4 channels",
            hparams.n_layer, hparams.n_head, (int) n_embd));
    }
    for (const char * name : { TN_PATCH_EMBD, TN_PATCH_EMBD_1 }) {
        tensors.shape(name, { hparams.patch_size, hparams.patch_size, 3, n_embd });
    }
    for (int il = 0; il < hparams.n_layer; ++il) {
        const std::string blk = "v.blk." + std::to_string(il) + ".";
        for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_out" }) {
            if (tensors.linear(blk + name, n_embd) != n_embd) {
                throw std::runtime_error(string_format("%s%s.weight must have %d rows", blk.c_str(), name, (int) n_embd));
            }
        }
        for (const char * name : { "ln1.weight", "ln2.weight" }) {
            tensors.shape(blk + name, { n_embd, 1, 1, 1 });
        }
        for (const char * name : { "ln1.bias", "ln2.bias" }) {
            if (!rms) {
                tensors.shape(blk + name, { n_embd, 1, 1, 1 });
            }
        }
    }
    tensors.linear("mm.2", tensors.linear("mm.0", n_embd * 4));
}

// for what clip_model_loader has read: T has ctx_gguf and ctx_meta
template <typename T>
static void clip_mbq_check(const T & loader, projector_type type, const clip_hparams & hparams) {
    const clip_mbq_tensors tensors = { loader.ctx_meta.get() };
    if (!(hparams.eps >= 0) || !std::isfinite(hparams.eps)) {
        throw std::runtime_error("the epsilon of the norms must be a number from 0 up");
    }
    clip_mbq_check_types(tensors.ctx);
    if (type == PROJECTOR_TYPE_QWEN2VL || type == PROJECTOR_TYPE_QWEN25VL) {
        clip_mbq_check_qwen2vl(tensors, hparams, type == PROJECTOR_TYPE_QWEN25VL);
    }
    if (type == PROJECTOR_TYPE_QWEN3VL) {
        tensors.get(TN_PATCH_BIAS);
    }
}
