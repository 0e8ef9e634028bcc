#pragma once

#include "clip-mbq-gemma4-audio.h"
#include "clip-mbq-towers.h"

#include <algorithm>

// Checks like clip-mbq-towers.h, for families whose graphs have parts that no other has: LLaVA-1.5's CLIP, Gemma 4, MiniCPM-V, Llama 4,
// PaddleOCR-VL and dots.ocr.

struct clip_mbq_other_tower : clip_mbq_tower {
    explicit clip_mbq_other_tower(const clip_mbq_tower & tower) : clip_mbq_tower(tower) {}

    // for graphs that read q, k and v separately, even if the file also has a fused matrix
    void apart() const {
        for (int il = 0; il < hparams.n_layer; ++il) {
            none(("v.blk." + std::to_string(il) + ".attn_qkv.weight").c_str());
        }
    }

    void norm(const std::string & name, int64_t n) const {
        vector(name + ".weight", n);
        vector_if(name + ".bias", n);
    }

    // CLIP: with or without a class token; the outputs of some layers are concatenated
    void llava() const {
        heads(false);
        patches(false);
        vector_if(TN_CLASS_EMBD, n_embd);
        positions(find(TN_CLASS_EMBD) != nullptr);
        layers(false, false, true);
        apart();
        int deepest = -1;
        for (const int32_t layer : hparams.feature_layers) {
            want(layer >= 0 && layer <= hparams.n_layer, "a layer whose output is read must be there");
            deepest = std::max(deepest, (int) layer);
        }
        int64_t n_stacked = 0; // a layer named twice is counted once
        for (int layer = 0; layer <= deepest; ++layer) {
            n_stacked += hparams.is_feature_layer(layer);
        }
        none("mm.3.weight"); // belongs to another projector
        vector_if(TN_IMAGE_NEWLINE, linear("mm.2", linear("mm.0", n_embd*std::max(n_stacked, (int64_t) 1), 0, true), 0, true));
    }

    // one table of positions per direction, long enough for the longest picture
    void gemma4() const {
        heads(true);
        patches(false);
        const ggml_tensor * table = get("v.position_embd.weight");
        shape("v.position_embd.weight", { n_embd, table->ne[1], 2, 1 });
        type("v.position_embd.weight", { GGML_TYPE_F32, GGML_TYPE_F16 });
        const int64_t side = (int64_t) hparams.patch_size*hparams.n_merge;
        want(hparams.image_max_pixels/side/hparams.patch_size <= table->ne[1], "positions must reach the end of the longest picture");
        layers(false, false, false);
        vector_if(TN_STD_BIAS, n_embd);
        vector_if(TN_STD_SCALE, n_embd);
        shape(TN_MM_INP_PROJ, { n_embd, get(TN_MM_INP_PROJ)->ne[1], 1, 1 });
    }

    // for families without default limits
    void limits() const {
        want(hparams.image_min_pixels > 0 && hparams.image_max_pixels > 0, "a picture must have a pixel or more");
    }

    // SigLIP with rotary positions in addition to an interpolated table; 2 x 2 patches become a token
    void paddleocr() const {
        heads(true);
        limits();
        none(TN_CLASS_EMBD);
        patches(false);
        stretched_positions();
        layers(false, false, false);
        norm("mm.input_norm", n_embd);
        linear("mm.2", linear("mm.1", n_embd*hparams.n_merge*hparams.n_merge));
    }

    // rotary positions only
    void dots_ocr() const {
        heads(true);
        limits();
        want(hparams.n_merge > 1, "patches must be merged");
        none(TN_CLASS_EMBD);
        patches(false);
        layers(false, false, false);
        vector_if("mm.post_norm.weight", n_embd);
        norm("mm.input_norm", n_embd);
        linear("mm.2", linear("mm.0", n_embd*hparams.n_merge*hparams.n_merge));
    }

    // each patch uses the nearest of 70 x 70 positions
    void nearest_positions(int64_t side) const {
        want(hparams.image_size >= side && hparams.image_size % side == 0, "the patches that are merged must divide a picture's");
        const int64_t n_pos = get("v.position_embd.weight")->ne[1];
        want(n_pos >= 70*70, "there must be 70 x 70 positions");
        shape("v.position_embd.weight", { n_embd, n_pos, 1, 1 });
        type("v.position_embd.weight", { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 });
    }

    // up to version 4.5: a resampler whose queries attend to all patches, with heads of 128
    void minicpmv() const {
        heads(false);
        none(TN_CLASS_EMBD);
        patches(false);
        nearest_positions(hparams.patch_size);
        layers(false, false, true);
        const int64_t n = get(TN_MINICPMV_PROJ)->ne[0];
        want(n > 0 && n % 128 == 0, "the resampler's heads of 128 must divide its width");
        shape(TN_MINICPMV_QUERY, { n, hparams.minicpmv_query_num, 1, 1 });
        type(TN_MINICPMV_QUERY, { GGML_TYPE_F32 });
        linear("resampler.kv", n_embd, n);
        linear("resampler.proj", n, n);
        for (const char * name : { "q", "k", "v", "out" }) {
            linear(std::string("resampler.attn.") + name, n, n, true);
        }
        for (const char * name : { "q", "kv", "post" }) {
            vector(std::string("resampler.ln_") + name + ".weight", n);
            vector(std::string("resampler.ln_") + name + ".bias", n);
        }
    }

    // squares of patches are merged between two layers, and once more at the end
    void minicpmv4_6() const {
        heads(false);
        patches(false);
        nearest_positions((int64_t) hparams.patch_size*hparams.n_merge);
        layers(false, false, true);
        apart();
        if (hparams.n_merge == 4) {
            want(hparams.insert_layer_id >= 0 && hparams.insert_layer_id < hparams.n_layer, "the layer behind which patches merge must be there");
            norm("v.vit_merger.ln1", n_embd);
            for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_out" }) {
                linear(std::string("v.vit_merger.") + name, n_embd, n_embd);
            }
            norm("v.vit_merger.ds_ln", 4*n_embd);
            linear("v.vit_merger.ds_ffn_down", linear("v.vit_merger.ds_ffn_up", 4*n_embd), n_embd);
        }
        norm("mm.input_norm", 4*n_embd);
        linear("mm.down", linear("mm.up", 4*n_embd));
    }

    // the class token comes after the patches; the patch kernel is stored as a matrix
    void llama4() const {
        heads(true);
        linear("v.patch_embd", 3*hparams.patch_size*hparams.patch_size, n_embd);
        vector(TN_CLASS_EMBD, n_embd);
        positions(true);
        layers(false, false, true);
        linear("mm.model.fc", linear("mm.model.mlp.2", linear("mm.model.mlp.1", n_embd*hparams.n_merge*hparams.n_merge)));
    }
};

static void clip_mbq_check_other_tower(const clip_mbq_tower & known, projector_type type) {
    const clip_mbq_other_tower tower(known);
    switch (type) {
        case PROJECTOR_TYPE_MLP:
            tower.llava();
            break;
        case PROJECTOR_TYPE_GEMMA4V:
            tower.gemma4();
            break;
        case PROJECTOR_TYPE_GEMMA4A:
            clip_mbq_gemma4_audio(known).check();
            break;
        case PROJECTOR_TYPE_PADDLEOCR:
            tower.paddleocr();
            break;
        case PROJECTOR_TYPE_DOTS_OCR:
            tower.dots_ocr();
            break;
        case PROJECTOR_TYPE_MINICPMV:
            tower.minicpmv();
            break;
        case PROJECTOR_TYPE_MINICPMV4_6:
            tower.minicpmv4_6();
            break;
        case PROJECTOR_TYPE_LLAMA4:
            tower.llama4();
            break;
        default:
            break;
    }
}
