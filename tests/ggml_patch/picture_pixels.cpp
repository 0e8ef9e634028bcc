// The pixels of pictures (tools/mtmd/clip-mbq-pixels.h) and their other sizes (clip-mbq-resample.h), bit for bit. Run by test_tower_memory.py; ends with 1 where something is wrong.

#include "expect.h"
#include "clip-mbq-pixels.h"

#include <cmath>

static std::vector<uint8_t> noise(size_t n) {
    std::vector<uint8_t> res(n);
    uint32_t state = 1;
    for (auto & byte : res) {
        state = state*1664525u + 1013904223u;
        byte = state >> 24;
    }
    return res;
}

// weights as upstream's precompute_weights() lays them out, those of a tent; sharp: with negative ones, so that sums leave 0 to 255
struct filter {
    int n_max;
    std::vector<int> bounds;
    std::vector<int32_t> weights;

    filter(int from, int to, bool sharp) {
        const double scale = (double) from/to, reach = std::max(scale, 1.0);
        n_max = 2*(int) std::ceil(reach) + 1;
        weights.resize((size_t) to*n_max);
        for (int i = 0; i < to; i++) {
            const double center = (i + 0.5)*scale;
            const int begin = std::max((int) (center - reach + 0.5), 0), n = std::min((int) (center + reach + 0.5), from) - begin;
            bounds.insert(bounds.end(), { begin, n });
            double sum = 0;
            for (int k = 0; k < n; k++) {
                sum += 1 - std::fabs(begin + k + 0.5 - center)/reach;
            }
            for (int k = 0; k < n; k++) {
                const double share = (1 - std::fabs(begin + k + 0.5 - center)/reach)/sum;
                weights[(size_t) i*n_max + k] = (int32_t) std::lround(((sharp ? 1.5 : 1)*share - (sharp ? 0.5/n : 0))*(1 << 22));
            }
        }
    }

    clip_mbq_filter view() const { return { n_max, bounds, weights }; }
};

static uint8_t clipped(int64_t sum) {
    const int64_t value = (sum + (1 << 21)) >> 22;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

// one direction of a picture, straight down or across
static std::vector<uint8_t> one_way(const std::vector<uint8_t> & from, int from_width, int width, int height, const filter & f, bool down) {
    std::vector<uint8_t> res((size_t) width*height*3);
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++) {
            for (int c = 0; c < 3; c++) {
                const int i = down ? y : x;
                int64_t sum = 0;
                for (int k = 0; k < f.bounds[2*i + 1]; k++) {
                    const int at = f.bounds[2*i] + k;
                    sum += (int64_t) f.weights[(size_t) i*f.n_max + k]*from[3*((size_t) (down ? at : y)*from_width + (down ? x : at)) + c];
                }
                res[3*((size_t) y*width + x) + c] = clipped(sum);
            }
        }
    }
    return res;
}

static void sizes() {
    // smaller and larger, by one thread and by two to four, rows of the output that their number does not divide
    const int cases[][4] = { { 7, 5, 3, 2 }, { 40, 50, 81, 67 }, { 500, 420, 301, 255 }, { 300, 290, 411, 523 }, { 640, 700, 5, 70 } };
    for (const auto & k : cases) {
        for (const bool sharp : { false, true }) {
            const auto bytes = noise((size_t) k[0]*k[1]*3);
            const filter across(k[0], k[2], sharp), down(k[1], k[3], sharp);
            const auto narrowed = one_way(bytes, k[0], k[2], k[1], across, false);
            const auto expected = one_way(narrowed, k[2], k[2], k[3], down, true);
            expect(clip_mbq_resampled(bytes, k[0], k[2], k[3], across.view(), down.view()) == expected, "rows shared out are those of two passes");
        }
    }
}

static void pixels() {
    const float mean[3] = { 0.48145466f, 0.4578275f, 0.40821073f }, std[3] = { 0.26862954f, 0.26130258f, 0.27577711f };
    const size_t n = 1000;
    const auto bytes = noise(3*n);
    std::vector<float> expected(3*n);
    for (size_t i = 0; i < 3*n; i++) {
        expected[i] = (float) bytes[i] / 255.0f; // from_u8(), then normalize()
        expected[i] = (expected[i] - mean[i%3]) / std[i%3];
    }
    const auto planes = [&](const clip_mbq_pixels & from) {
        std::vector<float> res(3*n, NAN);
        from.to_planes(res.data(), n, 0, 333);
        from.to_planes(res.data(), n, 333, n);
        return res;
    };
    std::vector<float> in_planes(3*n);
    for (size_t i = 0; i < 3*n; i++) {
        in_planes[i%3*n + i/3] = expected[i];
    }

    clip_mbq_pixels of_bytes(bytes, mean, std), of_floats, none;
    of_floats = expected;
    expect(none.empty() && !of_bytes.empty() && !of_floats.empty(), "bytes are pixels as floats are");
    expect(planes(of_bytes) == in_planes && planes(of_floats) == in_planes, "planes are the same of both");

    clip_mbq_pixels copy = of_bytes;
    const clip_mbq_pixels & read = of_bytes;
    ggml_at_once(4, [&](size_t) { expect((const std::vector<float> &) read == expected, "several threads read the same floats"); });
    expect(((const std::vector<float> &) copy).data() == ((const std::vector<float> &) read).data(), "a copy shares them");
    copy[5] = 7.0f;
    expect(((const std::vector<float> &) read)[5] == expected[5] && planes(of_bytes) == in_planes, "what is written to a copy stays there");
    expected[5] = 7.0f;
    expect((const std::vector<float> &) copy == expected && planes(copy)[2*n + 1] == 7.0f, "and is in its planes");
    of_bytes.clear();
    expect(of_bytes.empty(), "nothing is left of what is cleared");
}

// bytes where a card would copy them from, which the CPU's memory stands for
static void memory() {
    const float mean[3] = { 0, 0, 0 }, std[3] = { 1, 1, 1 };
    const auto bytes = noise(3000);
    const clip_mbq_pixels before(bytes, mean, std);
    expect(!before.is_page_locked(), "without a card bytes lie in ordinary memory");
    clip_mbq_byte_memory::use(ggml_backend_cpu_buffer_type());
    const uint8_t * first = nullptr;
    {
        const clip_mbq_pixels one(bytes, mean, std), other(bytes, mean, std);
        expect(one.is_page_locked() && other.is_page_locked() && one.bytes() != other.bytes(), "each picture has its own");
        expect(std::equal(bytes.begin(), bytes.end(), one.bytes()) && std::equal(bytes.begin(), bytes.end(), other.bytes()), "and its bytes in it");
        first = one.bytes();
    }
    const clip_mbq_pixels a(bytes, mean, std), b(bytes, mean, std);
    expect(a.bytes() == first || b.bytes() == first, "what a picture gave back is taken again");
    const auto many = noise(clip_mbq_byte_memory::MOST);
    const clip_mbq_pixels large(many, mean, std);
    expect(!large.is_page_locked() && std::equal(many.begin(), many.end(), large.bytes()), "more than so much is not locked");
    expect(clip_mbq_byte_memory::get()->n_all() < clip_mbq_byte_memory::MOST, "nor counted");
}

// pictures of several threads for as much memory as there may be twice: the rest lies elsewhere, and no block is freed or left unused afterwards
static void full_memory() {
    const float mean[3] = { 0, 0, 0 }, std[3] = { 1, 1, 1 };
    const auto bytes = noise(clip_mbq_byte_memory::MOST/16);
    const auto pool = clip_mbq_byte_memory::get();
    size_t most = 0;
    for (int round = 0; round < 2; round++) {
        std::vector<clip_mbq_pixels> pictures(32);
        ggml_at_once(4, [&](size_t thread) {
            for (size_t i = thread; i < pictures.size(); i += 4) {
                pictures[i] = clip_mbq_pixels(bytes, mean, std);
            }
        });
        const size_t locked = std::count_if(pictures.begin(), pictures.end(), [](const auto & p) { return p.is_page_locked(); });
        expect(locked == 15, "as many as there is room for");
        expect(std::all_of(pictures.begin(), pictures.end(), [&](const auto & p) { return std::equal(bytes.begin(), bytes.end(), p.bytes()); }), "each has its bytes");
        most = std::max(most, pool->n_all());
    }
    expect(most <= clip_mbq_byte_memory::MOST && pool->n_all() == most && pool->n_spare() == most, "what is locked stays, for other pictures");
}

int main() {
    sizes();
    pixels();
    memory();
    full_memory();
    return failures ? 1 : 0;
}
