#pragma once

// Included by mtmd-mbq-preprocessors.h.

// LLaVA-NeXT's and LLaVA-OneVision's pictures (clip-mbq-anyres.h)
struct mtmd_mbq_anyres : mtmd_image_preprocessor {
    mtmd_mbq_anyres(const clip_ctx * ctx) : mtmd_image_preprocessor(ctx) {}

    // the whole picture, then its tiles, stacked
    mtmd_image_preproc_out preprocess(const clip_image_u8 & img) const override;

    // OneVision cuts a picture that is alone; of several each is one tile, in the middle of a square
    mtmd_image_preproc_out preprocess_among(const clip_image_u8 & img, int n_pictures) const override;

private:
    clip_image_size best_resolution(const clip_image_size & size) const;
};
