#pragma once

// Included by mtmd-mbq-preprocessors.h.

#include <memory>
#include <vector>

// preprocesses pictures of Llama 4: tiles of a canvas, and if there are several, the whole picture
struct mtmd_mbq_llama4 : mtmd_image_preprocessor {
    mtmd_mbq_llama4(const clip_ctx * ctx) : mtmd_image_preprocessor(ctx) {}
    mtmd_image_preproc_out preprocess(const clip_image_u8 & img) const override;

private:
    clip_image_size canvas(const clip_image_size & size) const;
};

// sets the tokens between tiles; T is mtmd_context, lookup(text) returns a token's id
template <typename T, typename F>
static void mtmd_mbq_llama4_tiles(T & ctx, const F & lookup) {
    const auto token = [&](const char * text) {
        const llama_token id = lookup(text);
        return id == LLAMA_TOKEN_NULL ? std::vector<llama_token>{} : std::vector<llama_token>{ id };
    };
    ctx.image_preproc     = std::make_unique<mtmd_mbq_llama4>(ctx.ctx_v);
    ctx.tok_sli_img_mid   = token("<|tile_x_separator|>");
    ctx.tok_row_end       = token("<|tile_y_separator|>");
    ctx.tok_row_end_trail = true;
    ctx.tok_ov_img_start  = token("<|image|>");
}
