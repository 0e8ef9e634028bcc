// Counts launches of kernels of the library that it is linked to (-Wl,--wrap, see relinked.py), and prints how many there were when it ends.

#include <stdio.h>

typedef struct { unsigned x, y, z; } size3;

static long n_launches;

int __real_cudaLaunchKernel(const void *, size3, size3, void **, size_t, void *)   __attribute__((weak));
int __real___cudaLaunchKernel(const void *, size3, size3, void **, size_t, void *) __attribute__((weak)); // CUDA 13
int __real_cudaLaunchKernelExC(const void *, const void *, void **)                __attribute__((weak));

int __wrap_cudaLaunchKernel(const void * kernel, size3 grid, size3 block, void ** args, size_t shared, void * stream) {
    n_launches++;
    return __real_cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

int __wrap___cudaLaunchKernel(const void * kernel, size3 grid, size3 block, void ** args, size_t shared, void * stream) {
    n_launches++;
    return __real___cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

int __wrap_cudaLaunchKernelExC(const void * config, const void * kernel, void ** args) {
    n_launches++;
    return __real_cudaLaunchKernelExC(config, kernel, args);
}

__attribute__((destructor)) static void print_launches(void) {
    fprintf(stderr, "launches %ld\n", n_launches);
}
