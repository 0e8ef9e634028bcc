#include "mbq-w4a8.cuh"
#include "mbq-cast.cuh"
#include "mbq-f16.cuh"
#include "mbq-qkv-early.cuh"
#include "mbq-w4a8-activation.cuh"
#include "mbq-w4a8-added.cuh"
#include "mbq-w4a8-launch.cuh"
#include "mbq-w4a8-one.cuh"
#include "mbq-w4a8-place.cuh"

int64_t ggml_cuda_w4a8_count(const ggml_cuda_w4a8_counted what) {
    return mbq_w4a8_counts[what];
}

void ggml_cuda_w4a8_keep(const ggml_cgraph * graph, const std::function<void(size_t, size_t)> & keep) {
    int kept = 0; // up to this node
    for (int i = 0; i < graph->n_nodes; ++i) {
        if (const int last = mbq_w4a8_early_until(graph, i); last > std::max(i, kept)) {
            keep(i, last);
            kept = last;
        }
        if (const int last = mbq_qkv_until(graph, i); last > i) {
            keep(i, last);
        }
    }
}

bool ggml_cuda_f16_queries(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    return mbq_w4a8_inputs(ctx).attention == dst;
}

const ggml_tensor * ggml_cuda_f16_values(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    return inputs.attention == dst ? inputs.values : nullptr;
}

// The node after the current one if it is a RESHAPE of its result and the only reader; -1: another node
static int mbq_w4a8_reshape_behind(const ggml_cuda_w4a8_inputs & inputs, const ggml_tensor * node) {
    const int i = inputs.node + 1;
    if (!inputs.runs(node) || i >= inputs.graph->n_nodes) {
        return -1;
    }
    const ggml_tensor * reshape = inputs.graph->nodes[i];
    const bool alone = reshape->op == GGML_OP_RESHAPE && reshape->src[0] == node && reshape->data == node->data &&
        ggml_node_get_use_count(inputs.graph, inputs.node) == 1 && !(node->flags & GGML_TENSOR_FLAG_OUTPUT);
    return alone ? i : -1;
}

bool ggml_cuda_f16_result(ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    const int i = mbq_w4a8_reshape_behind(mbq_w4a8_inputs(ctx), node);
    return i > 0 && mbq_f16_hold(ctx, mbq_w4a8_inputs(ctx).graph, i);
}

mbq_w4a8_codes ggml_cuda_w4a8_result(ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    const int i = mbq_w4a8_reshape_behind(mbq_w4a8_inputs(ctx), node);
    const mbq_w4a8_codes codes = i > 0 ? mbq_w4a8_place(ctx, mbq_w4a8_inputs(ctx).graph, i, MBQ_W4A8_NONE) : mbq_w4a8_codes {};
    mbq_w4a8_counts[GGML_CUDA_W4A8_PLACED] += codes.q != nullptr;
    return codes;
}

template <int bits>
static void mbq_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m) {
    const mbq_w4a8_order order = mbq_w4a8_order_in<bits>(ctx, m);
    if (order == MBQ_W4A8_FLOATS && m.N > 1) {
        for (int64_t i = 0; i < m.N; i += MBQ_W4A8_FEW_COLUMNS) {
            mbq_w4a8_matrix part = m;
            part.x   += i*m.x_column;
            part.dst += i*m.dst_column;
            part.ranges.range = m.ranges.range ? m.ranges.range + i*m.ranges.stride : nullptr;
            part.N    = std::min<int64_t>(m.N - i, MBQ_W4A8_FEW_COLUMNS);
            mbq_w4a8_mul_mat<bits>(ctx, part);
        }
        return;
    }
    ggml_cuda_pool_alloc<char> memory(ctx.pool());
    mbq_w4a8_int8 x = {};
    if (order != MBQ_W4A8_FLOATS) {
        const int n_flags = mbq_w4a8_n_flags(ctx, order);
        x = mbq_w4a8_int8::at(memory.alloc(mbq_w4a8_int8::bytes(m.K, m.N, order, n_flags)), m.K, m.N, order, n_flags);
        mbq_w4a8_quantise(ctx, m, order, x);
    }
    mbq_w4a8_product<bits>(ctx, &m, 1, order, x);
}

// For a whole product
static mbq_w4a8_order mbq_w4a8_order_of(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    if (!mbq_w4a8_takes_whole(dst)) {
        return MBQ_W4A8_FLOATS;
    }
    const mbq_w4a8_matrix m = mbq_w4a8_matrix_of(dst, 0, 0);
    return src0->type == GGML_TYPE_Q4_0 ? mbq_w4a8_order_in<4>(ctx, m) : mbq_w4a8_order_in<8>(ctx, m);
}

// Runs the product dst at the current node, described by the first of n matrices, and the others, if later products read the same activations. Returns whether
// it ran.
static bool mbq_w4a8_mul_mat_shared(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const mbq_w4a8_matrix * m, const int n) {
    const mbq_w4a8_order order = mbq_w4a8_order_of(ctx, dst);
    bool found = true;
    const auto quantise = [&](const mbq_w4a8_int8 & to) {
        mbq_w4a8_quantise(ctx, m[0], order, to);
        found = false;
    };
    const mbq_w4a8_int8 * x = mbq_w4a8_share(ctx, dst, order, mbq_w4a8_n_flags(ctx, order), quantise);
    if (!x) {
        return false;
    }
    mbq_w4a8_counts[GGML_CUDA_W4A8_FOUND] += found ? n : n - 1;
    const auto product = dst->src[0]->type == GGML_TYPE_Q4_0 ? &mbq_w4a8_product<4> : &mbq_w4a8_product<8>;
    product(ctx, m, n, order, *x);
    mbq_w4a8_inputs(ctx).read();
    return true;
}

// Runs the product of many columns at node i with the nodes added to it and with other products, and returns how many of the following nodes have run with it
static int mbq_w4a8_fuse_added(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    const ggml_tensor * dst = graph->nodes[i];
    if (!mbq_w4a8_of_tiles(ctx, dst)) {
        return 0;
    }
    std::vector<int> & early = mbq_w4a8_inputs(ctx).early;
    const mbq_w4a8_added a = mbq_w4a8_added_to(graph, i);
    const auto others = mbq_w4a8_others_of(ctx, graph, i, early);
    const bool adjacent = !others.empty() && others[0].first == i + 1; // gate and up
    const bool next     = i + 1 < graph->n_nodes && ggml_op_is_empty(graph->nodes[i + 1]->op);
    const mbq_w4a8_codes codes = others.empty() ? mbq_w4a8_place_gelu(ctx, graph, i, a) : mbq_w4a8_codes {};
    const bool alone = a.nodes == 0 && !codes.q;
    if (alone && (others.empty() || !(next || adjacent))) {
        return 0;
    }
    mbq_w4a8_matrix m[MBQ_W4A8_MATRICES] = { mbq_w4a8_matrix_of(dst, a) };
    m[0].codes = codes;
    int n = 1;
    for (const auto & other : others) {
        m[n++] = mbq_w4a8_matrix_of(graph->nodes[other.first], other.second);
    }
    std::vector<int> made = early;
    for (const auto & other : others) {
        if (other.first > i + 1) {
            made.push_back(other.first);
        }
    }
    const mbq_w4a8_matrix plain = m[0];
    const mbq_qkv_ready ready = n == 3 ? mbq_qkv_make_ready(ctx, graph, i, made, m) : mbq_qkv_ready {};
    if (mbq_w4a8_mul_mat_shared(ctx, dst, m, n)) {
        early = made;
        if (ready.values) {
            mbq_w4a8_inputs(ctx).values = ready.values;
            mbq_w4a8_inputs(ctx).turned = ready.turned;
        }
        mbq_w4a8_counts[GGML_CUDA_W4A8_VALUES]  += ready.values != nullptr;
        mbq_w4a8_counts[GGML_CUDA_W4A8_TURNED]  += ready.turned != nullptr;
        mbq_w4a8_counts[GGML_CUDA_W4A8_TOGETHER] += n > 1;
    } else if (!alone) {
        const auto mul_mat = dst->src[0]->type == GGML_TYPE_Q4_0 ? &mbq_w4a8_mul_mat<4> : &mbq_w4a8_mul_mat<8>;
        mul_mat(ctx, plain);
    } else {
        return 0;
    }
    mbq_w4a8_counts[GGML_CUDA_W4A8_ADDED]  += a.nodes > 0;
    mbq_w4a8_counts[GGML_CUDA_W4A8_PLACED] += codes.q != nullptr;
    return codes.q ? a.nodes + 1 : adjacent ? 1 + others[0].second.nodes : std::max(a.nodes, 1);
}

bool ggml_cuda_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    if (!mbq_w4a8_takes(dst)) {
        return false;
    }
    GGML_ASSERT(src0->nb[0] == ggml_type_size(src0->type) && src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    const mbq_w4a8_matrix whole = mbq_w4a8_matrix_of(dst, 0, 0);
    if (mbq_w4a8_mul_mat_shared(ctx, dst, &whole, 1)) {
        return true;
    }
    for (int64_t i3 = 0; i3 < dst->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < dst->ne[2]; ++i2) {
            const auto mul_mat = src0->type == GGML_TYPE_Q4_0 ? &mbq_w4a8_mul_mat<4> : &mbq_w4a8_mul_mat<8>;
            mul_mat(ctx, mbq_w4a8_matrix_of(dst, i2, i3));
        }
    }
    return true;
}

int ggml_cuda_w4a8_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    inputs.step(ctx, graph, i);
    if (mbq_w4a8_is_in(inputs.early, i)) {
        return 1;
    }
    if (const int behind = mbq_cast_two(ctx, graph, i)) {
        return behind;
    }
    if (!inputs.graph) {
        return 0;
    }
    if (const int behind = mbq_qkv_fuse(ctx, graph, i)) {
        mbq_w4a8_counts[GGML_CUDA_W4A8_QKV]++;
        return behind;
    }
    if (const int behind = mbq_f16_fuse(ctx, graph, i)) {
        return behind;
    }
    if (const int behind = mbq_w4a8_fuse_added(ctx, graph, i)) {
        return behind;
    }
    if (inputs.memory) {
        return 0;
    }
    if (const int behind = mbq_w4a8_fuse_one(ctx, graph, i)) {
        mbq_w4a8_counts[GGML_CUDA_W4A8_ONE_COLUMN]++;
        return behind;
    }
    const int n_flags = mbq_w4a8_n_flags(ctx, MBQ_W4A8_TILES);
    if (const int behind = mbq_w4a8_fuse_norm(ctx, graph, i, n_flags)) {
        mbq_w4a8_counts[GGML_CUDA_W4A8_NORM] += inputs.memory.has_value();
        return behind;
    }
    const int made = mbq_w4a8_fuse_activation(ctx, graph, i, n_flags);
    if (made < 0) {
        return 0;
    }
    mbq_w4a8_counts[GGML_CUDA_W4A8_GLU]++;
    if (made > i) {
        return made - i;
    }
    inputs.step(ctx, graph, i + 1); // the function did not run any node after it, and to the caller 0 means that nothing was fused
    if (const int behind = mbq_w4a8_fuse_added(ctx, graph, i + 1)) {
        return 1 + behind;
    }
    ggml_tensor * product = graph->nodes[i + 1];
    GGML_ASSERT(ggml_cuda_w4a8_mul_mat(ctx, product->src[0], product->src[1], product));
    return 1;
}
