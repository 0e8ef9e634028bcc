#pragma once

// The steps between a vision tower's products and its attention (mbq-attention.cu), in one kernel if q, k and v come from one product:
//
//   q   ROPE            scaled for attention, F16 in place of the floats
//   k   ROPE, CPY       F16, heads before positions; or the product has already done this for q and k (mbq-w4a8-heads.cuh)
//   v   CPY             F16, heads before positions; or the product has stored it as F16, and attention reads it there
//
// Node by node these are four kernels that write floats for the next one: 168 MB for 4096 positions of 1280 numbers, 94 here. A CTA processes one position (see
// mbq-rope.cuh). The bits are the same: attention itself would scale and round q like this.

#include "mbq-cast.cuh"
#include "mbq-rope.cuh"
#include "mbq-w4a8-added.cuh"
#include "mbq.cuh"

struct mbq_qkv_args {
    const float * x[3]; // q, k, v: [head][n_dims pairs] of a position
    int64_t x_column;   // elements
    half * q;           // each position has the space of its floats
    half * k, * v;      // [head][position][n_dims pairs]; v == nullptr: left alone
    int threads;        // heads times quads
    float scale;        // of q
    mbq_rope_angles angles;
};

static __device__ __forceinline__ void mbq_store_halves(half * to, const float4 v) {
    const half2 h[2] = { __floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w) };
    *(int2 *) to = *(const int2 *) h;
}

static __device__ __forceinline__ float4 mbq_times(const float4 v, const float by) {
    return make_float4(v.x*by, v.y*by, v.z*by, v.w*by);
}

// Each CTA reads its position before it writes it, so q may overwrite its floats
static __global__ void __launch_bounds__(1024) mbq_qkv(const mbq_qkv_args args) {
    extern __shared__ __align__(16) float mbq_angles[];
    const int n_dims = args.angles.n_dims;
    float * cosine = mbq_angles, * sine = mbq_angles + n_dims;
    ggml_cuda_pdl_lc();
    const int quads = n_dims/4;
    const int head  = threadIdx.x/quads, d = 4*(threadIdx.x % quads);
    const bool has  = threadIdx.x < args.threads;
    ggml_cuda_pdl_sync();
    float4 a[3], b[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (i == 2 && !args.v) {
            break;
        }
        const float * x = args.x[i] + blockIdx.x*args.x_column + head*2*n_dims + d;
        a[i] = has ? *(const float4 *) x            : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        b[i] = has ? *(const float4 *) (x + n_dims) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    args.angles.make(cosine, sine);
    __syncthreads();
    if (!has) {
        return;
    }
    const float4 c = *(const float4 *) (cosine + d), s = *(const float4 *) (sine + d);
    mbq_rope_turn(a[0], b[0], c, s);
    mbq_rope_turn(a[1], b[1], c, s);
    half * q = args.q + 2*(blockIdx.x*args.x_column + head*2*n_dims) + d;
    mbq_store_halves(q,          mbq_times(a[0], args.scale));
    mbq_store_halves(q + n_dims, mbq_times(b[0], args.scale));
    const int64_t at = ((int64_t) head*gridDim.x + blockIdx.x)*2*n_dims + d;
    mbq_store_halves(args.k + at,          a[1]);
    mbq_store_halves(args.k + at + n_dims, b[1]);
    if (args.v) {
        mbq_store_halves(args.v + at,          a[2]);
        mbq_store_halves(args.v + at + n_dims, b[2]);
    }
}

// The nodes of a tower's attention, starting with its first rotary embedding
struct mbq_qkv_nodes {
    const ggml_tensor * q, * k; // rotary embeddings
    const ggml_tensor * k16, * v16;
    const ggml_tensor * attention;
    int last;                   // node v16

    const ggml_tensor * x(const int i) const { return i == 0 ? q->src[0] : i == 1 ? k->src[0] : v16->src[0]->src[0]; } // what is read
};

// Of queries, for mbq_attention
static float mbq_qkv_scale(const mbq_qkv_nodes & n) {
    return ggml_get_op_params_f32(n.attention, 0)*MBQ_ATTENTION_LOG2E;
}

// Whether t, a permuted view of the result of `made`, has heads before positions
static bool mbq_qkv_permuted(const ggml_tensor * t, const ggml_tensor * made) {
    return t->op == GGML_OP_PERMUTE && t->src[0] == made && t->data == made->data && t->ne[0] == made->ne[0] && t->ne[1] == made->ne[2] && t->ne[2] == made->ne[1] &&
        t->ne[3] == 1 && t->nb[0] == made->nb[0] && t->nb[1] == made->nb[2] && t->nb[2] == made->nb[1];
}

static bool mbq_qkv_is_cast(const ggml_tensor * t) {
    return t->op == GGML_OP_CPY && t->type == GGML_TYPE_F16 && ggml_is_contiguous(t) && t->src[0]->op == GGML_OP_PERMUTE && t->src[0]->src[0]->type == GGML_TYPE_F32 &&
        ggml_are_same_shape(t, t->src[0]);
}

// The attention whose queries get their rotary embedding at node i, and whose inputs are all computed from there on; its node, or -1
static int mbq_qkv_find(const ggml_cgraph * graph, const int i, mbq_qkv_nodes & n) {
    n = {};
    n.q = graph->nodes[i];
    if (n.q->op != GGML_OP_ROPE) {
        return -1;
    }
    int found = -1;
    for (int j = i + 1; found < 0 && j < std::min(graph->n_nodes, i + 1 + MBQ_W4A8_AHEAD); ++j) {
        found = graph->nodes[j]->op == GGML_OP_FLASH_ATTN_EXT ? j : -1;
    }
    if (found < 0) {
        return -1;
    }
    n.attention = graph->nodes[found];
    if (n.attention->src[3]) {
        return -1; // kernels with a mask have no registers left for a second kind of queries
    }
    n.k16 = n.attention->src[1];
    n.v16 = n.attention->src[2];
    if (!mbq_qkv_permuted(n.attention->src[0], n.q) || !mbq_qkv_is_cast(n.k16) || !mbq_qkv_is_cast(n.v16)) {
        return -1;
    }
    n.k = n.k16->src[0]->src[0];
    const bool chains = mbq_qkv_permuted(n.k16->src[0], n.k) && mbq_qkv_permuted(n.v16->src[0], n.x(2)) && n.k->op == GGML_OP_ROPE && n.k->src[1] == n.q->src[1];
    return chains && memcmp(n.q->op_params, n.k->op_params, sizeof(n.q->op_params)) == 0 ? found : -1;
}

// Whether one other node reads node i
static bool mbq_qkv_alone(const ggml_cgraph * graph, const int i) {
    const ggml_tensor * node = graph->nodes[i];
    return ggml_node_get_use_count(graph, i) - (node->src[1] == node) == 1 && !(node->flags & GGML_TENSOR_FLAG_OUTPUT); // ggml_cast names itself as a source
}

// Whether all nodes from i to v16 can run at once: the kernel computes all that remains, nothing else reads it, and nothing is overwritten before it is read
static bool mbq_qkv_may_run(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int attention, const std::vector<int> & made, mbq_qkv_nodes & n) {
    n.last = 0;
    for (int j = i; j < attention; ++j) {
        const ggml_tensor * node = graph->nodes[j];
        if ((node == n.q || node == n.k || node == n.attention->src[0] || node == n.k16->src[0]) && !mbq_qkv_alone(graph, j)) {
            return false;
        }
        n.last = node == n.v16 ? j : n.last;
    }
    for (int j = i + 1; j < n.last; ++j) {
        const ggml_tensor * node = graph->nodes[j];
        if (node == n.k || node == n.k16 || !mbq_w4a8_node(ctx, graph, j).runs()) {
            continue;
        }
        if (!mbq_w4a8_is_in(made, j) && !mbq_w4a8_is_in(made, j - 1)) { // see ggml_cuda_w4a8_inputs
            return false;
        }
    }
    for (const ggml_tensor * x : std::initializer_list<const ggml_tensor *>{ n.x(0), n.x(1), n.x(2), n.q->src[1] }) {
        if (mbq_overlap(x, n.k16) || mbq_overlap(x, n.v16) || (x == n.x(0) ? !mbq_w4a8_read_in_place(x, n.q) : mbq_overlap(x, n.q))) {
            return false;
        }
    }
    return n.last > 0 && !mbq_overlap(n.k16, n.v16) && !mbq_overlap(n.q, n.k16) && !mbq_overlap(n.q, n.v16);
}

static bool mbq_qkv_takes(const mbq_qkv_nodes & n) {
    for (int i = 0; i < 3; ++i) {
        const ggml_tensor * x = n.x(i);
        if (x->type != GGML_TYPE_F32 || !ggml_is_contiguous(x) || !ggml_are_same_shape(x, n.q) || (uintptr_t) x->data % 16 != 0) {
            return false;
        }
    }
    return mbq_rope_takes(n.q) && mbq_rope_takes(n.k) && ggml_is_contiguous(n.q) && ((uintptr_t) n.k16->data | (uintptr_t) n.v16->data) % 8 == 0;
}

// Whether the kernel computes q and k for the attention whose queries get their rotary embedding at node i
static bool mbq_qkv_runs(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i, const int attention, const std::vector<int> & made, mbq_qkv_nodes & n) {
    return mbq_qkv_may_run(ctx, graph, i, attention, made, n) && mbq_qkv_takes(n) && ggml_cuda_mbq_attention_takes(ctx, n.attention);
}

// Runs node i if possible, and returns how many of the following nodes have run with it
static int mbq_qkv_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    ggml_cuda_w4a8_inputs & inputs = mbq_w4a8_inputs(ctx);
    mbq_qkv_nodes n;
    const int attention = mbq_qkv_find(graph, i, n);
    if (attention < 0 || !mbq_qkv_runs(ctx, graph, i, attention, inputs.early, n)) {
        GGML_ASSERT(inputs.turned != graph->nodes[i]);
        return 0;
    }
    inputs.attention = n.attention;
    if (inputs.turned == n.q) {
        return n.last - i;
    }
    const bool has_values = inputs.values == n.x(2);
    mbq_qkv_args args = {};
    for (int j = 0; j < 3; ++j) {
        args.x[j] = (const float *) n.x(j)->data;
    }
    args.x_column = n.q->ne[0]*n.q->ne[1];
    args.q        = (half *) n.q->data;
    args.k        = (half *) n.k16->data;
    args.v        = has_values ? nullptr : (half *) n.v16->data;
    args.scale    = mbq_qkv_scale(n);
    args.angles   = mbq_rope_angles_of(n.q);
    args.threads  = n.q->ne[1]*(args.angles.n_dims/4);
    const ggml_cuda_kernel_launch_params params(dim3(n.q->ne[2]), dim3(GGML_PAD(args.threads, 32)), 2*args.angles.n_dims*sizeof(float), ctx.stream());
    ggml_cuda_kernel_launch(mbq_qkv, params, args);
    return n.last - i;
}

// Before memory is assigned to a graph: finds keys whose floats must be kept until values are cast, which would reuse their memory, and values that must be kept until
// attention has read them. Returns the node of the attention; i: no such keys
static int mbq_qkv_until(const ggml_cgraph * graph, const int i) {
    const ggml_tensor * k16 = graph->nodes[i];
    if (i + 2 >= graph->n_nodes || !mbq_qkv_is_cast(k16) || k16->src[0]->src[0]->op != GGML_OP_ROPE || !mbq_qkv_is_cast(graph->nodes[i + 2])) {
        return i;
    }
    for (int j = i + 3; j < std::min(graph->n_nodes, i + 8); ++j) {
        if (graph->nodes[j]->op == GGML_OP_FLASH_ATTN_EXT && graph->nodes[j]->src[1] == k16) {
            return j;
        }
    }
    return i + 2;
}
