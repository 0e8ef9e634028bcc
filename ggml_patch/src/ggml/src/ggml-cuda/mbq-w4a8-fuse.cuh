#pragma once

// Nodes that are fused with the quantisation for the next product: RMS norm times weight (mbq-w4a8-norm.cuh), LayerNorm times weight plus bias
// (mbq-w4a8-layer-norm.cuh), and activation functions (mbq-w4a8-activation.cuh). This file finds them in a graph, and the nodes that read their results.

#include "mbq-f16-inputs.cuh"
#include "mbq-w4a8-layer-norm.cuh"

// The nodes that read x, the result of node i, as int8
struct mbq_w4a8_fusion {
    mbq_w4a8_activations x;
    mbq_w4a8_readers readers;
    bool floats; // also read as floats, or possibly so: a graph output, another reader, or a callback, which asks for the last node of a graph
};

static mbq_w4a8_fusion mbq_w4a8_readers_of(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    const ggml_tensor * x = graph->nodes[i];
    mbq_w4a8_fusion f = { { x, nullptr, x->ne[1] > MBQ_W4A8_FEW_COLUMNS ? MBQ_W4A8_TILES : MBQ_W4A8_RECORDS }, {}, true };
    if (x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && x->ne[2]*x->ne[3] == 1 && GGML_PAD(x->ne[0], 256)*sizeof(float) <= mbq_w4a8_room(ctx)) {
        f.x.ranges = mbq_w4a8_next_ranges(ctx, graph, i, x);
        f.readers  = mbq_w4a8_readers_after(ctx, graph, i, f.x);
        f.floats   = ggml_node_get_use_count(graph, i) != f.readers.count || (x->flags & GGML_TENSOR_FLAG_OUTPUT) || f.readers.last == graph->n_nodes - 1;
    }
    return f;
}

static mbq_w4a8_fused_args mbq_w4a8_hold_fused(ggml_backend_cuda_context & ctx, const mbq_w4a8_fusion & f, const int n_flags) {
    const ggml_tensor * x = f.x.x;
    const mbq_w4a8_int8 & to = mbq_w4a8_inputs(ctx).hold(ctx.pool(), f.x, f.x.order == MBQ_W4A8_TILES ? n_flags : 0, f.readers.last, f.floats);
    mbq_w4a8_fused_args args = {};
    args.out        = f.floats ? (float *) x->data : nullptr;
    args.out_column = x->ne[0];
    args.q          = to.q;
    args.scale      = to.scale;
    args.flags      = to.flags;
    args.n_flags    = to.n_flags;
    args.K          = x->ne[0];
    args.padded     = GGML_PAD(x->ne[0], 256);
    args.ranges     = mbq_w4a8_ranges_of(f.x.ranges);
    return args;
}

// For a norm whose result no such product reads. If products of F16 weights read it, it is stored as F16. LayerNorm with weight and bias is also stored as
// floats, by one kernel instead of three.
static mbq_w4a8_fused_args mbq_w4a8_norm_alone(const ggml_tensor * out, half * halves) {
    mbq_w4a8_fused_args args = {};
    args.out        = halves ? nullptr : (float *) out->data;
    args.halves     = halves;
    args.out_column = out->ne[0];
    args.K          = out->ne[0];
    args.padded     = GGML_PAD(out->ne[0], 256);
    return args;
}

static bool mbq_w4a8_can_be_alone(const ggml_backend_cuda_context & ctx, const ggml_tensor * x, const ggml_tensor * out) {
    return out->type == GGML_TYPE_F32 && ggml_is_contiguous(out) && out->ne[2]*out->ne[3] == 1 && GGML_PAD(out->ne[0], 256)*sizeof(float) <= mbq_w4a8_room(ctx) &&
        ((x->data == out->data && x->nb[1] == out->nb[1]) || !mbq_overlap(x, out)); // a CTA has read its column before it writes it
}

// Runs NORM or RMS_NORM, MUL by a weight and, after NORM, ADD of a bias. Returns how many nodes after i have run with it
static int mbq_w4a8_fuse_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int n_flags) {
    const ggml_tensor * norm = graph->nodes[i];
    if ((norm->op != GGML_OP_NORM && norm->op != GGML_OP_RMS_NORM) || !ggml_can_fuse(graph, i, { norm->op, GGML_OP_MUL })) {
        return 0;
    }
    const bool rms = norm->op == GGML_OP_RMS_NORM;
    const int behind = !rms && ggml_can_fuse(graph, i, { GGML_OP_NORM, GGML_OP_MUL, GGML_OP_ADD }) ? 2 : 1;
    const ggml_tensor * x = norm->src[0];
    const ggml_tensor * read[2] = {}; // weight and bias
    for (int j = 0; j < behind; ++j) {
        const ggml_tensor * node = graph->nodes[i + 1 + j];
        const ggml_tensor * t = node->src[node->src[0] == graph->nodes[i + j]];
        if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t) || t->ne[0] != x->ne[0] || ggml_nelements(t) != x->ne[0]) {
            return 0;
        }
        read[j] = t;
    }
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float)) {
        return 0;
    }
    const mbq_w4a8_fusion f = mbq_w4a8_readers_of(ctx, graph, i + behind);
    const bool alone = f.readers.count == 0;
    const ggml_tensor * out = graph->nodes[i + behind];
    half * halves = nullptr;
    if (alone) {
        if (!mbq_w4a8_can_be_alone(ctx, x, out) || mbq_overlap(read[0], out) || (read[1] && mbq_overlap(read[1], out))) {
            return 0;
        }
        halves = mbq_overlap(x, out) ? nullptr : mbq_f16_hold(ctx, graph, i + behind);
        if (!halves && behind != 2) {
            return 0;
        }
    }
    mbq_w4a8_fused_args args = alone ? mbq_w4a8_norm_alone(out, halves) : mbq_w4a8_hold_fused(ctx, f, n_flags);
    args.x        = (const float *) x->data;
    args.y        = (const float *) read[0]->data;
    args.z        = read[1] ? (const float *) read[1]->data : nullptr;
    args.x_column = x->nb[1]/sizeof(float);
    args.eps      = ggml_get_op_params_f32(norm, 0);
    const bool tiled = f.x.order == MBQ_W4A8_TILES;
    const auto of_rms   = tiled ? &mbq_w4a8_launch_norm<true> : &mbq_w4a8_launch_norm<false>;
    const auto of_layer = tiled ? &mbq_w4a8_launch_layer_norm<true> : &mbq_w4a8_launch_layer_norm<false>;
    (rms ? of_rms : of_layer)(ctx, args, norm->ne[1]);
    return behind;
}
