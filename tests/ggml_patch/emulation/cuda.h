// Enough of CUDA on one CPU thread to run mbq_mmv and what is around it: the threads of a block are coroutines that take turns where they
// wait for each other. No asynchronous copies and no tensor memory accelerator: these are the paths of a Turing card.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_fp16.h>
#include <functional>
#include <map>
#include <memory>
#include <ucontext.h>
#include <vector>

#undef __device__
#undef __global__
#undef __host__
#undef __forceinline__
#undef __shared__
#undef __align__
#undef __launch_bounds__
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __hfma2 emulated_hfma2
#define TURING_MMA_AVAILABLE
#define GGML_CUDA_CC_HOPPER 900
#define GGML_CUDA_CC_VOLTA 700
#define NO_DEVICE_CODE abort()
#define GGML_UNUSED(x) (void) (x)
#define GGML_UNUSED_VARS(...)

using std::max;
using std::min;

// ggml's

enum { GGML_GLU_OP_SWIGLU, GGML_GLU_OP_GEGLU, GGML_GLU_OP_SWIGLU_OAI, GGML_GLU_OP_SWIGLU_CLAMP };
inline float ggml_cuda_op_silu_single(float x) { return x/(1.0f + expf(-x)); }
inline float ggml_cuda_op_gelu_single(float x) { return x; }
inline float ggml_cuda_op_swiglu_oai_single(float x, float g) { return x*g; }
inline float ggml_cuda_op_swiglu_clamp_single(float x, float g, float) { return x*g; }
inline void  ggml_cuda_pdl_sync() {}
inline void  ggml_cuda_pdl_lc() {}
inline int   ggml_cuda_dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) {
        c += (int8_t) (a >> i)*(int8_t) (b >> i);
    }
    return c;
}

// The block that runs

struct three { unsigned x, y, z; };
inline three threadIdx, blockIdx, blockDim, gridDim;

struct coroutine {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    bool done;
};
inline std::vector<std::unique_ptr<coroutine>> threads;
inline int running, count;
inline ucontext_t outside;
inline std::function<void()> kernel;
inline std::map<int, std::pair<int, int>> barriers; // by number: threads that wait, times that it opened

inline void go_to(int thread) {
    running   = thread;
    threadIdx = { thread % blockDim.x, thread/blockDim.x, 0 };
}

// To the next thread that is not done; the last one leaves the block.
inline void take_turns() {
    const int here = running;
    int next = here;
    do {
        next = (next + 1) % count;
    } while (threads[next]->done && next != here);
    if (threads[next]->done) {
        setcontext(&outside);
    }
    go_to(next);
    swapcontext(&threads[here]->context, &threads[next]->context);
    go_to(here);
}

inline void run_thread() {
    kernel();
    threads[running]->done = true;
    take_turns();
}

inline void wait_for(int number, int n) {
    auto & barrier = barriers[number];
    const int opened = barrier.second;
    if (++barrier.first == n) {
        barrier = { 0, opened + 1 };
    }
    for (int turns = 0; barrier.second == opened; ++turns) {
        if (turns == 1000000) {
            printf("threads wait for each other at barrier %d\n", number);
            exit(1);
        }
        take_turns();
    }
}

template <typename F> void launch(three grid, three block, const F & f) {
    gridDim  = grid;
    blockDim = block;
    count    = block.x*block.y;
    kernel   = f;
    while ((int) threads.size() < count) {
        threads.push_back(std::make_unique<coroutine>());
    }
    for (unsigned i = 0; i < grid.x*grid.y; ++i) {
        blockIdx = { i % grid.x, i/grid.x, 0 };
        barriers.clear();
        for (int t = 0; t < count; ++t) {
            coroutine & c = *threads[t];
            c.done = false;
            getcontext(&c.context);
            c.context.uc_stack.ss_sp   = c.stack.data();
            c.context.uc_stack.ss_size = c.stack.size();
            makecontext(&c.context, run_thread, 0);
        }
        go_to(0);
        swapcontext(&outside, &threads[0]->context);
    }
}

inline void __syncthreads() { wait_for(0, count); }
inline void __syncwarp() { wait_for(1000 + running/32, 32); }

// What lanes of a warp see of each other

inline uint32_t seen[1024][6];

template <typename T> T shuffle(T v, int lane) {
    memcpy(seen[running], &v, sizeof(T));
    __syncwarp();
    memcpy(&v, seen[running/32*32 + lane], sizeof(T));
    __syncwarp();
    return v;
}
template <typename T> T __shfl_sync     (unsigned, T v, int lane) { return shuffle(v, lane); }
template <typename T> T __shfl_xor_sync (unsigned, T v, int mask) { return shuffle(v, running % 32 ^ mask); }
template <typename T> T __shfl_down_sync(unsigned, T v, int by)   { return shuffle(v, min(running % 32 + by, 31)); }

// mma.m16n8k32 as PTX defines it
inline void emulated_mma(int (&d)[4], const int (&a)[4], const int (&b)[2], int c) {
    memcpy(seen[running],     a, sizeof(a));
    memcpy(seen[running] + 4, b, sizeof(b));
    __syncwarp();
    const int warp = running/32*32, g = running % 32/4, t = running % 4;
    for (int i = 0; i < 4; ++i) {
        d[i] = c;
        for (int k = 0; k < 8; ++k) {
            d[i] = ggml_cuda_dp4a(seen[warp + 4*g + k % 4][k/4*2 + i/2], seen[warp + 4*(2*t + i % 2) + k % 4][4 + k/4], d[i]);
        }
    }
    __syncwarp();
}

// Functions of one thread

inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float    __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
inline float    __fdividef(float a, float b) { return a/b; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
    const uint64_t both = (uint64_t) b << 32 | a;
    uint32_t v = 0;
    for (int i = 0; i < 4; ++i) {
        v |= (uint32_t) (both >> 8*(s >> 4*i & 7) & 0xFF) << 8*i;
    }
    return v;
}
inline half2 emulated_hfma2(half2 a, half2 b, half2 c) {
    const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
    return half2{ __double2half((double) x.x*y.x + z.x), __double2half((double) x.y*y.y + z.y) };
}
