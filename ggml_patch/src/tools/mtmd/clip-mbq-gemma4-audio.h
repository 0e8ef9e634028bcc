#pragma once

#include "clip-mbq-towers.h"

// Checks like clip-mbq-towers.h, for Gemma 4's audio tower, a Conformer (tools/mtmd/models/gemma4a.cpp). Chunk and kernel sizes and the range of
// attention are constants in upstream's graph.

struct clip_mbq_gemma4_audio : clip_mbq_tower {
    explicit clip_mbq_gemma4_audio(const clip_mbq_tower & tower) : clip_mbq_tower(tower) {}

    void check() const {
        want(hparams.n_layer > 0 && hparams.n_head > 0 && n_embd > 0 && n_embd % hparams.n_head == 0, "heads do not divide the width");
        want(n_embd % 2 == 0, "positions are sines and cosines of an even width");
        subsampling();
        for (int il = 0; il < hparams.n_layer; ++il) {
            const std::string blk = "a.blk." + std::to_string(il) + ".";
            half_step(blk, "");
            attention(blk);
            convolution(blk);
            half_step(blk, "_1");
            vector_if(blk + "ln2.weight", n_embd);
        }
        const int64_t n = find("a.pre_encode.out.weight") != nullptr ? linear("a.pre_encode.out", n_embd) : n_embd;
        vector_if("mm.a.soft_emb_norm.weight", n);
        linear("mm.a.input_projection", n);
    }

private:
    // each of two convolutions halves frequencies and frames
    void subsampling() const {
        int64_t channels = 1, frequencies = hparams.n_mel_bins;
        for (int i = 0; i < 2; ++i) {
            const std::string conv = "a.conv1d." + std::to_string(i) + ".";
            const int64_t n_out = get(conv + "weight")->ne[3];
            kernel(conv + "weight", 3, channels, n_out);
            none((conv + "bias").c_str()); // the graph would add it to frequencies
            vector_if(conv + "norm.weight", n_out);
            channels = n_out;
            frequencies = (frequencies - 1)/2 + 1;
        }
        linear("a.input_projection", channels*frequencies, n_embd);
    }

    void half_step(const std::string & blk, const std::string & number) const {
        vector(blk + "ffn_norm" + number + ".weight", n_embd);
        linear(blk + "ffn_down" + number, linear(blk + "ffn_up" + number, n_embd), n_embd);
        vector_if(blk + "ffn_post_norm" + number + ".weight", n_embd);
    }

    void attention(const std::string & blk) const {
        for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_k_rel", "attn_out" }) {
            linear(blk + name, n_embd, n_embd);
        }
        for (const char * name : { "ln1.weight", "attn_pre_norm.weight", "attn_post_norm.weight" }) {
            vector_if(blk + name, n_embd);
        }
        vector_if(blk + "per_dim_scale.weight", d_head);
        vector_if(blk + "per_dim_k_scale.weight", d_head);
    }

    void convolution(const std::string & blk) const {
        vector_if(blk + "conv_norm.weight", n_embd);
        vector_if(blk + "norm_conv.weight", n_embd);
        linear(blk + "conv_pw1", n_embd, 2*n_embd);
        shape(blk + "conv_dw.weight", { 5, n_embd, 1, 1 });
        type(blk + "conv_dw.weight", { GGML_TYPE_F32 });
        vector_if(blk + "conv_dw.bias", n_embd);
        linear(blk + "conv_pw2", n_embd, n_embd);
    }
};
