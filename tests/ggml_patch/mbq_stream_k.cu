// Prints, for each "m_tiles n_tiles k multiprocessors" of its arguments, the plan and every part of every worker: read by test_cuda.py.

#include "common.cuh" // what mbq-stream-k.cuh finds included before it
#include "mbq-stream-k.cuh"

#include <cstdio>
#include <cstdlib>

int main(int argc, char ** argv) {
    for (int i = 1; i + 3 < argc; i += 4) {
        mbq_gemm_args args = {};
        args.m_tiles       = atoi(argv[i]);
        args.n_tiles       = atoi(argv[i + 1]);
        args.K             = atoi(argv[i + 2]);
        const mbq_gemm_plan plan = mbq_plan_gemm(args.m_tiles, args.n_tiles, args.K/128, atoi(argv[i + 3]));
        args.m_tiles       = (args.m_tiles + plan.cluster - 1)/plan.cluster;
        args.n_tiles       = (args.n_tiles + plan.cluster - 1)/plan.cluster;
        args.streamk_tiles = plan.streamk_tiles;
        printf("plan %d %d %d %d %d\n", plan.cluster, plan.workers, plan.streamk_tiles, plan.converters, plan.early);
        for (int worker = 0; worker < plan.workers; ++worker) {
            for (mbq_stream_k work(args, worker, plan.workers); work.next(args, plan.workers); ) {
                printf("%d %d %u %u\n", worker, work.tile, work.first, work.last);
            }
        }
    }
    return 0;
}
