#pragma once

// Launches the products: chooses the kernel and its shape.

#include "mbq-gemm.cuh"
#include "mbq-gemv.cuh"

static bool mbq_aligned(const void * p, const int64_t nb1, const int64_t nb2, const int64_t nb3) {
    return ((uintptr_t) p | nb1 | nb2 | nb3) % 16 == 0;
}

#ifdef MBQ_USE_TMA
static CUtensorMap mbq_map(const char * w, const int64_t row_bytes, const int64_t rows, const int stage_row) {
    CUtensorMap map;
    const cuuint64_t size[2] = { (cuuint64_t) row_bytes, (cuuint64_t) rows };
    const cuuint64_t stride  = row_bytes;
    const cuuint32_t box [2] = { (cuuint32_t) stage_row, 8 };
    const cuuint32_t step[2] = { 1, 1 };
    CU_CHECK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, (void *) w, size, &stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}
#endif

// Returns false if the activations that a CTA needs do not fit into its shared memory.
template <typename L, int NT>
static bool mbq_launch_mmv(ggml_backend_cuda_context & ctx, mbq_mmv_args args, const int64_t channels, const int64_t samples) {
    const auto & device = ggml_cuda_info().devices[ctx.device];
    const bool aligned  = mbq_aligned(args.w, args.row_bytes, args.w_channel, args.w_sample) && (uintptr_t) args.gate % 16 == 0;
    const int64_t room  = device.smpbo - MBQ_MAX_WARPS*MBQ_STAGES*sizeof(uint64_t); // barriers
    const mbq_mmv_plan plan = mbq_plan_mmv<L>(NT, args.gate, aligned, args.M, args.blocks, device.nsm, room);
    if (plan.kw == 0 || channels > UINT16_MAX || samples > UINT16_MAX) {
        return false;
    }
    args.stage_row = mbq_stage_row<L>(aligned);
    args.slots     = plan.slots;
    const ggml_cuda_kernel_launch_params params(dim3(plan.ctas, channels, samples), dim3(32*plan.kw, plan.groups), (size_t) plan.smem, ctx.stream());
    mbq_mmv_maps maps = {};
#ifdef MBQ_USE_TMA
    const bool dense = args.w_channel == (int64_t) args.M*args.row_bytes && args.w_sample == args.w_channels*args.w_channel;
    if (aligned && dense && ggml_cuda_highest_compiled_arch(device.cc) >= GGML_CUDA_CC_HOPPER) {
        const int64_t rows = (int64_t) args.M*args.w_channels*args.w_samples;
        maps.w    = mbq_map(args.w, args.row_bytes, rows, args.stage_row);
        maps.gate = args.gate ? mbq_map(args.gate, args.row_bytes, rows, args.stage_row) : maps.w;
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_mmv<L, NT, true>), room);
        ggml_cuda_kernel_launch(mbq_mmv<L, NT, true>, params, args, maps);
        return true;
    }
#endif
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_mmv<L, NT, false>), room);
    ggml_cuda_kernel_launch(mbq_mmv<L, NT, false>, params, args, maps);
    return true;
}

// Quantises up to 8*NT columns into records, then multiplies.
template <typename L, int NT>
static bool mbq_mul_mat_records(ggml_backend_cuda_context & ctx, mbq_mmv_args args, const int64_t channels, const int64_t samples) {
    const int64_t k       = (int64_t) args.blocks*L::QK;
    const int64_t records = (k + 127)/128*NT;
    if (channels*samples > UINT16_MAX) {
        return false;
    }
    ggml_cuda_pool_alloc<char> buffer(ctx.pool(), channels*samples*records*mbq_record<L>::bytes);
    const ggml_cuda_kernel_launch_params params(dim3((k + 255)/256, NT, channels*samples), dim3(256), 0, ctx.stream());
    ggml_cuda_kernel_launch(mbq_quantize_records<L>, params, (const float *) args.x, buffer.get(), (int) k, args.N,
        args.x_column, args.x_channel, args.x_sample, (int) channels, args.x_aligned);
    args.x         = buffer.get();
    args.x_channel = records;
    args.x_sample  = channels*records;
    return mbq_launch_mmv<L, NT>(ctx, args, channels, samples);
}

template <typename L>
static bool mbq_mul_mat_mmv(ggml_backend_cuda_context & ctx, const mbq_mmv_args & args, const int64_t channels, const int64_t samples) {
    if (args.N == 1 && mbq_launch_mmv<L, 0>(ctx, args, channels, samples)) {
        return true;
    }
    if (args.N <= 8) {
        return mbq_mul_mat_records<L, 1>(ctx, args, channels, samples);
    }
    if (args.N <= 16) {
        return mbq_mul_mat_records<L, 2>(ctx, args, channels, samples);
    }
    return mbq_mul_mat_records<L, 4>(ctx, args, channels, samples);
}

// Whether this device runs mbq_gemm, whose code exists only for sm_90a. Other code has no barriers in shared memory.
static bool mbq_gemm_available(const int id) {
#ifdef MBQ_USE_TMA
    static int available[GGML_CUDA_MAX_DEVICES] = {}; // 1: no, 2: yes
    if (available[id] == 0) {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, (mbq_gemm<mbq_layout<128, 1>, 128>)));
        available[id] = attributes.sharedSizeBytes > 0 ? 2 : 1;
    }
    return available[id] == 2;
#else
    GGML_UNUSED(id);
    return false;
#endif
}

template <typename L, int BN>
static void mbq_launch_gemm(ggml_backend_cuda_context & ctx, const mbq_gemm_args & args, const int ctas) {
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_gemm<L, BN>), MBQ_GEMM_SMEM);
    const ggml_cuda_kernel_launch_params params(dim3(ctas), dim3(MBQ_GEMM_THREADS), MBQ_GEMM_SMEM, ctx.stream());
    ggml_cuda_kernel_launch(mbq_gemm<L, BN>, params, args);
}

// Returns false if the product does not suit this kernel, which takes a single matrix whose rows are multiples of 128.
template <typename L>
static bool mbq_mul_mat_gemm(ggml_backend_cuda_context & ctx, const mbq_mmv_args & mmv) {
    const int K = mmv.blocks*L::QK;
    if (K % 128 != 0 || !mbq_gemm_available(ctx.device)) {
        return false;
    }
    const int m_tiles = (mmv.M + MBQ_GEMM_TILE_M - 1)/MBQ_GEMM_TILE_M;
    const int n_tiles = (mmv.N + MBQ_GEMM_TILE_N - 1)/MBQ_GEMM_TILE_N;
    const mbq_gemm_plan plan = mbq_plan_gemm(m_tiles, n_tiles, K/128, ggml_cuda_info().devices[ctx.device].nsm);
    const int ctas   = plan.workers*plan.cluster;
    const int counts = n_tiles*(K/MBQ_GEMM_TILE_K);
    const int flags  = counts + (plan.streamk_tiles > 0 ? 8*ctas : 0);

    ggml_cuda_pool_alloc<half>  x_tiles(ctx.pool(), (size_t) n_tiles*MBQ_GEMM_TILE_N*K);
    ggml_cuda_pool_alloc<int>   ready(ctx.pool(), flags);
    ggml_cuda_pool_alloc<float> parts(ctx.pool());
    mbq_gemm_args args = {};
    args.w             = mmv.w;
    args.x             = (const float *) mmv.x;
    args.x_tiles       = x_tiles.get();
    args.ready         = ready.get();
    args.done          = ready.get() + counts;
    args.dst           = mmv.dst;
    args.x_column      = mmv.x_column;
    args.dst_column    = mmv.dst_column;
    args.x_aligned     = mmv.x_aligned;
    args.M             = mmv.M;
    args.N             = mmv.N;
    args.K             = K;
    args.row_bytes     = mmv.row_bytes;
    args.converters    = plan.converters;
    args.early         = plan.early;
    args.m_tiles       = (m_tiles + plan.cluster - 1)/plan.cluster;
    args.n_tiles       = (n_tiles + plan.cluster - 1)/plan.cluster;
    args.streamk_tiles = plan.streamk_tiles;
    if (plan.streamk_tiles > 0) {
        args.parts = parts.alloc((size_t) ctas*MBQ_GEMM_TILE_M*MBQ_GEMM_TILE_N*plan.cluster);
    }
    const ggml_cuda_kernel_launch_params params(dim3(plan.early, 2*n_tiles), dim3(256), 0, ctx.stream());
    ggml_cuda_kernel_launch(mbq_convert_early, params, args, args.ready, flags);

    if (plan.cluster == 2) {
        mbq_launch_gemm<L, 256>(ctx, args, ctas + plan.converters);
    } else {
        mbq_launch_gemm<L, 128>(ctx, args, ctas + plan.converters);
    }
    return true;
}
