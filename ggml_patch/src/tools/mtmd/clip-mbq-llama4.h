#pragma once

// Llama 4's tower. Upstream omits the last of the two transpositions of pixel shuffle, so that its tokens are ordered by columns. Here they are
// ordered by rows, as in transformers (Llama4VisionPixelShuffleMLP).

#include "models/models.h"

struct clip_graph_mbq_llama4 : clip_graph_llama4 {
    using clip_graph_llama4::clip_graph_llama4;

    ggml_cgraph * build() override {
        clip_graph_llama4::build();
        ggml_tensor * cur = ggml_graph_node(gf, -1);
        const int64_t n = cur->ne[0], width = n_patches_x/hparams.n_merge, height = n_patches_y/hparams.n_merge;
        cur = ggml_permute(ctx0, ggml_reshape_3d(ctx0, cur, n, height, width), 0, 2, 1, 3);
        ggml_build_forward_expand(gf, ggml_cont_2d(ctx0, cur, n, width*height));
        return gf;
    }
};
