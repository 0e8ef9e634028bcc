// Prints, for each "row_tiles column_tiles k multiprocessors" of its arguments, the plan and every part of every share: read by test_cuda.py.

#include "common.cuh" // what mbq-shares.cuh finds included before it
#include "mbq-shares.cuh"

#include <cstdio>
#include <cstdlib>

int main(int argc, char ** argv) {
    for (int i = 1; i + 3 < argc; i += 4) {
        mbq_gemm_args args = {};
        args.row_tiles    = atoi(argv[i]);
        args.column_tiles = atoi(argv[i + 1]);
        args.k            = atoi(argv[i + 2]);
        const mbq_gemm_plan plan = mbq_plan_gemm(args.row_tiles, args.column_tiles, args.k/128, atoi(argv[i + 3]));
        args.row_tiles    = (args.row_tiles + plan.blocks - 1)/plan.blocks;
        args.column_tiles = (args.column_tiles + plan.blocks - 1)/plan.blocks;
        args.shared       = plan.shared;
        printf("plan %d %d %d %d %d\n", plan.blocks, plan.shares, plan.shared, plan.converters, plan.early);
        for (int share = 0; share < plan.shares; ++share) {
            for (mbq_gemm_work work(args, share, plan.shares); work.next(args, plan.shares); ) {
                printf("%d %d %u %u\n", share, work.tile, work.first, work.last);
            }
        }
    }
    return 0;
}
