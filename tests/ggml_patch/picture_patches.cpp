// picture_patches.h on the CPU. Run by test_tower_memory.py; ends with 1 where something is wrong.

#include "picture_patches.h"

#include "ggml-cpu.h"

int main() {
    ggml_backend_ptr backend(ggml_backend_cpu_init());
    for (const int threads : { 1, 3 }) {
        ggml_backend_cpu_set_n_threads(backend.get(), threads);
        check_all(backend.get());
    }
    return failures > 0;
}
