#pragma once

// Included by mtmd-mbq-preprocessors-impl.h. Follows transformers (LlavaNextImageProcessor, LlavaOnevisionImageProcessor;
// select_best_resolution and get_patch_output_size), in double as there.

#include "mtmd-image.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

// the resolution that keeps most of the picture; among equal ones, the one with the least padding
clip_image_size mtmd_mbq_anyres::best_resolution(const clip_image_size & size) const {
    clip_image_size best = hparams.image_res_candidates.front();
    int64_t most = 0, least_wasted = INT64_MAX;
    for (const clip_image_size & candidate : hparams.image_res_candidates) {
        const double scale = std::min((double) candidate.width/size.width, (double) candidate.height/size.height);
        const int64_t scaled = (int64_t) (size.width*scale)*(int64_t) (size.height*scale);
        const int64_t kept   = std::min(scaled, (int64_t) size.width*size.height);
        const int64_t wasted = (int64_t) candidate.width*candidate.height - kept;
        if (kept > most || (kept == most && wasted < least_wasted)) {
            most = kept;
            least_wasted = wasted;
            best = candidate;
        }
    }
    return best;
}

mtmd_image_preproc_out mtmd_mbq_anyres::preprocess(const clip_image_u8 & img) const {
    const clip_image_size size = img.get_size(), target = best_resolution(size);
    const int tile = hparams.image_size, grid_x = target.width/tile, grid_y = target.height/tile;

    clip_image_u8 whole, scaled, padded, stacked;
    img_tool::resize(img, whole, { tile, tile }, RESIZE_ALGO_BICUBIC, PAD_NONE);

    const double scale_x = (double) target.width/size.width, scale_y = (double) target.height/size.height;
    const clip_image_size inner = scale_x < scale_y ?
        clip_image_size{ target.width, std::min((int) std::ceil(size.height*scale_x), target.height) } :
        clip_image_size{ std::min((int) std::ceil(size.width*scale_y), target.width), target.height };
    img_tool::resize(img, scaled, inner, RESIZE_ALGO_BICUBIC, PAD_NONE);
    padded.set_size(target, img.is_placeholder());
    img_tool::fill(padded, { 0, 0, 0 });
    img_tool::composite(padded, scaled, (target.width - inner.width)/2, (target.height - inner.height)/2);

    stacked.set_size({ tile, tile*(1 + grid_x*grid_y) }, img.is_placeholder());
    img_tool::composite(stacked, whole, 0, 0);
    for (int i = 0; i < grid_x*grid_y; ++i) {
        clip_image_u8 part;
        img_tool::crop(padded, part, i%grid_x*tile, i/grid_x*tile, tile, tile);
        img_tool::composite(stacked, part, 0, (1 + i)*tile);
    }

    mtmd_image_preproc_out output;
    output.append(hparams, stacked);
    output.entries.back().anyres = { grid_x, grid_y, size.width, size.height };
    return output;
}

mtmd_image_preproc_out mtmd_mbq_anyres::preprocess_among(const clip_image_u8 & img, const int n_pictures) const {
    if (n_pictures < 2 || hparams.preproc_max_tiles == 0) {
        return preprocess(img);
    }
    const clip_image_size size = img.get_size();
    const int side = std::max(size.width, size.height);
    clip_image_u8 square, whole;
    square.set_size({ side, side }, img.is_placeholder());
    const auto colour = [&](const int i) { return (uint8_t) (hparams.image_mean[i]*255); };
    img_tool::fill(square, { colour(0), colour(1), colour(2) });
    img_tool::composite(square, img, (side - size.width)/2, (side - size.height)/2);
    img_tool::resize(square, whole, { hparams.image_size, hparams.image_size }, RESIZE_ALGO_BICUBIC, PAD_NONE);

    mtmd_image_preproc_out output;
    output.append(hparams, whole);
    return output;
}
