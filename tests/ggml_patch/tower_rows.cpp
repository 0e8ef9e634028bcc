// The memory of towers' outputs (tools/mtmd/clip-mbq-rows.h) on the CPU. Run by test_tower_memory.py; ends with 1 where something is wrong.

#include "expect.h"
#include "clip-mbq-rows.h"

#include <cstring>
#include <initializer_list>

int main() {
    const size_t MiB = (1 << 20)/sizeof(float);
    auto memory = std::make_shared<clip_mbq_row_pool>(ggml_backend_cpu_buffer_type());

    clip_mbq_rows one;
    expect(one.empty() && one.size() == 0 && !one.data(), "new rows are empty");
    one.resize(memory, 3*MiB);
    const float * first = one.data();
    memset(one.data(), 0, one.size()*sizeof(float));
    one.resize(memory, MiB);
    expect(one.data() == first && one.size() == MiB && !one.empty(), "fewer rows stay where they are");
    one.resize(memory, 3*MiB);
    expect(one.data() == first, "and so do as many as before");

    {
        clip_mbq_rows other;
        other.resize(memory, 2*MiB);
        expect(other.data() != first, "rows in use are nobody else's");
        first = other.data();
    }
    clip_mbq_rows next;
    next.resize(memory, MiB);
    expect(next.data() == first, "what was given back is taken again");

    // 60 MiB wait; 20 more, and the oldest 30 are gone, which AddressSanitizer or a leak would show
    {
        clip_mbq_rows a, b;
        a.resize(memory, 30*MiB);
        b.resize(memory, 29*MiB);
    }
    expect(memory->n_spare() == 59u << 20, "up to 64 MiB wait");
    {
        clip_mbq_rows a;
        a.resize(memory, 20*MiB);
        expect(memory->n_spare() == 30u << 20, "the smallest that is large enough is taken");
        clip_mbq_rows b;
        b.resize(memory, 40*MiB);
    }
    expect(memory->n_spare() <= clip_mbq_row_pool::MAX_SPARE, "no more than 64 MiB wait");
    {
        clip_mbq_rows huge;
        huge.resize(memory, 65*MiB);
    }
    expect(memory->n_spare() == 0, "larger ones do not");

    // a context that is gone has freed everything, and its batches may go later
    {
        clip_mbq_rows late;
        {
            clip_mbq_kept_rows context;
            context.memory = std::make_shared<clip_mbq_row_pool>(ggml_backend_cpu_buffer_type());
            context.resize(context.memory, MiB);
            late.resize(context.memory, MiB);
        }
    }
    return failures > 0;
}
