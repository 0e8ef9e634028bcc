#pragma once

// Products of one column fused with the nodes that read them, and with other products of the same column, in one kernel (mbq_w4a8_mmv):
//
//   MUL_MAT, ADD             a bias, or the residual stream; or nothing. Up to three: q, k and v, the later ones ahead of their turn
//   MUL_MAT, MUL_MAT, GLU    gate and up, in either order, and SwiGLU
//
// The bits are those of the separate nodes: products are exact, and the expressions after them are upstream's (binbcast.cu, unary.cu), with the same compiler
// options.

#include "mbq-w4a8-column.cuh"
#include "mbq-w4a8-launch.cuh"

static mbq_w4a8_mmv_matrix mbq_w4a8_matrix_of(const mbq_w4a8_sum & s) {
    return { (const char *) s.product->src[0]->data, (float *) s.out->data, s.bias ? (const float *) s.bias->data : nullptr, (int) s.product->ne[0], 0 };
}

// n matrices by the column of a product
template <int bits, mbq_w4a8_columns columns>
static void mbq_w4a8_run_one(ggml_backend_cuda_context & ctx, const ggml_tensor * product, const mbq_w4a8_mmv_matrix * matrices, const int n) {
    const mbq_w4a8_matrix m = mbq_w4a8_matrix_of(product, 0, 0);
    int64_t rows = 0;
    for (int i = 0; i < (columns == MBQ_W4A8_ONE ? n : 1); ++i) {
        rows += GGML_PAD(matrices[i].M, 16);
    }
    const mbq_w4a8_mmv_plan plan = mbq_w4a8_plan_few<bits>(ctx, m, rows);
    GGML_ASSERT(plan.kw > 0);
    mbq_w4a8_launch_mmv<bits, columns>(ctx, m, matrices, n, plan, {});
}

static bool mbq_w4a8_fuse_sums(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    std::vector<int> & early = mbq_w4a8_inputs(ctx).early;
    const std::vector<mbq_w4a8_sum> sums = mbq_w4a8_sums_from(ctx, graph, i, MBQ_W4A8_MATRICES, early);
    if (sums.empty() || (sums.size() == 1 && !sums[0].bias)) {
        return false;
    }
    mbq_w4a8_mmv_matrix matrices[MBQ_W4A8_MATRICES];
    for (size_t k = 0; k < sums.size(); ++k) {
        matrices[k] = mbq_w4a8_matrix_of(sums[k]);
        early.push_back(sums[k].node);
    }
    const auto run = sums[0].product->src[0]->type == GGML_TYPE_Q4_0 ? &mbq_w4a8_run_one<4, MBQ_W4A8_ONE> : &mbq_w4a8_run_one<8, MBQ_W4A8_ONE>;
    run(ctx, sums[0].product, matrices, sums.size());
    return true;
}

static bool mbq_w4a8_fuse_gate(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (!ggml_can_fuse_subgraph(graph, i, { GGML_OP_MUL_MAT, GGML_OP_MUL_MAT, GGML_OP_GLU }, { i + 2 })) {
        return false;
    }
    ggml_tensor * const * n = graph->nodes + i;
    const ggml_tensor * gate = n[2]->src[0];
    const ggml_tensor * up   = n[2]->src[1];
    if (ggml_get_glu_op(n[2]) != GGML_GLU_OP_SWIGLU || ggml_get_op_params_i32(n[2], 1) != 0 || !((gate == n[0] && up == n[1]) || (gate == n[1] && up == n[0]))) {
        return false;
    }
    if (!mbq_w4a8_one_column(ctx, gate) || !mbq_w4a8_one_column(ctx, up) || !ggml_are_same_shape(gate, up) || !mbq_w4a8_same_column(gate, up) ||
            !mbq_w4a8_reads_apart(up, n[2])) {
        return false;
    }
    const mbq_w4a8_mmv_matrix matrices[] = { mbq_w4a8_matrix_of({ i, up, nullptr, n[2] }), mbq_w4a8_matrix_of({ i, gate, nullptr, n[2] }) };
    const auto run = up->src[0]->type == GGML_TYPE_Q4_0 ? &mbq_w4a8_run_one<4, MBQ_W4A8_GATED> : &mbq_w4a8_run_one<8, MBQ_W4A8_GATED>;
    run(ctx, up, matrices, 2);
    return true;
}

// Runs node i if possible, and returns how many of the following nodes have run with it
static int mbq_w4a8_fuse_one(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (!mbq_w4a8_one_column(ctx, graph->nodes[i])) {
        return 0;
    }
    return mbq_w4a8_fuse_gate(ctx, graph, i) ? 2 : mbq_w4a8_fuse_sums(ctx, graph, i) ? 1 : 0;
}
