#pragma once

#include "clip-impl.h"
#include "clip-model.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

// The picture sizes that the model was trained on, where its file holds them and its family takes sizes by their area. The command line's
// limits come first and move the file's other limit where the two cross. T has get_u32(key, output, required), as clip_model_loader does.
template <typename T>
static void clip_mbq_image_limits(const T & loader, clip_hparams & hparams) {
    if (hparams.image_min_pixels <= 0 || hparams.image_max_pixels <= 0) {
        return; // no family of dynamic size
    }
    if (hparams.custom_image_min_tokens <= 0) {
        loader.get_u32(KEY_IMAGE_MIN_PIXELS, hparams.image_min_pixels, false);
    }
    if (hparams.custom_image_max_tokens <= 0) {
        loader.get_u32(KEY_IMAGE_MAX_PIXELS, hparams.image_max_pixels, false);
    }
    if (hparams.custom_image_min_tokens > 0 && hparams.custom_image_max_tokens <= 0) {
        hparams.image_max_pixels = std::max(hparams.image_max_pixels, hparams.image_min_pixels);
    } else if (hparams.custom_image_max_tokens > 0 && hparams.custom_image_min_tokens <= 0) {
        hparams.image_min_pixels = std::min(hparams.image_min_pixels, hparams.image_max_pixels);
    }
    // no picture is larger, so neither need the one be that memory is reserved for
    const int64_t side = (int64_t) hparams.patch_size * hparams.n_merge;
    if (side > 0) {
        const int64_t most = std::max((int64_t) 1, (int64_t) std::sqrt(hparams.image_max_pixels) / side) * side;
        hparams.warmup_image_size = (int) std::min((int64_t) hparams.warmup_image_size, most);
    }
}
