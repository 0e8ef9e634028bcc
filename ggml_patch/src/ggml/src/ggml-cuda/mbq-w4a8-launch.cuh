#pragma once

// Launches products of weights with one scale per row: chooses the kernel and its shape.

#include "mbq-w4a8-gemm.cuh"
#include "mbq-w4a8-gemv.cuh"
#include "mbq-w4a8-inputs.cuh"
#include "mbq-w4a8-plan.cuh"
#include "mbq-w4a8-vec.cuh"

#include <atomic>
#include <climits>

struct mbq_w4a8_matrix {
    const char * w;
    const float * x;
    float * dst;
    int64_t M, N, K, row_bytes, x_column, dst_column;
    mbq_w4a8_ranges ranges;
    const float * bias = nullptr; // see mbq_w4a8_gemm_matrix; only mbq_w4a8_many adds them
    const float * more = nullptr;
    int64_t more_column = 0;
    mbq_w4a8_codes codes = {};   // instead of floats in dst
    bool halves = false;         // F16 in dst
    mbq_rope_angles angles = {}; // heads of 2*n_dims elements, see mbq-w4a8-heads.cuh; n_dims = 0: no heads
    int64_t dst_head = 0;
    float turn = 0.0f;

    int64_t padded() const { return (K + 255)/256*256; }
    bool    dense()  const { return ((uintptr_t) w | row_bytes) % 16 == 0; } // then K is a multiple of 256
    bool    aligned() const { return ((uintptr_t) x | x_column*sizeof(float)) % 16 == 0; }
};

// One of a product's matrices
static mbq_w4a8_matrix mbq_w4a8_matrix_of(const ggml_tensor * dst, const int64_t i2, const int64_t i3) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    GGML_TENSOR_BINARY_OP_LOCALS
    return {
        (const char *) src0->data + i2/(ne12/ne02)*nb02 + i3/(ne13/ne03)*nb03,
        (const float *) ((const char *) src1->data + i2*nb12 + i3*nb13),
        (float *) ((char *) dst->data + i2*nb2 + i3*nb3),
        ne01, ne11, ne00, (int64_t) nb01, (int64_t) (nb11/sizeof(float)), (int64_t) (nb1/sizeof(float)), mbq_w4a8_ranges_of(dst->src[2]) };
}

static std::atomic<int64_t> mbq_w4a8_counts[GGML_CUDA_W4A8_COUNTS];

template <bool tiled>
static void mbq_w4a8_launch_quantize(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m, const mbq_w4a8_int8 & to) {
    const mbq_w4a8_quantize_args args = { m.x, to.q, to.scale, m.x_column, (int) m.K, (int) m.padded(), m.aligned(), to.flags, to.n_flags, m.ranges };
    const int units = m.padded()/16;
    const int R     = units <= 1024 ? 1 : 2;
    const ggml_cuda_kernel_launch_params params(dim3(m.N), dim3((units + 32*R - 1)/(32*R)*32), 0, ctx.stream());
    const auto kernel = R == 1 ? &mbq_w4a8_quantize<tiled, 1, 1024, 2> : units <= 2*640 ? &mbq_w4a8_quantize<tiled, 2, 640, 2> : &mbq_w4a8_quantize<tiled, 2, 1024, 1>;
    ggml_cuda_kernel_launch(kernel, params, args);
    mbq_w4a8_counts[GGML_CUDA_W4A8_QUANTISED]++;
}

static void mbq_w4a8_quantise(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m, const mbq_w4a8_order order, const mbq_w4a8_int8 & to) {
    const auto launch = order == MBQ_W4A8_TILES ? &mbq_w4a8_launch_quantize<true> : &mbq_w4a8_launch_quantize<false>;
    launch(ctx, m, to);
}

#ifdef MBQ_USE_TMA
// The tensor map of M rows of weights with the layout of m, as [parity of the row][half of the rows][words]: a box has the even rows, then the odd ones.
// halves = 1: as [row][words]
template <int bits>
static mbq_w4a8_map mbq_w4a8_make_map(const mbq_w4a8_matrix & m, const char * w, const int64_t M, const int halves, const int rows) {
    mbq_w4a8_map map;
    const cuuint64_t size[3]   = { (cuuint64_t) m.row_bytes/4, (cuuint64_t) M/halves, (cuuint64_t) halves };
    const cuuint64_t stride[2] = { (cuuint64_t) m.row_bytes*halves, (cuuint64_t) m.row_bytes };
    const cuuint32_t box[3]    = { mbq_w4a8_layout<bits>::group_bytes/4, (cuuint32_t) rows, (cuuint32_t) halves };
    const cuuint32_t step[3]   = { 1, 1, 1 };
    CU_CHECK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT32, halves == 1 ? 2 : 3, (void *) w, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

// The tensor map of the same rows, in units of 256, as [64][16 of these][parity][half of them][words], for tiles with codes: see mbq_w4a8_tile_rows
template <int bits>
static mbq_w4a8_map mbq_w4a8_make_codes_map(const mbq_w4a8_matrix & m) {
    mbq_w4a8_map map;
    const cuuint64_t row = m.row_bytes;
    const cuuint64_t size[5]   = { row/4, 8, 2, 4, (cuuint64_t) m.M/64 };
    const cuuint64_t stride[4] = { 2*row, row, 16*row, 64*row };
    const cuuint32_t box[5]    = { mbq_w4a8_layout<bits>::group_bytes/4, 8, 2, 1, 4 };
    const cuuint32_t step[5]   = { 1, 1, 1, 1, 1 };
    CU_CHECK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 5, (void *) m.w, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}
#endif

template <int bits, int shape, mbq_w4a8_results results = MBQ_W4A8_PLAIN>
using mbq_w4a8_tile_of = mbq_w4a8_tile<bits, MBQ_W4A8_SHAPES[shape].BM, MBQ_W4A8_SHAPES[shape].BN, MBQ_W4A8_SHAPES[shape].CL,
    bits == 4 ? MBQ_W4A8_SHAPES[shape].XS4 : MBQ_W4A8_SHAPES[shape].XS8, bits == 4 ? MBQ_W4A8_SHAPES[shape].WS4 : MBQ_W4A8_SHAPES[shape].WS8, shape != MBQ_W4A8_COPIED, results>;

// Whether this device runs mbq_w4a8_gemm: see mbq_gemm_available
template <int bits>
static bool mbq_w4a8_gemm_available(const int id) {
#ifdef MBQ_USE_TMA
    static int available[GGML_CUDA_MAX_DEVICES] = {}; // 1: no, 2: yes
    if (available[id] == 0) {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, (mbq_w4a8_gemm<mbq_w4a8_tile_of<bits, 0>>)));
        available[id] = attributes.sharedSizeBytes > 0 ? 2 : 1;
    }
    return available[id] == 2;
#else
    GGML_UNUSED(id);
    return false;
#endif
}

template <typename T>
static void mbq_w4a8_launch_gemm(ggml_backend_cuda_context & ctx, const mbq_w4a8_args & args, const mbq_w4a8_maps & maps, const int workers) {
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_gemm<T>), T::BYTES);
    const ggml_cuda_kernel_launch_params params(dim3(workers*T::CL), dim3(MBQ_GEMM_THREADS), (size_t) T::BYTES, ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_gemm<T>, params, args, maps);
}

// Launches with the shape of a plan, which is `shape` or a later one
template <int bits, mbq_w4a8_results results, int shape = 0>
static void mbq_w4a8_launch_planned(ggml_backend_cuda_context & ctx, const mbq_w4a8_args & args, const mbq_w4a8_maps & maps, const mbq_w4a8_gemm_plan & plan) {
    if constexpr (shape < MBQ_W4A8_N_SHAPES) {
        if (plan.shape > shape) {
            mbq_w4a8_launch_planned<bits, results, shape + 1>(ctx, args, maps, plan);
        } else if constexpr (results == MBQ_W4A8_PLAIN || MBQ_W4A8_SHAPES[shape].BM == 64) {
            mbq_w4a8_launch_gemm<mbq_w4a8_tile_of<bits, shape, results>>(ctx, args, maps, plan.workers);
        }
    }
}

template <int bits>
static mbq_w4a8_device mbq_w4a8_device_of(const ggml_backend_cuda_context & ctx) {
    static int fours[GGML_CUDA_MAX_DEVICES] = {}; // the number plus one; 0: not known yet
    if (fours[ctx.device] == 0) {
        int n = 0;
#ifdef MBQ_USE_TMA
        using T = mbq_w4a8_tile_of<bits, MBQ_W4A8_COPIED - 1>;
        static_assert(T::CL == 4, "");
        CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_gemm<T>), T::BYTES);
        cudaLaunchConfig_t config = {};
        config.gridDim          = dim3(T::CL);
        config.blockDim         = dim3(MBQ_GEMM_THREADS);
        config.dynamicSmemBytes = T::BYTES;
        cudaLaunchAttribute cluster = {};
        cluster.id               = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = T::CL;
        cluster.val.clusterDim.y = 1;
        cluster.val.clusterDim.z = 1;
        config.attrs    = &cluster;
        config.numAttrs = 1;
        CUDA_CHECK(cudaOccupancyMaxActiveClusters(&n, mbq_w4a8_gemm<T>, &config));
#endif
        fours[ctx.device] = n + 1;
    }
    return { ggml_cuda_info().devices[ctx.device].nsm, fours[ctx.device] - 1 };
}

// n matrices of equal row sizes by the activations of the first. Several only if all are dense and have an even number of rows. With codes: one dense matrix
// whose number of rows is a multiple of 256. With heads: all of one head size.
template <int bits>
static void mbq_w4a8_many(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix * matrices, const int n, const mbq_w4a8_int8 & x) {
    const mbq_w4a8_matrix & m = matrices[0];
    const bool dense = m.dense() && m.M % 2 == 0;
    int64_t M[MBQ_W4A8_MATRICES];
    for (int k = 0; k < n; ++k) {
        M[k] = matrices[k].M;
    }
    const mbq_w4a8_gemm_plan plan = mbq_w4a8_plan_gemm(M, n, m.N, m.padded()/256, mbq_w4a8_device_of<bits>(ctx), dense, bits, m.codes.q || m.angles.n_dims > 0);
    const mbq_w4a8_shape & shape  = MBQ_W4A8_SHAPES[plan.shape];
    const int ctas = plan.workers*shape.CL;
    GGML_ASSERT(8*ctas <= x.n_flags);
    ggml_cuda_pool_alloc<float> parts(ctx.pool());
    mbq_w4a8_args args = {};
    args.scale              = x.scale;
    args.blocks             = m.K/32;
    args.codes              = m.codes;
    args.angles             = m.angles;
    args.gemm.x_tiles       = (half *) x.q;
    args.gemm.done          = x.flags;
    args.gemm.N             = m.N;
    args.gemm.K             = m.padded()/2;
    args.gemm.row_bytes     = m.row_bytes;
    args.gemm.m_tiles       = plan.m_tiles;
    args.gemm.n_tiles       = plan.n_tiles;
    args.gemm.streamk_tiles = plan.parts > 1 ? plan.m_tiles*plan.n_tiles : 0;
    if (plan.parts > 1) {
        args.gemm.parts = parts.alloc((size_t) ctas*shape.BM*shape.BN);
    }
    mbq_w4a8_maps maps = {};
    int tile = 0;
    for (int k = 0; k < MBQ_W4A8_MATRICES; ++k) {
        const mbq_w4a8_matrix & mk = matrices[std::min(k, n - 1)];
        args.of[k] = { mk.w, mk.dst, mk.bias, mk.more, mk.dst_column, mk.more_column, (int) mk.M, k < n ? tile : INT_MAX, mk.halves, mk.dst_head, mk.turn };
        tile += (mk.M + shape.BM*shape.CL - 1)/(shape.BM*shape.CL);
#ifdef MBQ_USE_TMA
        if (dense) {
            maps.of[k] = k >= n ? maps.of[0] : mk.codes.q ? mbq_w4a8_make_codes_map<bits>(mk) :
                mk.angles.n_dims > 0 ? mbq_w4a8_make_map<bits>(mk, mk.w, mk.M, 1, 8) : mbq_w4a8_make_map<bits>(mk, mk.w, mk.M, 2, shape.BM/2);
        }
#endif
    }
    const auto launch = m.codes.q ? &mbq_w4a8_launch_planned<bits, MBQ_W4A8_CODES> : m.angles.n_dims > 0 ? &mbq_w4a8_launch_planned<bits, MBQ_W4A8_HEADS> :
        &mbq_w4a8_launch_planned<bits, MBQ_W4A8_PLAIN>;
    launch(ctx, args, maps, plan);
}

template <int bits, int N>
static void mbq_w4a8_launch_vec(ggml_backend_cuda_context & ctx, const mbq_w4a8_vec_args & args, const int columns) {
    if constexpr (N > 1) {
        if (columns < N) {
            mbq_w4a8_launch_vec<bits, N - 1>(ctx, args, columns);
            return;
        }
    }
    const ggml_cuda_kernel_launch_params params(dim3((args.M + 16/MBQ_W4A8_SPLIT - 1)/(16/MBQ_W4A8_SPLIT)), dim3(256), 0, ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_vec<bits, N>, params, args);
}

// n matrices with the same bytes per row by the columns of m; see mbq_w4a8_mmv_args
template <int bits, mbq_w4a8_columns columns>
static void mbq_w4a8_launch_mmv(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m, const mbq_w4a8_mmv_matrix * matrices, const int n,
        const mbq_w4a8_mmv_plan & plan, const mbq_w4a8_int8 & x) {
#ifdef MBQ_USE_TMA
    mbq_w4a8_mmv_args args = { {}, m.x, (const char *) x.q, x.scale, m.dst_column, 0, (int) m.row_bytes, (int) m.K, (int) m.N, m.aligned(), plan.stages, m.ranges };
    mbq_w4a8_maps maps = {};
    for (int i = 0; i < MBQ_W4A8_MATRICES; ++i) {
        args.of[i] = matrices[std::min(i, n - 1)];
        maps.of[i] = i < n ? mbq_w4a8_make_map<bits>(m, args.of[i].w, args.of[i].M, 1, 16) : maps.of[0];
        args.of[i].tile = i < n ? args.tiles : INT_MAX;
        args.tiles += i < (columns == MBQ_W4A8_ONE ? n : 1) ? (args.of[i].M + 15)/16 : 0;
    }
    const size_t smem = plan.kw*plan.groups*(1024 + plan.stages*mbq_w4a8_stage_bytes<bits>(m.N)) + (m.N == 1 ? m.K : 0);
    const size_t room = ggml_cuda_info().devices[ctx.device].smpbo - MBQ_W4A8_STATIC_BYTES;
    const ggml_cuda_kernel_launch_params params(dim3(plan.ctas), dim3(32*plan.kw, plan.groups), smem, ctx.stream());
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_mmv<bits, columns>), room);
    ggml_cuda_kernel_launch(mbq_w4a8_mmv<bits, columns>, params, args, maps);
#else
    GGML_UNUSED_VARS(ctx, m, matrices, n, plan, x);
#endif
}

// M: rows of all matrices, each padded to whole tiles; kw = 0: mbq_w4a8_mmv does not support this product
template <int bits>
static mbq_w4a8_mmv_plan mbq_w4a8_plan_few(const ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m, const int64_t M) {
#ifdef MBQ_USE_TMA
    const auto & device = ggml_cuda_info().devices[ctx.device];
    if (m.dense() && ggml_cuda_highest_compiled_arch(device.cc) >= GGML_CUDA_CC_HOPPER) {
        return mbq_w4a8_plan_mmv(M, m.K/256, m.N == 1 ? m.K/16 : 0, MBQ_W4A8_UNITS, mbq_w4a8_stage_bytes<bits>(m.N), device.nsm, device.smpbo - MBQ_W4A8_STATIC_BYTES);
    }
#endif
    GGML_UNUSED_VARS(ctx, m, M);
    return {};
}

template <int bits>
static void mbq_w4a8_few(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m, const mbq_w4a8_int8 & x) {
    const mbq_w4a8_mmv_plan plan = mbq_w4a8_plan_few<bits>(ctx, m, m.M);
    if (plan.kw > 0) {
        const mbq_w4a8_mmv_matrix matrix = { m.w, m.dst, nullptr, (int) m.M, 0 };
        const auto launch = m.N > 1 ? &mbq_w4a8_launch_mmv<bits, MBQ_W4A8_SEVERAL> : &mbq_w4a8_launch_mmv<bits, MBQ_W4A8_ONE>;
        launch(ctx, m, &matrix, 1, plan, x);
        return;
    }
    const mbq_w4a8_vec_args args = { m.w, (const int2 *) x.q, x.scale, m.dst, m.dst_column, (int) m.M, (int) m.row_bytes, (int) (m.K/32) };
    mbq_w4a8_launch_vec<bits, MBQ_W4A8_FEW_COLUMNS>(ctx, args, m.N);
}

template <int bits>
static mbq_w4a8_order mbq_w4a8_order_in(const ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m) {
    if (m.N > MBQ_W4A8_FEW_COLUMNS) {
        return mbq_w4a8_gemm_available<bits>(ctx.device) ? MBQ_W4A8_TILES : MBQ_W4A8_FLOATS;
    }
    return m.N == 1 && mbq_w4a8_plan_few<bits>(ctx, m, m.M).kw > 0 ? MBQ_W4A8_FLOATS : MBQ_W4A8_RECORDS;
}

static int mbq_w4a8_n_flags(const ggml_backend_cuda_context & ctx, const mbq_w4a8_order order) {
    return order == MBQ_W4A8_TILES ? 8*ggml_cuda_info().devices[ctx.device].nsm : 0;
}

// n matrices whose activations are ready, in the given order; several only with tiles
template <int bits>
static void mbq_w4a8_product(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix * m, const int n, const mbq_w4a8_order order, const mbq_w4a8_int8 & x) {
    if (order == MBQ_W4A8_TILES) {
        mbq_w4a8_many<bits>(ctx, m, n, x);
    } else {
        mbq_w4a8_few<bits>(ctx, m[0], x);
    }
}
