#pragma once

// Static ranges of activations for a tower's weights with one scale per row (mbq-gguf: convert --mmproj-activations static). src/llama-mbq-act.cpp does this
// for language models, with the same keys:
//
//   mbq.act.version             u32, 1; without it the file has no static ranges
//   mbq.act.range.SITE.vision   array of f32, one per block: the largest |x| that int8 represents, 0: each row's own (dynamic)
//                               SITE is qkv, o, gate_up or down, the activation that these weights read
//
// All rows of a product share one range. The ranges are loaded with the weights, into a tensor that the backend reads; each weight stores the offset of its range.

#include "clip-graph.h"
#include "clip-impl.h"
#include "ggml-backend.h"
#include "ggml-row-scale.h"
#include "ggml.h"
#include "gguf.h"
#include "models/models.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

static const char * const CLIP_MBQ_ACT_SITES[] = { "qkv", "o", "gate_up", "down" };
static constexpr int      CLIP_MBQ_ACT_N_SITES = 4;

static const char * const CLIP_MBQ_ACT_RANGES = "mbq.act.ranges"; // the tensor's name

// The place of a weight's range. It is stored in op_params, which weights do not use otherwise.
struct clip_mbq_place {
    ggml_tensor * ranges; // F32 [4 * blocks]
    size_t        offset; // in bytes
};

static_assert(sizeof(clip_mbq_place) <= GGML_MAX_OP_PARAMS, "");

static int clip_mbq_act_site(const char * weight) { // the part of its name after v.blk.N.
    const struct { const char * weight; int site; } readers[] = {
        { "attn_q.weight", 0 }, { "attn_k.weight",   0 }, { "attn_v.weight", 0 }, { "attn_qkv.weight", 0 },
        { "attn_out.weight", 1 }, { "ffn_gate.weight", 2 }, { "ffn_up.weight", 2 }, { "ffn_down.weight", 3 },
    };
    for (const auto & reader : readers) {
        if (strcmp(weight, reader.weight) == 0) {
            return reader.site;
        }
    }
    return -1;
}

// [4 * blocks], with the sites of a block contiguous; empty if the file has none
static std::vector<float> clip_mbq_act_read(const gguf_context * gguf, const size_t n_blocks) {
    const int64_t version = gguf_find_key(gguf, "mbq.act.version");
    if (version < 0) {
        return {};
    }
    if (gguf_get_kv_type(gguf, version) != GGUF_TYPE_UINT32) {
        throw std::runtime_error("mbq.act.version must be a u32");
    }
    if (gguf_get_val_u32(gguf, version) != 1) {
        throw std::runtime_error(string_format("mbq.act.version is %u: this program knows 1", gguf_get_val_u32(gguf, version)));
    }
    std::vector<float> ranges(CLIP_MBQ_ACT_N_SITES*n_blocks);
    for (int site = 0; site < CLIP_MBQ_ACT_N_SITES; ++site) {
        const std::string name = string_format("mbq.act.range.%s.vision", CLIP_MBQ_ACT_SITES[site]);
        const int64_t key = gguf_find_key(gguf, name.c_str());
        if (key < 0) {
            continue;
        }
        if (gguf_get_kv_type(gguf, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, key) != GGUF_TYPE_FLOAT32) {
            throw std::runtime_error(string_format("%s must be an array of f32", name.c_str()));
        }
        const size_t n = gguf_get_arr_n(gguf, key);
        if (n > n_blocks) {
            throw std::runtime_error(string_format("%s has %zu values: the tower has %zu blocks", name.c_str(), n, n_blocks));
        }
        for (size_t il = 0; il < n; ++il) {
            const float range = ((const float *) gguf_get_arr_data(gguf, key))[il];
            if (range != 0.0f && !(range >= GGML_ROW_SCALE_AMAX_MIN && std::isfinite(range))) {
                throw std::runtime_error(string_format("%s is %g in block %zu: it must be 0 or a range from 2^-95 up", name.c_str(), range, il));
            }
            ranges[il*CLIP_MBQ_ACT_N_SITES + site] = range;
        }
    }
    return ranges;
}

// Ranges of unknown sites or classes are not an error, like other unknown keys: those rows are dynamic.
static void clip_mbq_act_warn(const gguf_context * gguf) {
    const std::string prefix = "mbq.act.range.";
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        const std::string key = gguf_get_key(gguf, i);
        bool known = key.compare(0, prefix.size(), prefix) != 0;
        for (const char * site : CLIP_MBQ_ACT_SITES) {
            known = known || key == prefix + site + ".vision";
        }
        if (!known) {
            LOG_WRN("%s: %s is of no site or class that this program knows: those activations are dynamic\n", __func__, key.c_str());
        }
    }
}

// Called before the weights are allocated: adds a tensor for the ranges (the context has room for one), and stores each weight's place in it.
static void clip_mbq_act_add(const gguf_context * gguf, const clip_ctx & ctx) {
    if (ctx.model.modality != CLIP_MODALITY_VISION) {
        return; // the file may also have an audio tower, with blocks of its own
    }
    const int n_blocks = ctx.model.hparams.n_layer;
    const std::vector<float> ranges = clip_mbq_act_read(gguf, n_blocks);
    if (ranges.empty()) {
        return;
    }
    clip_mbq_act_warn(gguf);
    ggml_context * weights = ctx.ctx_data.get();
    ggml_tensor  * tensor  = ggml_new_tensor_1d(weights, GGML_TYPE_F32, ranges.size());
    ggml_set_name(tensor, CLIP_MBQ_ACT_RANGES);
    for (ggml_tensor * w = ggml_get_first_tensor(weights); w != nullptr; w = ggml_get_next_tensor(weights, w)) {
        int block = -1, length = 0;
        if (sscanf(w->name, "v.blk.%d.%n", &block, &length) != 1 || length == 0 || block < 0 || block >= n_blocks) {
            continue;
        }
        const int site = clip_mbq_act_site(w->name + length);
        const int i    = block*CLIP_MBQ_ACT_N_SITES + site;
        if (site >= 0 && ranges[i] != 0.0f) {
            const clip_mbq_place place = { tensor, i*sizeof(float) };
            memcpy(w->op_params, &place, sizeof(place));
        }
    }
}

// Called after the weights are allocated.
static void clip_mbq_act_set(const gguf_context * gguf, const clip_ctx & ctx) {
    if (ggml_tensor * tensor = ggml_get_tensor(ctx.ctx_data.get(), CLIP_MBQ_ACT_RANGES)) {
        ggml_backend_tensor_set(tensor, clip_mbq_act_read(gguf, ctx.model.hparams.n_layer).data(), 0, ggml_nbytes(tensor));
    }
}

// Gives a product its range if its weight has one. The view is added to the graph before the nodes that compute the activations, so that it is available
// to a backend that computes and multiplies them in one kernel.
static ggml_tensor * clip_mbq_act(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * product) {
    clip_mbq_place place = { nullptr, 0 };
    if (ggml_is_row_scale_mul_mat(product)) {
        memcpy(&place, product->src[0]->op_params, sizeof(place));
    }
    if (place.ranges) {
        ggml_tensor * range = ggml_view_1d(ctx, place.ranges, 1, place.offset);
        range->ne[1] = product->src[1]->ne[1]; // one value for all rows; ggml_view_2d would require one per row
        range->nb[1] = range->nb[2] = range->nb[3] = 0;
        ggml_build_forward_expand(gf, range);
        product->src[2] = range;
    }
    return product;
}

// Gemma 4 builds its products itself, some between two clamps
struct clip_graph_mbq_gemma4 : clip_graph_gemma4v {
    using clip_graph_gemma4v::clip_graph_gemma4v;

    ggml_tensor * build_mm(ggml_tensor * w, ggml_tensor * x) const override {
        ggml_tensor * cur = clip_graph_gemma4v::build_mm(w, x);
        clip_mbq_act(ctx0, gf, cur->op == GGML_OP_CLAMP ? cur->src[0] : cur);
        return cur;
    }
};
