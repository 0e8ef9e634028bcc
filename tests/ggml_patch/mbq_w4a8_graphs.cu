// What is decided from a graph about products of weights with one scale a row, without a GPU: "inputs GRAPHS", "column GRAPHS" and "layer BIAS NORM KEEP", see the
// headers. One program, since compiling it is what takes the time. Run by test_cuda.py.

#include "mbq-w4a8-column.cuh"

#include <cstdlib>
#include <cstring>

static mbq_w4a8_order mbq_w4a8_order_of(const ggml_backend_cuda_context &, const ggml_tensor * dst) {
    return (mbq_w4a8_order) dst->src[0]->op_params[0];
}

std::unique_ptr<ggml_cuda_pool> ggml_backend_cuda_context::new_pool_for_device(int, int) { return nullptr; }

#include "mbq_w4a8_column.h"
#include "mbq_w4a8_inputs.h"
#include "mbq_w4a8_layer.h"

int main(int argc, char ** argv) {
    const auto is = [&](const char * name, const int n) { return argc == 2 + n && strcmp(argv[1], name) == 0; };
    return is("inputs", 1) ? inputs_test::run(atoi(argv[2])) : is("column", 1) ? column_test::run(atoi(argv[2])) :
        is("layer", 3) ? layer_test::run(atoi(argv[2]), atoi(argv[3]), atoi(argv[4])) : 2;
}
