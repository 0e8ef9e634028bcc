#pragma once

// Included by mtmd-mbq-preprocessors-impl.h. Follows transformers (Llama4ImageProcessor: get_best_fit in float,
// get_max_res_without_distortion in double).

#include "mtmd-image.h"

#include <algorithm>
#include <cmath>

// chooses a canvas of up to 16 tiles: the smallest that the picture fits into; otherwise the one that shrinks it least, and among equal
// ones the smallest. No two with the same area are equal.
clip_image_size mtmd_mbq_llama4::canvas(const clip_image_size & size) const {
    const int tile = hparams.image_size, max_tiles = 16;
    clip_image_size best = { tile, tile };
    float best_scale = 0.0f;
    for (int rows = 1; rows <= max_tiles; ++rows) {
        for (int columns = 1; columns <= max_tiles/rows; ++columns) {
            const float scale = std::min((float) (columns*tile)/(float) size.width, (float) (rows*tile)/(float) size.height);
            const bool better = scale >= 1.0f ? best_scale < 1.0f || scale < best_scale : scale > best_scale;
            if (better || (scale == best_scale && rows*columns*tile*tile < best.width*best.height)) {
                best = { columns*tile, rows*tile };
                best_scale = scale;
            }
        }
    }
    return best;
}

mtmd_image_preproc_out mtmd_mbq_llama4::preprocess(const clip_image_u8 & img) const {
    const clip_image_size size = img.get_size(), target = canvas(size);
    const int tile = hparams.image_size, columns = target.width/tile, rows = target.height/tile;

    // not enlarged, except to one tile
    const int width = std::min(std::max(size.width, tile), target.width), height = std::min(std::max(size.height, tile), target.height);
    const double scale_x = (double) width/size.width, scale_y = (double) height/size.height;
    const clip_image_size inner = scale_x < scale_y ?
        clip_image_size{ width, std::max(std::min((int) std::floor(size.height*scale_x), height), 1) } :
        clip_image_size{ std::max(std::min((int) std::floor(size.width*scale_y), width), 1), height };

    clip_image_u8 scaled, padded, whole;
    img_tool::resize(img, scaled, inner, RESIZE_ALGO_BILINEAR, PAD_NONE);
    padded.set_size(target, img.is_placeholder());
    img_tool::fill(padded, { 0, 0, 0 });
    img_tool::composite(padded, scaled, 0, 0);

    mtmd_image_preproc_out output;
    if (rows*columns == 1) {
        output.append_overview(hparams, padded);
        return output;
    }
    img_tool::resize(img, whole, { tile, tile }, RESIZE_ALGO_BILINEAR, PAD_NONE);
    output.append_overview(hparams, whole);
    for (int i = 0; i < rows*columns; ++i) {
        clip_image_u8 part;
        img_tool::crop(padded, part, i%columns*tile, i/columns*tile, tile, tile);
        output.append(hparams, part);
    }
    output.grid_x = columns;
    output.grid_y = rows;
    return output;
}
