// A picture's patches by the CUDA kernel's own source (mbq-patches.cu) on the CPU, against the rule in ggml-patches.h, bit for bit. test_cuda_emulated.py compiles and runs it.

#include "cuda.h"

static float __fdiv_rn(float a, float b) { return a/b; }
static float __fsub_rn(float a, float b) { return a - b; }
#include "patches.cuh"

static const ggml_patches_params PARAMS = { 0, 0, 0, { 0.48145466f, 0.4578275f, 0.40821073f }, { 0.26862954f, 0.26130258f, 0.27577711f } };

// ctas: fewer than patches, so that each computes several
template <typename T> static int check(const int width, const int height, const int pictures, const int size, const int merge, const int ctas, const bool of_bytes) {
    std::vector<uint8_t> bytes((size_t) 3*width*height*pictures);
    std::vector<float> floats(bytes.size());
    for (size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = (uint32_t) (i*2654435761u) >> 24;
        const float value = (float) bytes[i] / 255.0f;
        floats[i] = (value - PARAMS.mean[i%3]) / PARAMS.std[i%3];
    }
    const int across = width/size, patches = across*(height/size), length = 3*size*size;
    std::vector<T> out((size_t) patches*pictures*length, (T) -1.0f);
    mbq_patches_args args = { of_bytes ? bytes.data() : nullptr, of_bytes ? nullptr : floats.data(), out.data(), PARAMS, width, height, patches, patches*pictures };
    args.of.size  = size;
    args.of.merge = merge;
    launch({ (unsigned) ctas, 1, 1 }, { MBQ_PATCHES_THREADS, 1, 1 }, [&] { mbq_patches<T>(args); });
    int wrong = 0;
    for (int row = 0; row < patches*pictures; ++row) {
        const int i = row%patches, group = i/(merge*merge), inside = i%(merge*merge), groups = across/merge;
        for (int k = 0; k < length; ++k) {
            const int y = (group/groups*merge + inside/merge)*size + k/size%size, x = (group%groups*merge + inside%merge)*size + k%size;
            const T expected = (T) floats[(((size_t) row/patches*height + y)*width + x)*3 + k/(size*size)];
            wrong += memcmp(&expected, &out[(size_t) row*length + k], sizeof(T)) != 0;
        }
    }
    if (wrong) {
        printf("%d x %d, %d pictures: %d wrong\n", width, height, pictures, wrong);
    }
    return wrong;
}

int main() {
    int wrong = 0;
    for (const bool of_bytes : { true, false }) {
        wrong += check<half>(84, 56, 2, 14, 2, 5, of_bytes) + check<float>(28, 28, 1, 14, 2, 4, of_bytes) + check<half>(48, 80, 1, 16, 1, 15, of_bytes);
    }
    return wrong > 0;
}
