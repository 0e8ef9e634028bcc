#pragma once

// Included by mtmd-mbq-preprocessors.h.

// preprocesses pictures of LLaVA-NeXT and LLaVA-OneVision (clip-mbq-anyres.h)
struct mtmd_mbq_anyres : mtmd_image_preprocessor {
    mtmd_mbq_anyres(const clip_ctx * ctx) : mtmd_image_preprocessor(ctx) {}

    // the whole picture, then its tiles, as one stack
    mtmd_image_preproc_out preprocess(const clip_image_u8 & img) const override;

    // OneVision tiles a picture only if it is the only one; otherwise each is one tile, centred in a square
    mtmd_image_preproc_out preprocess_among(const clip_image_u8 & img, int n_pictures) const override;

private:
    clip_image_size best_resolution(const clip_image_size & size) const;
};
