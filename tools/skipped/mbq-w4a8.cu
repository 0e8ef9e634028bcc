// Products of weights with one scale per row without the pass that quantises: activations are whatever lies in their memory, and answers are wrong. For
// bench_activations.py --gpu, which puts it in the place of the file of this name and so times what no quantiser can beat. Norms and SwiGLU are
// upstream's kernels, since there is nothing to fuse them with. Flags of a product have to be 0, which costs a small memset where the pass did it.

#include "mbq-w4a8.cuh"
#include "mbq-w4a8-fuse.cuh"
#include "mbq-w4a8-launch.cuh"

static void mbq_w4a8_skip(ggml_backend_cuda_context & ctx, const mbq_w4a8_int8 & to) {
    if (to.n_flags > 0) {
        CUDA_CHECK(cudaMemsetAsync(to.flags, 0, to.n_flags*sizeof(int), ctx.stream()));
    }
}

#define mbq_w4a8_quantise(ctx, m, order, to) mbq_w4a8_skip(ctx, to)
#define mbq_w4a8_fuse_norm(...) false
#define mbq_w4a8_fuse_glu(...)  -1

#include MBQ_REPLACED // the build's own
