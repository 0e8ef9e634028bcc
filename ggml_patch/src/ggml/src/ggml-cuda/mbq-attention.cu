#include "mbq.cuh"
#include "mbq-block.cuh"

#ifdef MBQ_USE_TMA

#include "mbq-attention.cuh"

#include <climits>

// Whether this device runs mbq_attention. Its code exists only for sm_90a; on other GPUs the kernel is empty, without barriers in shared memory.
static bool mbq_attention_available(const int id) {
    static int available[GGML_CUDA_MAX_DEVICES] = {}; // 1: no, 2: yes
    if (available[id] == 0) {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, (mbq_attention<80, false>)));
        available[id] = attributes.sharedSizeBytes > 0 ? 2 : 1;
    }
    return available[id] == 2;
}

static bool mbq_attention_aligned(const ggml_tensor * t, const size_t bytes) {
    return ((uintptr_t) t->data | t->nb[1] | t->nb[2] | t->nb[3]) % bytes == 0;
}

// Attention of vision towers: many queries, keys and values cast to F16, as many heads of keys as of queries, a mask or none, and no other feature
static bool mbq_attention_takes(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * mask = dst->src[3], * sinks = dst->src[4];
    float params[3]; // scale, maximum ALiBi bias, soft cap
    memcpy(params, dst->op_params, sizeof(params));
    const int64_t tiles = (k->ne[1] + MBQ_ATTENTION_KEYS - 1)/MBQ_ATTENTION_KEYS;
    for (const ggml_tensor * t : { k, v }) {
        if (t->type != GGML_TYPE_F16 || !ggml_is_contiguous(t) || !mbq_attention_aligned(t, 16) ||
                t->ne[0] != q->ne[0] || t->ne[2] != q->ne[2] || t->ne[3] != q->ne[3]) {
            return false;
        }
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1 || k->ne[1] % 2 != 0 || tiles > MBQ_ATTENTION_TILES || mask->nb[0] != sizeof(half) ||
            !mbq_attention_aligned(mask, sizeof(half2)))) {
        return false;
    }
    return !sinks && params[1] == 0.0f && params[2] == 0.0f && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && mbq_attention_aligned(q, sizeof(float2)) &&
        q->ne[1] >= 64 && q->ne[1] <= INT_MAX/2 && k->ne[1] <= INT_MAX/2 && q->ne[2] <= UINT16_MAX && q->ne[3] <= UINT16_MAX;
}

// The tensor map of keys or values as [sample][head][row][D]; a box is 16 elements of each row of a tile. Elements out of bounds are zero.
// place: the float tensor [D, heads, rows] in whose memory they are stored in place; nullptr: in t
static CUtensorMap mbq_attention_map(const ggml_tensor * t, const ggml_tensor * place = nullptr) {
    CUtensorMap map;
    const cuuint64_t size[4]   = { (cuuint64_t) t->ne[0], (cuuint64_t) t->ne[1], (cuuint64_t) t->ne[2], (cuuint64_t) t->ne[3] };
    const cuuint64_t stride[3] = { place ? place->nb[2] : t->nb[1], place ? place->nb[1]/2 : t->nb[2], place ? place->nb[3] : t->nb[3] };
    const cuuint32_t box[4]    = { 16, MBQ_ATTENTION_KEYS, 1, 1 };
    const cuuint32_t step[4]   = { 1, 1, 1, 1 };
    CU_CHECK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, place ? place->data : t->data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

template <int D, bool masked>
static void mbq_attention_launch(ggml_backend_cuda_context & ctx, const mbq_attention_args & args, const ggml_tensor * dst, const dim3 grid) {
    const mbq_attention_maps maps = { mbq_attention_map(dst->src[1]), mbq_attention_map(dst->src[2], ggml_cuda_f16_values(ctx, dst)) };
    constexpr int smem = mbq_attention_shape<D>::SMEM;
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_attention<D, masked>), smem);
    ggml_cuda_kernel_launch(mbq_attention<D, masked>, ggml_cuda_kernel_launch_params(grid, dim3(MBQ_ATTENTION_THREADS), smem, ctx.stream()), args, maps);
}

template <int D>
static void mbq_attention_run(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * mask = dst->src[3];
    mbq_attention_args args = {};
    args.q        = (const char *) q->data;
    args.dst      = (float *) dst->data;
    args.f16      = !mask && ggml_cuda_f16_result(ctx, dst);
    if (!mask) {
        args.codes = ggml_cuda_w4a8_result(ctx, dst);
    }
    args.queries  = q->ne[1];
    args.keys     = k->ne[1];
    args.heads    = q->ne[2];
    args.q_row    = q->nb[1];
    args.q_head   = q->nb[2];
    args.q_sample = q->nb[3];
    memcpy(&args.scale, dst->op_params, sizeof(float));
    args.scale *= MBQ_ATTENTION_LOG2E;
    args.q_f16  = ggml_cuda_f16_queries(ctx, dst);
    const dim3 grid((args.queries + MBQ_ATTENTION_Q - 1)/MBQ_ATTENTION_Q, q->ne[2], q->ne[3]);
    if (!mask) {
        mbq_attention_launch<D, false>(ctx, args, dst, grid);
        return;
    }
    args.mask         = (const char *) mask->data;
    args.mask_samples = mask->ne[3];
    args.mask_row     = mask->nb[1];
    args.mask_sample  = mask->nb[3];
    const dim3 tiles((args.keys + MBQ_ATTENTION_KEYS - 1)/MBQ_ATTENTION_KEYS, grid.x, args.mask_samples);
    ggml_cuda_pool_alloc<uint8_t> seen(ctx.pool(), (size_t) tiles.x*tiles.y*tiles.z);
    args.seen = seen.get();
    ggml_cuda_kernel_launch(mbq_attention_seen, ggml_cuda_kernel_launch_params(tiles, dim3(256), 0, ctx.stream()), args, seen.get());
    mbq_attention_launch<D, true>(ctx, args, dst, grid);
}

bool ggml_cuda_mbq_attention_takes(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const int64_t head = dst->src[0]->ne[0];
    return mbq_attention_available(ctx.device) && mbq_attention_takes(dst) && (head == 64 || head == 72 || head == 80 || head == 128);
}

bool ggml_cuda_mbq_attention(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    if (!ggml_cuda_mbq_attention_takes(ctx, dst)) {
        return false;
    }
    const int64_t head = dst->src[0]->ne[0];
    const auto run = head == 64 ? &mbq_attention_run<64> : head == 72 ? &mbq_attention_run<72> : head == 80 ? &mbq_attention_run<80> : &mbq_attention_run<128>;
    run(ctx, dst);
    return true;
}

#else

bool ggml_cuda_mbq_attention_takes(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    GGML_UNUSED_VARS(ctx, dst);
    return false;
}

bool ggml_cuda_mbq_attention(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    GGML_UNUSED_VARS(ctx, dst);
    return false;
}

#endif // MBQ_USE_TMA
