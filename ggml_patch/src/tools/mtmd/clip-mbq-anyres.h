#pragma once

// Pictures of LLaVA-NeXT and LLaVA-OneVision ("anyres"): the downscaled whole picture, then its tiles. The tiles' tokens are merged row by row,
// padding is removed, they are downscaled if there are too many (OneVision), and a newline is added after each row.
//
// Follows transformers (LlavaNextModel, LlavaOnevisionModel: pack_image_features), in double as there. A picture comes as a stack of tiles with
// the whole picture first (mtmd-mbq-anyres-impl.h); tiles are a separate dimension in attention, as in clip_graph::build_vit.

#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"

#include <cmath>

// the positions of a picture's tokens in the grid of its tiles, and the size that they are downscaled to
struct clip_mbq_anyres_layout {
    int width, height; // tokens of the grid
    int left = 0, top = 0; // padding of the grid, on either side
    int columns, rows; // of the tokens that the language model gets, without newlines

    // side: tokens along a side of a tile; max_tiles: limits the tokens to those of this many tiles (0: no limit)
    clip_mbq_anyres_layout(const clip_image_f32::anyres_info & grid, const int side, const int max_tiles) :
        width(grid.grid_x*side), height(grid.grid_y*side) {
        if ((double) grid.orig_nx/grid.orig_ny > (double) width/height) {
            top = (height - whole(grid.orig_ny*((double) width/grid.orig_nx)))/2;
        } else {
            left = (width - whole(grid.orig_nx*((double) height/grid.orig_ny)))/2;
        }
        columns = width  - 2*left;
        rows    = height - 2*top;
        const double ratio = max_tiles > 0 ? std::sqrt((double) rows*columns/((double) max_tiles*side*side)) : 0.0;
        if (ratio > 1.1) {
            columns = quotient(columns, ratio);
            rows    = quotient(rows,    ratio);
        }
    }

    int tokens() const {
        return rows*(columns + 1);
    }

private:
    // Python's int(round(x, 7))
    static int whole(const double x) {
        return (int) (std::nearbyint(x*1e7)/1e7);
    }

    // Python's x // y
    static int quotient(const double x, const double y) {
        const double exact = (x - std::fmod(x, y))/y, below = std::floor(exact);
        return (int) (exact - below > 0.5 ? below + 1 : below);
    }
};

static int clip_mbq_anyres_tokens(const clip_image_f32 & img, const clip_hparams & hparams) {
    const int side = hparams.image_size/hparams.patch_size;
    return side*side + (img.anyres.is_tiled() ? clip_mbq_anyres_layout(img.anyres, side, hparams.preproc_max_tiles).tokens() : 1);
}

struct clip_graph_mbq_anyres : clip_graph {
    const int size, side, n_tiles; // pixels and patches along a side of a tile; patches may not cover all pixels

    clip_graph_mbq_anyres(clip_ctx * ctx, const clip_image_f32 & img) :
        clip_graph(ctx, img), size(img.nx()), side(img.nx()/patch_size), n_tiles(img.ny()/img.nx()) {}

    // [n_embd, patches of a tile, tiles], starting with the class token if there is one
    ggml_tensor * patches() {
        ggml_tensor * cur = ggml_reshape_3d(ctx0, build_inp_raw(), size*size, n_tiles, 3);
        cur = ggml_cont_4d(ctx0, ggml_permute(ctx0, cur, 0, 2, 1, 3), size, size, 3, n_tiles);
        cur = ggml_conv_2d(ctx0, model.patch_embeddings_0, cur, patch_size, patch_size, 0, 0, 1, 1);
        cur = ggml_reshape_3d(ctx0, cur, side*side, n_embd, n_tiles);
        cur = ggml_cont(ctx0, ggml_transpose(ctx0, cur));
        if (model.patch_bias) {
            cur = ggml_add(ctx0, cur, model.patch_bias);
        }
        if (model.class_embedding) {
            cur = ggml_concat(ctx0, ggml_repeat_4d(ctx0, model.class_embedding, n_embd, 1, n_tiles, 1), cur, 1);
        }
        return cur;
    }

    // [width, columns, rows]
    ggml_tensor * shrunk(ggml_tensor * cur, const int columns, const int rows) {
        const int64_t width = cur->ne[0];
        cur = ggml_cont(ctx0, ggml_permute(ctx0, cur, 2, 0, 1, 3));
        cur = ggml_interpolate(ctx0, cur, columns, rows, width, 1, GGML_SCALE_MODE_BILINEAR);
        return ggml_cont(ctx0, ggml_permute(ctx0, cur, 1, 2, 0, 3));
    }

    // arranges the tokens of all tiles but the first in rows of the grid, with a newline after each
    ggml_tensor * rows(ggml_tensor * cur, ggml_tensor * newline) {
        const auto & grid = img.anyres;
        const int64_t width = cur->ne[0];
        const clip_mbq_anyres_layout layout(grid, side, hparams.preproc_max_tiles);
        cur = ggml_view_3d(ctx0, cur, width, side*side, n_tiles - 1, cur->nb[1], cur->nb[2], cur->nb[2]);
        cur = ggml_reshape_4d(ctx0, cur, width*side, side, grid.grid_x, grid.grid_y);
        cur = ggml_cont_3d(ctx0, ggml_permute(ctx0, cur, 0, 2, 1, 3), width, layout.width, layout.height);
        const int columns = layout.width - 2*layout.left, rows = layout.height - 2*layout.top;
        cur = ggml_view_3d(ctx0, cur, width, columns, rows, cur->nb[1], cur->nb[2], layout.left*cur->nb[1] + layout.top*cur->nb[2]);
        if (layout.columns != columns || layout.rows != rows) {
            cur = shrunk(cur, layout.columns, layout.rows);
        }
        cur = ggml_concat(ctx0, ggml_cont(ctx0, cur), ggml_repeat_4d(ctx0, newline, width, 1, layout.rows, 1), 1);
        return ggml_reshape_2d(ctx0, cur, width, layout.tokens());
    }

    ggml_cgraph * build() override {
        const int n_class = model.class_embedding ? 1 : 0;
        build_vit_opts opts;
        opts.skip_post_ln = true; // it is for the pooled output, which the projector does not read
        ggml_tensor * cur = build_vit(patches(), side*side + n_class, NORM_TYPE_NORMAL, hparams.ffn_op, model.position_embeddings, nullptr, opts);
        if (n_class > 0) {
            cur = ggml_cont(ctx0, ggml_view_3d(ctx0, cur, n_embd, side*side, n_tiles, cur->nb[1], cur->nb[2], cur->nb[1]));
        }
        cur = ggml_reshape_2d(ctx0, cur, n_embd, side*side*n_tiles);
        cur = build_ffn(cur, model.mm_0_w, model.mm_0_b, nullptr, nullptr, model.mm_2_w, model.mm_2_b, FFN_GELU_ERF, -1);
        cur = ggml_reshape_3d(ctx0, cur, cur->ne[0], side*side, n_tiles);

        ggml_tensor * newline = ggml_reshape_2d(ctx0, model.image_newline, cur->ne[0], 1);
        ggml_tensor * first   = ggml_view_2d(ctx0, cur, cur->ne[0], side*side, cur->nb[1], 0);
        cur = ggml_concat(ctx0, first, img.anyres.is_tiled() ? rows(cur, newline) : newline, 1);
        ggml_build_forward_expand(gf, cur);
        return gf;
    }
};
