// Prints what mbq_scale makes of every head of MBQ3S in either half of a word, beside another head: read by test_cuda.py.

#include "common.cuh" // what mbq-block.cuh finds included before it
#include "mbq-block.cuh"

#include <cstdio>

int main() {
    for (uint32_t head = 0; head < 0x10000; ++head) {
        const uint32_t other = 0x7FFF - head/2;
        const float2 first  = mbq_scale<mbq_layout<128, 2>>(other << 16 | head, 0);
        const float2 second = mbq_scale<mbq_layout<128, 2>>(head << 16 | other, 1);
        printf("%a %a %a %a\n", first.x, first.y, second.x, second.y);
    }
    return 0;
}
