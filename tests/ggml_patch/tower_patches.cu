// picture_patches.h on every GPU, and a picture larger than its CTAs. Run by test_cuda_card.py.

#include "every_gpu.h"
#include "picture_patches.h"

int main() {
    return on_every_gpu([](ggml_backend_t backend) {
        check_all(backend);
        check(backend, { 896, 896, 2, 14, 2 }, GGML_TYPE_I8, GGML_TYPE_F16);
        return failures;
    });
}
