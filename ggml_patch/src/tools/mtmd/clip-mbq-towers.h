#pragma once

#include "clip-impl.h"
#include "clip-model.h"
#include "ggml.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

// Checks the tensors, shapes and numbers that the graphs (tools/mtmd/models) of the families that mbq-gguf converts take for granted. Tensors that
// are optional in a graph are checked if they exist. Errors are thrown. Families that clip_mbq_check_tower does not list are not checked,
// as upstream.

struct clip_mbq_tower {
    ggml_context * ctx;
    const clip_hparams & hparams;
    const int64_t n_embd;
    const int64_t d_head;

    clip_mbq_tower(ggml_context * ctx, const clip_hparams & hparams) : ctx(ctx), hparams(hparams), n_embd(hparams.n_embd),
        d_head(hparams.n_head > 0 ? hparams.n_embd / hparams.n_head : 0) {}

    const ggml_tensor * find(const std::string & name) const {
        return ggml_get_tensor(ctx, name.c_str());
    }

    const ggml_tensor * get(const std::string & name) const {
        const ggml_tensor * found = find(name);
        if (found == nullptr) {
            throw std::runtime_error(string_format("unable to find tensor %s", name.c_str()));
        }
        return found;
    }

    void none(const char * name) const {
        if (find(name) != nullptr) {
            throw std::runtime_error(string_format("this family has no %s", name));
        }
    }

    static void want(bool right, const char * what) {
        if (!right) {
            throw std::runtime_error(what);
        }
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

    void type(const std::string & name, std::initializer_list<ggml_type> types) const {
        const ggml_type is = get(name)->type;
        for (const ggml_type one : types) {
            if (is == one) {
                return;
            }
        }
        throw std::runtime_error(string_format("%s is of type %s, which nothing computes with", name.c_str(), ggml_type_name(is)));
    }

    // added to activations, or multiplied by them
    void vector(const std::string & name, int64_t n) const {
        shape(name, { n, 1, 1, 1 });
        type(name, { GGML_TYPE_F32 });
    }

    void vector_if(const std::string & name, int64_t n) const {
        if (find(name) != nullptr) {
            vector(name, n);
        }
    }

    void norm_if(const std::string & name, int64_t n) const {
        vector_if(name + ".weight", n);
        vector_if(name + ".bias", n);
    }

    // matrix [n_in, n_out] and bias; returns n_out, which may have any value if it is 0
    int64_t linear(const std::string & name, int64_t n_in, int64_t n_out = 0, bool biased = false) const {
        n_out = n_out > 0 ? n_out : get(name + ".weight")->ne[1];
        shape(name + ".weight", { n_in, n_out, 1, 1 });
        if (biased || find(name + ".bias") != nullptr) {
            vector(name + ".bias", n_out);
        }
        return n_out;
    }

    // the kernel of a convolution: side x side x channels, n_out of them
    void kernel(const std::string & name, int64_t side, int64_t channels, int64_t n_out) const {
        shape(name, { side, side, channels, n_out });
        type(name, { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 });
    }

    void heads(bool rope) const {
        want(hparams.patch_size > 0 && hparams.n_merge > 0, "patches must have pixels, and be merged by 1 or more");
        want(hparams.n_layer > 0 && hparams.n_head > 0 && n_embd > 0 && n_embd % hparams.n_head == 0, "heads do not divide the width");
        want(hparams.n_head_kv == hparams.n_head, "keys and queries must have as many heads");
        want(hparams.n_embd_head == 0 || hparams.n_embd_head == d_head, "the width of a head must be the width divided by their number");
        want(!rope || d_head % 4 == 0, "heads must have a multiple of 4 channels");
    }

    void feed_forward(const std::string & blk, bool may_be_swapped) const {
        const bool swapped = may_be_swapped && get(blk + "ffn_down.weight")->ne[0] == n_embd; // older files name them so
        const int64_t n_ff = linear(blk + (swapped ? "ffn_down" : "ffn_up"), n_embd);
        linear(blk + (swapped ? "ffn_up" : "ffn_down"), n_ff, n_embd);
        if (find(blk + "ffn_gate.weight") != nullptr) {
            linear(blk + "ffn_gate", n_embd, n_ff);
        }
        none((blk + "ffn_gate_exps.weight").c_str());
    }

    // biased: the graph adds the biases of q, k and v unconditionally; fused: q, k and v are one matrix; if neither, they may be one
    void layers(bool biased, bool fused, bool may_be_swapped) const {
        for (int il = 0; il < hparams.n_layer; ++il) {
            const std::string blk = "v.blk." + std::to_string(il) + ".";
            const bool one = fused || (!biased && find(blk + "attn_qkv.weight") != nullptr);
            for (const char * name : { "attn_q", "attn_k", "attn_v" }) {
                if (!one) {
                    linear(blk + name, n_embd, n_embd, biased);
                }
            }
            if (one) {
                linear(blk + "attn_qkv", n_embd, 3*n_embd, biased);
            }
            linear(blk + "attn_out", n_embd, n_embd);
            // norms per head, or, if q, k and v are separate, over all heads: the shape of q's norm decides
            const ggml_tensor * q_norm = find(blk + "attn_q_norm.weight");
            const int64_t n_norm = one || (q_norm != nullptr && q_norm->ne[0] == d_head) ? d_head : n_embd;
            vector_if(blk + "attn_q_norm.weight", n_norm);
            vector_if(blk + "attn_k_norm.weight", n_norm);
            for (const char * name : { "ln1", "ln2" }) {
                norm_if(blk + name, n_embd);
            }
            for (const char * name : { "ls1.weight", "ls2.weight", "out_scale.weight", "attn_post_norm.weight", "ffn_post_norm.weight" }) {
                vector_if(blk + name, n_embd);
            }
            feed_forward(blk, may_be_swapped);
        }
        norm_if("v.pre_ln", n_embd);
        norm_if("v.post_ln", n_embd);
    }

    void patches(bool two_frames) const {
        kernel(TN_PATCH_EMBD, hparams.patch_size, 3, n_embd);
        if (two_frames) {
            kernel(TN_PATCH_EMBD_1, hparams.patch_size, 3, n_embd);
        }
        vector_if(TN_PATCH_BIAS, n_embd);
    }

    // one position per patch of a picture of one size, and `before` more
    void positions(int64_t before) const {
        want(hparams.image_size >= hparams.patch_size, "a picture must have a patch");
        const int64_t side = hparams.image_size / hparams.patch_size;
        want(side % hparams.n_merge == 0, "the patches that are merged must divide a picture's");
        shape("v.position_embd.weight", { n_embd, side*side + before, 1, 1 });
        type("v.position_embd.weight", { GGML_TYPE_F32 });
    }

    // a square table of positions, interpolated to the picture's size
    void stretched_positions() const {
        const int64_t n = get("v.position_embd.weight")->ne[1];
        const int64_t side = (int64_t) std::sqrt((double) n);
        shape("v.position_embd.weight", { n_embd, side*side, 1, 1 });
        type("v.position_embd.weight", { GGML_TYPE_F32 });
    }

    // Qwen2-VL and its successors: two kernels, rotary positions, 2 x 2 patches become a token
    void qwen(bool windows) const {
        heads(true);
        patches(true);
        none(TN_CLASS_EMBD);
        want(hparams.n_merge == 2, "2 x 2 patches must become a token");
        if (hparams.n_wa_pattern > 0) { // every n-th layer attends to everything, the others within square windows
            const int window = hparams.attn_window_size > 0 ? hparams.attn_window_size : 112;
            want(windows && hparams.n_wa_pattern > 1, "windows of attention are Qwen2.5-VL's, whose layers must not all see everything");
            want(window / hparams.patch_size / 2 > 0, "a window of attention must hold 2 patches");
            want(hparams.projection_dim > 0, "projection_dim must be a number from 1 up");
        }
    }

    void deepstack(int64_t n_out) const {
        for (int il = 0; il < hparams.n_layer; ++il) {
            const std::string blk = "v.deepstack." + std::to_string(il) + ".";
            if (find(blk + "fc1.weight") != nullptr) {
                norm_if(blk + "norm", n_embd*4);
                linear(blk + "fc2", linear(blk + "fc1", n_embd*4), n_out);
            }
        }
    }

    // of Pixtral, and of Mistral 3, which merges patches first
    void pixtral_projector(int64_t n_merged) const {
        int64_t n_in = n_embd;
        if (find("mm.patch_merger.weight") != nullptr) {
            vector(TN_MM_INP_NORM, n_embd);
            n_in = linear("mm.patch_merger", n_merged);
        } else {
            want(hparams.n_merge == 1, "patches are merged by mm.patch_merger.weight, which is not there");
        }
        vector(TN_TOK_IMG_BREAK, linear("mm.2", linear("mm.1", n_in)));
    }

    // of LLaVA-NeXT and LLaVA-OneVision (clip-mbq-anyres.h): a picture becomes a stack of whole tiles
    void anyres() const {
        const int64_t tile = hparams.image_size;
        want(!hparams.image_res_candidates.empty(), "a picture must have a resolution to be cut at");
        for (const clip_image_size & size : hparams.image_res_candidates) {
            want(size.width > 0 && size.height > 0 && size.width % tile == 0 && size.height % tile == 0, "a resolution must be whole tiles");
            want((int64_t) size.width*size.height + tile*tile <= 1 << 26, "a resolution must have fewer pixels");
        }
        vector(TN_IMAGE_NEWLINE, linear("mm.2", linear("mm.0", n_embd)));
    }

    void glm4v_projector() const {
        const ggml_tensor * merger = get("mm.patch_merger.weight");
        kernel("mm.patch_merger.weight", hparams.n_merge, n_embd, merger->ne[3]);
        vector("mm.patch_merger.bias", merger->ne[3]);
        const int64_t n = linear("mm.model.fc", merger->ne[3]);
        norm_if("mm.post_norm", n);
        const int64_t n_ff = linear("mm.up", n);
        linear("mm.gate", n, n_ff);
        linear("mm.down", n_ff);
    }
};

static void clip_mbq_check_tower(const clip_mbq_tower & tower, projector_type type) {
    const int64_t n_merged = tower.n_embd*tower.hparams.n_merge*tower.hparams.n_merge;
    switch (type) {
        case PROJECTOR_TYPE_QWEN2VL:
        case PROJECTOR_TYPE_QWEN25VL:
            tower.qwen(type == PROJECTOR_TYPE_QWEN25VL);
            tower.none(TN_PATCH_BIAS);
            tower.layers(true, false, true);
            tower.linear("mm.2", tower.linear("mm.0", n_merged), tower.hparams.n_wa_pattern > 0 ? tower.hparams.projection_dim : 0);
            break;
        case PROJECTOR_TYPE_QWEN3VL:
            tower.qwen(false);
            tower.get(TN_PATCH_BIAS);
            tower.stretched_positions();
            tower.layers(true, true, false);
            tower.deepstack(tower.linear("mm.2", tower.linear("mm.0", n_merged)));
            break;
        case PROJECTOR_TYPE_GLM4V:
            tower.qwen(false);
            tower.get(TN_PATCH_BIAS);
            tower.norm_if("v.norm_embd", tower.n_embd);
            if (tower.find("v.position_embd.weight") != nullptr) { // GLM-OCR has none
                tower.stretched_positions();
            }
            tower.layers(false, false, false);
            tower.glm4v_projector();
            break;
        case PROJECTOR_TYPE_PIXTRAL:
            tower.heads(true);
            tower.patches(false);
            tower.layers(false, false, false);
            tower.pixtral_projector(n_merged);
            break;
        case PROJECTOR_TYPE_GEMMA3:
        case PROJECTOR_TYPE_IDEFICS3:
        case PROJECTOR_TYPE_INTERNVL:
            tower.heads(false);
            tower.patches(false);
            tower.positions(type == PROJECTOR_TYPE_INTERNVL);
            tower.layers(false, false, type != PROJECTOR_TYPE_INTERNVL);
            if (type == PROJECTOR_TYPE_GEMMA3) {
                tower.vector(TN_MM_SOFT_EMB_N, tower.n_embd);
                tower.shape(TN_MM_INP_PROJ, { tower.get(TN_MM_INP_PROJ)->ne[0], tower.n_embd, 1, 1 });
                tower.type(TN_MM_INP_PROJ, { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }); // it is transposed
            } else if (type == PROJECTOR_TYPE_IDEFICS3) {
                const int edge = tower.hparams.image_longest_edge; // 0: none
                tower.want(tower.hparams.n_merge > 1 && edge >= 0 && edge <= 8192, "a picture must have up to 8192 pixels and be merged");
                tower.linear("mm.model.fc", n_merged);
            } else {
                tower.want(!tower.hparams.image_res_candidates.empty(), "a picture must be cut into 1 tile or more");
                tower.vector(TN_CLASS_EMBD, tower.n_embd);
                tower.vector("mm.model.mlp.0.weight", n_merged);
                tower.vector("mm.model.mlp.0.bias", n_merged);
                tower.linear("mm.model.mlp.3", tower.linear("mm.model.mlp.1", n_merged));
            }
            break;
        case PROJECTOR_TYPE_MBQ_ANYRES:
            tower.heads(false);
            tower.patches(false);
            tower.positions(tower.find(TN_CLASS_EMBD) != nullptr);
            if (tower.find(TN_CLASS_EMBD) != nullptr) {
                tower.vector(TN_CLASS_EMBD, tower.n_embd);
            }
            tower.layers(false, false, true);
            tower.anyres();
            break;
        default:
            break;
    }
}
