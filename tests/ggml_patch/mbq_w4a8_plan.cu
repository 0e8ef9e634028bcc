// Prints how mbq_w4a8_gemm ("gemm M N steps multiprocessors fours dense bits in_turns") or mbq_w4a8_mmv ("mmv M pieces units units_thread stage_bytes multiprocessors smem")
// shares out its work: read by test_cuda.py.

#include "mbq-w4a8-plan.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int argc, char ** argv) {
    const auto a = [&](const int i) { return atoll(argv[i + 2]); };
    if (argc == 10 && strcmp(argv[1], "gemm") == 0) {
        const int64_t rows = a(0);
        const mbq_w4a8_gemm_plan plan = mbq_w4a8_plan_gemm(&rows, 1, a(1), a(2), { a(3), a(4) }, a(5), a(6), a(7));
        const mbq_w4a8_shape & shape = MBQ_W4A8_SHAPES[plan.shape];
        printf("%d %d %d %d %d %d %d %d\n", plan.shape, shape.BM, shape.BN, shape.CL, plan.m_tiles, plan.n_tiles, plan.workers, plan.parts);
        return 0;
    }
    if (argc == 9 && strcmp(argv[1], "mmv") == 0) {
        const mbq_w4a8_mmv_plan plan = mbq_w4a8_plan_mmv(a(0), a(1), a(2), a(3), a(4), a(5), a(6));
        printf("%d %d %d %d\n", plan.kw, plan.groups, plan.ctas, plan.stages);
        return 0;
    }
    return 1;
}
