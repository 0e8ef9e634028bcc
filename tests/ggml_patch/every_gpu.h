#pragma once

// What programs that compare kernels on a GPU do round their cases.

#include "ggml-backend.h"
#include <cstdio>

// The sum of what `check` gives for each GPU, how many cases are wrong there, printed; 1 where that is not 0 or there is no GPU, for main.
template <typename F>
static int on_every_gpu(const F & check, const char * what = "") {
    int bad = 0, gpus = 0;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_GPU) {
            ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
            bad += check(backend);
            ++gpus;
            ggml_backend_free(backend);
        }
    }
    printf("%d %swrong on %d GPUs\n", bad, what, gpus);
    return bad != 0 || gpus == 0;
}
