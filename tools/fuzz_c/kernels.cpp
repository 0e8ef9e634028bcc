// The kernels, and the products' cuts. In place of ggml's thread pool stand plain threads, so that a kernel gets the work memory it asked for
// and not a byte more.

#include "fuzz.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-cpu/mbq/mbq.h"
#include "ggml-quants.h"
#include "ggml-row-scale.h"
#include "quants.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>

#include <pthread.h>

// ---- the thread pool

static pthread_barrier_t barrier;
static std::atomic<int>  next_chunk;

void ggml_barrier(struct ggml_threadpool *) { pthread_barrier_wait(&barrier); }
void ggml_threadpool_chunk_set(struct ggml_threadpool *, int value) { next_chunk = value; }
int  ggml_threadpool_chunk_add(struct ggml_threadpool *, int value) { return next_chunk.fetch_add(value); }

// ---- conversions

static int64_t some_columns(rng_t & rng, enum ggml_type type) {
    return ggml_blck_size(type)*between(rng, 1, between(rng, 0, 9) ? 6 : 40);
}

static int64_t feed_from_float(rng_t & rng, enum ggml_type type) {
    const int64_t k = some_columns(rng, type), n = between(rng, 1, 4);
    exact x(n*k*sizeof(float)), weights(k*sizeof(float)), y(n*ggml_row_size(type, k)), back(n*k*sizeof(float));
    make_floats(rng, x.floats(), n*k);
    make_floats(rng, weights.floats(), k);
    switch (between(rng, 0, 2)) {
        case 0:  ggml_quantize_chunk(type, x.floats(), y.data.get(), 0, n, k, nullptr); break;
        case 1:  ggml_quantize_chunk(type, x.floats(), y.data.get(), 0, n, k, weights.floats()); break;
        default: ggml_get_type_traits_cpu(type)->from_float(x.floats(), y.data.get(), n*k);
    }
    bool nan = false;
    for (int64_t i = 0; i < n*k; ++i) {
        nan |= std::isnan(x.floats()[i]);
    }
    if (nan && ggml_validate_row_data(type, y.data.get(), y.size)) {
        printf("a NaN among the weights, and the blocks are valid\n");
        return -1;
    }
    ggml_get_type_traits(type)->to_float(y.data.get(), back.floats(), n*k);
    return n;
}

static int64_t feed_to_float(rng_t & rng, enum ggml_type type) {
    const int64_t k = some_columns(rng, type), n = between(rng, 1, 4);
    exact x(n*ggml_row_size(type, k)), y(n*k*sizeof(float));
    make_blocks(rng, type, x.data.get(), n, k);
    ggml_get_type_traits(type)->to_float(x.data.get(), y.floats(), n*k);
    ggml_validate_row_data(type, x.data.get(), x.size);
    return n;
}

template <auto dot>
static int64_t feed_dot(rng_t & rng, enum ggml_type type) {
    const int64_t k = some_columns(rng, type), n = between(rng, 1, 4);
    exact x(n*ggml_row_size(type, k)), y(ggml_row_size(GGML_TYPE_Q8_1, k));
    make_blocks(rng, type, x.data.get(), n, k);
    for (size_t i = 0; i < y.size; ++i) {
        y.data[i] = (uint8_t) rng();
    }
    for (size_t i = 0; i < y.size; ++i) { // Q8_1 has no code of -128
        y.data[i] = i % sizeof(block_q8_1) >= 4 && y.data[i] == 0x80 ? 0x81 : y.data[i];
    }
    for (int64_t r = 0; r < n; ++r) {
        float s;
        dot((int) k, &s, 0, x.data.get() + r*ggml_row_size(type, k), 0, y.data.get(), 0, 1);
    }
    return n;
}

// ---- products

// n rows of x, a stride of floats apart, times the rows of w: y [n][rows]
struct product {
    enum ggml_type type;
    bool row_scale;
    const exact & w;
    int64_t rows, k;
    const float * x;
    int64_t n, stride;
    float * y;
    const float * ranges; // [n], static ones, or null
};

// As ggml does it where there is no kernel for so few columns, or none at all
static void multiply_plain(const product & p) {
    exact column(ggml_row_size(GGML_TYPE_Q8_1, p.k));
    for (int64_t i = 0; i < p.n; ++i) {
        quantize_row_q8_1(p.x + i*p.stride, column.data.get(), p.k);
        for (int64_t r = 0; r < p.rows; ++r) {
            ggml_get_type_traits_cpu(p.type)->vec_dot((int) p.k, p.y + i*p.rows + r, 0, p.w.data.get() + r*ggml_row_size(p.type, p.k), 0,
                column.data.get(), 0, 1);
        }
    }
}

static void multiply(const product & p, int threads, bool use_ref) {
    struct ggml_init_params init = { 16*ggml_tensor_overhead(), nullptr, true };
    struct ggml_context * ctx = ggml_init(init);
    struct ggml_tensor * w = ggml_new_tensor_2d(ctx, p.type, p.k, p.rows);
    struct ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.k, p.n);
    struct ggml_tensor * y = ggml_mul_mat(ctx, w, x);
    w->flags |= p.row_scale ? GGML_TENSOR_FLAG_ROW_SCALE : 0;
    w->data   = p.w.data.get();
    x->nb[1]  = p.stride*sizeof(float);
    x->data   = (void *) p.x;
    y->data   = p.y;
    if (p.ranges) {
        y->src[2] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, p.n);
        y->src[2]->data = (void *) p.ranges;
    }

    exact work(ggml_mbq_work_size(threads, y));
    pthread_barrier_init(&barrier, nullptr, threads);
    std::atomic<bool> done{true};
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) {
        pool.emplace_back([&, i] {
            struct ggml_compute_params params = { i, threads, work.size, work.data.get(), nullptr, use_ref };
            if (!ggml_compute_forward_mul_mat_mbq(&params, y)) {
                done = false;
            }
        });
    }
    for (auto & thread : pool) {
        thread.join();
    }
    pthread_barrier_destroy(&barrier);
    ggml_free(ctx);
    if (!done) {
        multiply_plain(p);
    }
}

static bool same(const float * a, const float * b, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        if (memcmp(a + i, b + i, sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) {
            return false;
        }
    }
    return true;
}

static bool finite(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

// A product at once, and once more in random cuts of its columns
template <bool row_scale>
static int64_t feed_product(rng_t & rng, enum ggml_type type) {
    const int64_t k = some_columns(rng, type), rows = between(rng, 1, 40), n = between(rng, 1, between(rng, 0, 2) ? 5 : 70);
    const int64_t stride = k + between(rng, 0, 3);
    exact w(rows*ggml_row_size(type, k)), x(((n - 1)*stride + k)*sizeof(float)), whole(n*rows*sizeof(float)), cut(n*rows*sizeof(float));
    make_blocks(rng, type, w.data.get(), rows, k);
    make_floats(rng, x.floats(), x.size/sizeof(float));
    exact ranges(n*sizeof(float));
    make_floats(rng, ranges.floats(), n);
    for (int64_t i = 0; i < n; ++i) { // as the loader lets them pass
        const float range = std::fabs(ranges.floats()[i]);
        ranges.floats()[i] = std::isfinite(range) && range >= GGML_ROW_SCALE_AMAX_MIN && between(rng, 0, 2) ? range : 0.0f;
    }
    const float * some = row_scale && between(rng, 0, 1) ? ranges.floats() : nullptr;
    multiply({ type, row_scale, w, rows, k, x.floats(), n, stride, whole.floats(), some }, (int) between(rng, 1, 3), false);
    for (int64_t i = 0, columns; i < n; i += columns) {
        columns = std::min(between(rng, 1, 8), n - i);
        const product part = { type, row_scale, w, rows, k, x.floats() + i*stride, columns, stride, cut.floats() + i*rows, some ? some + i : nullptr };
        multiply(part, (int) between(rng, 1, 3), row_scale && between(rng, 0, 3) == 0);
    }
    for (int64_t i = 0; i < n; ++i) {
        if (same(whole.floats() + i*rows, cut.floats() + i*rows, rows) || (row_scale && !finite(x.floats() + i*stride, k))) {
            continue; // the contract of ggml-row-scale.h leaves open what activations give that are not finite
        }
        printf("%lld rows of %lld weights, %lld columns: another product when cut\n", (long long) rows, (long long) k, (long long) n);
        return -1;
    }
    return rows;
}

#define KERNELS(TYPE, name)                                                                                       \
    { "from_float " #TYPE,      feed_from_float,                                 GGML_TYPE_##TYPE },              \
    { "to_float " #TYPE,        feed_to_float,                                   GGML_TYPE_##TYPE },              \
    { "vec_dot " #TYPE,         feed_dot<ggml_vec_dot_##name##_q8_1>,            GGML_TYPE_##TYPE },              \
    { "vec_dot scalar " #TYPE,  feed_dot<ggml_vec_dot_##name##_q8_1_generic>,    GGML_TYPE_##TYPE },              \
    { "mul_mat " #TYPE,         feed_product<false>,                             GGML_TYPE_##TYPE },

std::vector<kernel> all_kernels() {
    return {
        KERNELS(MBQ3,     mbq3)
        KERNELS(MBQ3_64,  mbq3_64)
        KERNELS(MBQ3S,    mbq3s)
        KERNELS(MBQ3S_64, mbq3s_64)
        { "mul_mat, one scale a row, Q4_0", feed_product<true>, GGML_TYPE_Q4_0 },
        { "mul_mat, one scale a row, Q8_0", feed_product<true>, GGML_TYPE_Q8_0 },
        { "flash_attn_ext, few rows, F16",  feed_attention,     GGML_TYPE_F16 },
        { "flash_attn_ext, few rows, F32",  feed_attention,     GGML_TYPE_F32 },
    };
}
