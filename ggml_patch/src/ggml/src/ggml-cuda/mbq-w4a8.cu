#include "mbq-w4a8.cuh"
#include "mbq-w4a8-gemm.cuh"

#include <climits>

static constexpr int W4A8_VEC_COLUMNS = 8; // more: mbq_w4a8_gemm, or so many at a time where the card has no wgmma

// Activations: one CTA a column, which reads them once (R float4 a thread) and writes, with its scale,
//   tiled:  tiles for mbq_w4a8_gemm, [n tile][k tile][column][16-byte words in wgmma's 128-byte swizzle], 128 columns and 128 of K, zeros behind K
//   else:   [column][block of 32][t]: words t and t + 4 of the block, for mbq_w4a8_vec
template <int R, bool tiled>
static __global__ void __launch_bounds__(512) mbq_w4a8_quantize(const float * x, int * q, float * scale, const int K, const int padded, const int64_t x_column,
        const int aligned, int * flags, const int n_flags) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const int column = blockIdx.x;
    for (int i = blockIdx.x*512 + threadIdx.x; i < n_flags; i += gridDim.x*512) {
        flags[i] = 0;
    }
    x += column*x_column;
    float4 v[R];
    int    amax = 0; // bits of the largest |x|: floats without a sign are in the order of their bits
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int i = 4*(r*512 + threadIdx.x);
        v[r] = i >= K ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : aligned ? *(const float4 *) (x + i) : make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        const int4 bits = *(const int4 *) &v[r];
        amax = max(max(amax, bits.x & INT_MAX), max(bits.y & INT_MAX, max(bits.z & INT_MAX, bits.w & INT_MAX)));
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        amax = max(amax, __shfl_xor_sync(0xFFFFFFFF, amax, i));
    }
    __shared__ int largest[16];
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x/32] = amax;
    }
    __syncthreads();
    amax = largest[threadIdx.x % 16];
#pragma unroll
    for (int i = 8; i > 0; i /= 2) {
        amax = max(amax, __shfl_xor_sync(0xFFFFFFFF, amax, i));
    }
    const float most    = amax < __float_as_int(GGML_ROW_SCALE_AMAX_MIN) ? 0.0f : __int_as_float(amax);
    const float inverse = most == 0.0f ? 0.0f : mbq_div_rn(127.0f, most);
    if (threadIdx.x == 0) {
        scale[column] = mbq_div_rn(most, 127.0f);
    }
    const auto code = [&](const float value) {
        return __float2int_rn(mbq_mul_rn(value, inverse)) & 0xFF;
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int i = r*512 + threadIdx.x; // word of 4 activations
        if (4*i < padded) {
            const int word = code(v[r].x) | code(v[r].y) << 8 | code(v[r].z) << 16 | code(v[r].w) << 24;
            if (tiled) {
                const int     k_tile = i/32, chunk = i%32/4; // 16 bytes are a chunk
                const int64_t tile   = (int64_t) (column/128)*(padded/128) + k_tile;
                q[(tile*128 + column%128)*32 + (chunk ^ column%8)*4 + i%4] = word;
            } else {
                q[(int64_t) column*(padded/4) + i/8*8 + i%4*2 + i%8/4] = word;
            }
        }
    }
}

// Few columns: four warps share two rows; each takes 8 blocks of both at a time, four lanes a block. A CTA has two such groups.
static constexpr int MBQ_W4A8_SPLIT = 4;

struct mbq_w4a8_vec_args {
    const char * w;
    const int2 * q;       // [column][block][t]
    const float * scale;
    float * dst;
    int64_t dst_column;
    int M, row_bytes, blocks, padded; // padded: activations of a column in q
};

template <int words>
static __device__ __forceinline__ void mbq_w4a8_load_words(const char * p, uint32_t (&word)[words]) {
#pragma unroll
    for (int j = 0; j < words; ++j) { // at multiples of 2 bytes
        const uint16_t * h = (const uint16_t *) (p + 16*j);
        word[j] = (uint32_t) h[0] | (uint32_t) h[1] << 16;
    }
}

template <int bits, int N>
static __global__ void __launch_bounds__(256) mbq_w4a8_vec(const mbq_w4a8_vec_args args) {
    using L = mbq_w4a8_layout<bits>;
    constexpr int ahead = 4;
    ggml_cuda_pdl_lc();
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int row  = (blockIdx.x*(8/MBQ_W4A8_SPLIT) + warp/MBQ_W4A8_SPLIT)*2;
    const int part = warp % MBQ_W4A8_SPLIT;
#ifdef MBQ_TMA_AVAILABLE
    if (part == 0 && lane < 2) { // weights do not depend on the kernel before: they are on their way to L2 while it runs
        const uintptr_t begin = (uintptr_t) args.w + (uintptr_t) min(row + lane, args.M - 1)*args.row_bytes;
        const int bytes = (int) ((begin & 15) + args.row_bytes) & ~15;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"((const char *) (begin & ~(uintptr_t) 15)), "r"(bytes) : "memory");
    }
#endif
    ggml_cuda_pdl_sync();
    const char * w[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        w[r] = args.w + (int64_t) min(row + r, args.M - 1)*args.row_bytes;
    }
    int sum[N][2] = {};
    for (int b0 = part*8 + lane/4; b0 < args.blocks; b0 += 8*MBQ_W4A8_SPLIT*ahead) {
        uint32_t word[ahead][2][L::words];
#pragma unroll
        for (int u = 0; u < ahead; ++u) {
            const int b = min(b0 + 8*MBQ_W4A8_SPLIT*u, args.blocks - 1); // what is behind the end meets zeros below
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                mbq_w4a8_load_words(w[r] + b*L::block_bytes + 2 + 4*(lane % 4), word[u][r]);
            }
        }
#pragma unroll
        for (int u = 0; u < ahead; ++u) {
            const int b = b0 + 8*MBQ_W4A8_SPLIT*u;
            uint32_t a[2][2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                mbq_w4a8_unpack<bits>(word[u][r], a[r][0], a[r][1]);
                a[r][0] = b < args.blocks ? a[r][0] : 0;
                a[r][1] = b < args.blocks ? a[r][1] : 0;
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int2 q = args.q[(int64_t) n*(args.padded/8) + min(b, args.blocks - 1)*4 + lane % 4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    sum[n][r] = ggml_cuda_dp4a(a[r][0], q.x, ggml_cuda_dp4a(a[r][1], q.y, sum[n][r]));
                }
            }
        }
    }
    __shared__ int sums[8][N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int all = warp_reduce_sum(sum[n][r]);
            if (lane == 0) {
                sums[warp][n][r] = all;
            }
        }
    }
    __syncthreads();
    if (part == 0 && lane < 2*N && row + lane%2 < args.M) {
        int all = 0;
#pragma unroll
        for (int i = 0; i < MBQ_W4A8_SPLIT; ++i) {
            all += sums[warp + i][lane/2][lane%2];
        }
        const float d = __half2float(*(const half *) (args.w + (int64_t) (row + lane%2)*args.row_bytes));
        args.dst[lane/2*args.dst_column + row + lane%2] = mbq_w4a8_scale(all >> L::shift, d, args.scale[lane/2]);
    }
}

template <bool tiled>
static void mbq_w4a8_launch_quantize(ggml_backend_cuda_context & ctx, const float * x, int * q, float * scale, const int64_t K, const int64_t padded,
        const int64_t columns, const int64_t x_column, int * flags, const int n_flags) {
    const ggml_cuda_kernel_launch_params params(dim3(columns), dim3(512), 0, ctx.stream());
    const int  aligned = ((uintptr_t) x | x_column*sizeof(float)) % 16 == 0;
    const auto kernel  = padded <= 2*2048 ? &mbq_w4a8_quantize<2, tiled> : padded <= 4*2048 ? &mbq_w4a8_quantize<4, tiled> :
        padded <= 8*2048 ? &mbq_w4a8_quantize<8, tiled> : &mbq_w4a8_quantize<16, tiled>;
    ggml_cuda_kernel_launch(kernel, params, x, q, scale, (int) K, (int) padded, x_column, aligned, flags, n_flags);
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

// Whether this device runs mbq_w4a8_gemm: see mbq_gemm_available
template <int bits>
static bool mbq_w4a8_gemm_available(const int id) {
#ifdef MBQ_USE_TMA
    static int available[GGML_CUDA_MAX_DEVICES] = {}; // 1: no, 2: yes
    if (available[id] == 0) {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, (mbq_w4a8_gemm<bits, 128>)));
        available[id] = attributes.sharedSizeBytes > 0 ? 2 : 1;
    }
    return available[id] == 2;
#else
    GGML_UNUSED(id);
    return false;
#endif
}

template <int bits, int BN>
static void mbq_w4a8_launch_gemm(ggml_backend_cuda_context & ctx, const mbq_w4a8_args & args, const int ctas) {
    constexpr int bytes = mbq_w4a8_smem<bits, BN>::BYTES;
    CUDA_SET_SHARED_MEMORY_LIMIT((mbq_w4a8_gemm<bits, BN>), bytes);
    const ggml_cuda_kernel_launch_params params(dim3(ctas), dim3(MBQ_GEMM_THREADS), (size_t) bytes, ctx.stream());
    ggml_cuda_kernel_launch(mbq_w4a8_gemm<bits, BN>, params, args);
}

struct mbq_w4a8_matrix {
    const char * w;
    const float * x;
    float * dst;
    int64_t M, N, K, row_bytes, x_column, dst_column;
};

template <int bits>
static void mbq_w4a8_many(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m) {
    const int64_t padded  = (m.K + 255)/256*256;
    const int     m_tiles = (m.M + MBQ_GEMM_TILE_M - 1)/MBQ_GEMM_TILE_M;
    const int     n_tiles = (m.N + MBQ_GEMM_TILE_N - 1)/MBQ_GEMM_TILE_N;
    const mbq_gemm_plan plan = mbq_plan_gemm(m_tiles, n_tiles, padded/256, ggml_cuda_info().devices[ctx.device].nsm, false);
    const int ctas = plan.workers*plan.cluster;
    ggml_cuda_pool_alloc<int8_t> tiles(ctx.pool(), (size_t) n_tiles*MBQ_GEMM_TILE_N*padded);
    ggml_cuda_pool_alloc<float>  scale(ctx.pool(), m.N);
    ggml_cuda_pool_alloc<int>    done(ctx.pool(), 8*ctas);
    ggml_cuda_pool_alloc<float>  parts(ctx.pool());
    mbq_w4a8_args args = {};
    args.scale              = scale.get();
    args.blocks             = m.K/32;
    args.gemm.w             = m.w;
    args.gemm.x_tiles       = (half *) tiles.get();
    args.gemm.done          = done.get();
    args.gemm.dst           = m.dst;
    args.gemm.dst_column    = m.dst_column;
    args.gemm.M             = m.M;
    args.gemm.N             = m.N;
    args.gemm.K             = padded/2;
    args.gemm.row_bytes     = m.row_bytes;
    args.gemm.m_tiles       = (m_tiles + plan.cluster - 1)/plan.cluster;
    args.gemm.n_tiles       = (n_tiles + plan.cluster - 1)/plan.cluster;
    args.gemm.streamk_tiles = plan.streamk_tiles;
    if (plan.streamk_tiles > 0) {
        args.gemm.parts = parts.alloc((size_t) ctas*MBQ_GEMM_TILE_M*MBQ_GEMM_TILE_N*plan.cluster);
    }
    mbq_w4a8_launch_quantize<true>(ctx, m.x, (int *) tiles.get(), scale.get(), m.K, padded, m.N, m.x_column, done.get(), 8*ctas);
    if (plan.cluster == 2) {
        mbq_w4a8_launch_gemm<bits, 256>(ctx, args, ctas);
    } else {
        mbq_w4a8_launch_gemm<bits, 128>(ctx, args, ctas);
    }
}

template <int bits>
static void mbq_w4a8_few(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m) {
    ggml_cuda_pool_alloc<int>   q(ctx.pool(), (size_t) W4A8_VEC_COLUMNS*m.K/4);
    ggml_cuda_pool_alloc<float> scale(ctx.pool(), W4A8_VEC_COLUMNS);
    for (int64_t i = 0; i < m.N; i += W4A8_VEC_COLUMNS) {
        const int columns = std::min<int64_t>(m.N - i, W4A8_VEC_COLUMNS);
        mbq_w4a8_launch_quantize<false>(ctx, m.x + i*m.x_column, q.get(), scale.get(), m.K, m.K, columns, m.x_column, nullptr, 0);
        const mbq_w4a8_vec_args args = { m.w, (const int2 *) q.get(), scale.get(), m.dst + i*m.dst_column, m.dst_column,
            (int) m.M, (int) m.row_bytes, (int) (m.K/32), (int) m.K };
        mbq_w4a8_launch_vec<bits, W4A8_VEC_COLUMNS>(ctx, args, columns);
    }
}

template <int bits>
static void mbq_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const mbq_w4a8_matrix & m) {
    if (m.N > W4A8_VEC_COLUMNS && mbq_w4a8_gemm_available<bits>(ctx.device)) {
        mbq_w4a8_many<bits>(ctx, m);
    } else {
        mbq_w4a8_few<bits>(ctx, m);
    }
}

bool ggml_cuda_w4a8_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    GGML_TENSOR_BINARY_OP_LOCALS
    constexpr int64_t longest = 16*2048; // activations of a column that a CTA of mbq_w4a8_quantize holds
    if (!ggml_is_row_scale_mul_mat(dst) || ne00 > longest || ne01 > INT_MAX/2 || ne11 > INT_MAX/2) {
        return false;
    }
    GGML_ASSERT(nb00 == ggml_type_size(src0->type) && nb10 == sizeof(float) && nb0 == sizeof(float));
    for (int64_t i3 = 0; i3 < ne13; ++i3) {
        for (int64_t i2 = 0; i2 < ne12; ++i2) {
            const mbq_w4a8_matrix m = {
                (const char *) src0->data + i2/(ne12/ne02)*nb02 + i3/(ne13/ne03)*nb03,
                (const float *) ((const char *) src1->data + i2*nb12 + i3*nb13),
                (float *) ((char *) dst->data + i2*nb2 + i3*nb3),
                ne01, ne11, ne00, (int64_t) nb01, (int64_t) (nb11/sizeof(float)), (int64_t) (nb1/sizeof(float)) };
            if (src0->type == GGML_TYPE_Q4_0) {
                mbq_w4a8_mul_mat<4>(ctx, m);
            } else {
                mbq_w4a8_mul_mat<8>(ctx, m);
            }
        }
    }
    return true;
}
