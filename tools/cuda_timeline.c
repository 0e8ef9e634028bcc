// Records when the host calls the CUDA runtime, and how long the GPU takes for each CUDA graph. Loaded in front of libcudart with LD_PRELOAD; the process starts and reads
// the recording itself (tower_timeline.py). Unlike a profiler it does not delay the launch of a CUDA graph; two events around each graph take 3 us.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

struct call {
    const char * name;
    double begin, end; // ms
    size_t bytes;      // of a copy
    int    graph;      // index of its events + 1, or 0
};

enum { MOST_CALLS = 1 << 16, MOST_GRAPHS = 64 };

static struct call calls[MOST_CALLS];
static int n_calls, n_graphs;
static void * events[MOST_GRAPHS][2];

// The runtime's own function, also where the runtime was opened without making its symbols visible to others
static void * next(const char * name) {
    void * found = dlsym(RTLD_NEXT, name);
    const char * runtimes[] = { "libcudart.so.13", "libcudart.so.12" };
    for (int i = 0; i < 2 && !found; ++i) {
        void * runtime = dlopen(runtimes[i], RTLD_NOW | RTLD_NOLOAD);
        found = runtime ? dlsym(runtime, name) : NULL;
    }
    return found;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec*1e3 + t.tv_nsec*1e-6;
}

static void note(const char * name, double begin, double end, size_t bytes, int graph) {
    const int i = __sync_fetch_and_add(&n_calls, 1);
    if (i < MOST_CALLS) {
        calls[i] = (struct call) { name, begin, end, bytes, graph };
    }
}

#define RECORDED(name, parameters, arguments, bytes)            \
    int name parameters {                                       \
        static int (*real) parameters;                          \
        if (!real) {                                            \
            real = (int (*) parameters) next(#name);            \
        }                                                       \
        const double begin = now();                             \
        const int status = real arguments;                      \
        note(#name, begin, now(), bytes, 0);                    \
        return status;                                          \
    }

RECORDED(cudaMemcpyAsync, (void * to, const void * from, size_t n, int kind, void * stream), (to, from, n, kind, stream), n)
RECORDED(cudaMemcpy, (void * to, const void * from, size_t n, int kind), (to, from, n, kind), n)
RECORDED(cudaMemsetAsync, (void * to, int value, size_t n, void * stream), (to, value, n, stream), n)
RECORDED(cudaStreamSynchronize, (void * stream), (stream), 0)
RECORDED(cudaDeviceSynchronize, (void), (), 0)
RECORDED(cudaEventSynchronize, (void * event), (event), 0)
RECORDED(cudaLaunchKernelExC, (const void * config, const void * kernel, void ** args), (config, kernel, args), 0)
RECORDED(cudaGraphInstantiate, (void ** made, void * graph, unsigned long long flags), (made, graph, flags), 0)

int cudaGraphLaunch(void * graph, void * stream) {
    static int (*real)(void *, void *), (*create)(void **), (*record)(void *, void *);
    if (!real) {
        real   = (int (*)(void *, void *)) next("cudaGraphLaunch");
        create = (int (*)(void **)) next("cudaEventCreate");
        record = (int (*)(void *, void *)) next("cudaEventRecord");
    }
    const int i = n_graphs++ % MOST_GRAPHS;
    for (int j = 0; j < 2 && !events[i][j]; ++j) {
        create(&events[i][j]);
    }
    record(events[i][0], stream);
    const double begin = now();
    const int status = real(graph, stream);
    note("cudaGraphLaunch", begin, now(), 0, i + 1);
    record(events[i][1], stream);
    return status;
}

// Forgets everything recorded so far; returns the time from which calls count
double timeline_start(void) {
    n_calls = 0;
    return now();
}

// Call i in order of time; 0 behind the last one. gpu: ms that the GPU took for a graph, which must have finished
int timeline_read(int i, const char ** name, double * begin, double * end, size_t * bytes, float * gpu) {
    if (i >= n_calls || i >= MOST_CALLS) {
        return 0;
    }
    *name  = calls[i].name;
    *begin = calls[i].begin;
    *end   = calls[i].end;
    *bytes = calls[i].bytes;
    *gpu   = 0.0f;
    if (calls[i].graph) {
        int (*elapsed)(float *, void *, void *) = (int (*)(float *, void *, void *)) next("cudaEventElapsedTime");
        elapsed(gpu, events[calls[i].graph - 1][0], events[calls[i].graph - 1][1]);
    }
    return 1;
}
