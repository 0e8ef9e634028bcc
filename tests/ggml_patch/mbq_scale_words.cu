// Prints what mbq_scale makes of every scale word of MBQ3S in either half of 32 bits, beside another one: read by test_cuda.py.

#include "common.cuh" // what mbq-block.cuh finds included before it
#include "mbq-block.cuh"

#include <cstdio>

int main() {
    for (uint32_t word = 0; word < 0x10000; ++word) {
        const uint32_t other = 0x7FFF - word/2;
        const float2 first  = mbq_scale<mbq_layout<128, 2>>(other << 16 | word, 0);
        const float2 second = mbq_scale<mbq_layout<128, 2>>(word << 16 | other, 1);
        printf("%a %a %a %a\n", first.x, first.y, second.x, second.y);
    }
    return 0;
}
