#pragma once

// What a request's pictures cost before the model sees them. Included by server-common.cpp.

#include "server-common.h"
#include "mtmd-helper.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <future>
#include <string>
#include <thread>
#include <vector>

// up to the first character that is none of base64's, as base64_decode() does
static raw_buffer media_base64_decode(const std::string & text) {
    static const std::array<int8_t, 256> values = [] {
        std::array<int8_t, 256> res;
        res.fill(-1);
        for (int8_t i = 0; i < 26; i++) {
            res['A' + i] = i;
            res['a' + i] = 26 + i;
        }
        for (int8_t i = 0; i < 10; i++) {
            res['0' + i] = 52 + i;
        }
        res['+'] = 62;
        res['/'] = 63;
        return res;
    }();

    const auto * in = (const uint8_t *) text.data();
    const size_t n  = text.size();
    raw_buffer out(n/4*3 + 3);
    uint8_t * to = out.data();

    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const int v[4] = { values[in[i]], values[in[i + 1]], values[in[i + 2]], values[in[i + 3]] };
        if ((v[0] | v[1] | v[2] | v[3]) < 0) {
            break;
        }
        *to++ = v[0] << 2 | v[1] >> 4;
        *to++ = v[1] << 4 | v[2] >> 2;
        *to++ = v[2] << 6 | v[3];
    }

    // one to three characters are left of a group, two of them make a byte
    uint32_t bits = 0;
    int n_left = 0;
    for (; i < n && values[in[i]] >= 0; i++) {
        bits = bits << 6 | values[in[i]];
        n_left++;
    }
    if (n_left == 2) {
        *to++ = bits >> 4;
    } else if (n_left == 3) {
        *to++ = bits >> 10;
        *to++ = bits >> 2;
    }
    out.resize(to - out.data());
    return out;
}

// the files of a prompt as bitmaps: each is hashed and decoded once, several at a time
struct media_bitmaps {
    std::vector<mtmd::bitmap_ptr> bitmaps;
    std::vector<mtmd_helper::video_ptr> videos;

    media_bitmaps(mtmd_context * mctx, const std::vector<raw_buffer> & files, bool placeholder, const mtmd_helper_init_opt & opt) :
            bitmaps(files.size()), videos(files.size()) {
        std::atomic<size_t> next = 0;
        auto work = [&] {
            for (size_t i = next++; i < files.size(); i = next++) {
                auto out = mtmd_helper_bitmap_init_from_buf(mctx, files[i].data(), files[i].size(), placeholder, opt);
                bitmaps[i].reset(out.bitmap);
                videos[i].reset(out.video_ctx);
            }
        };

        const size_t n_threads = std::min<size_t>(files.size(), std::max(1u, std::thread::hardware_concurrency()));
        std::vector<std::future<void>> others;
        for (size_t i = 1; i < n_threads; i++) {
            others.push_back(std::async(std::launch::async, work));
        }
        work();
    }

    // who takes one owns it; null if it could not be read
    mtmd_helper_bitmap_wrapper take(size_t i) {
        return { bitmaps[i].release(), videos[i].release() };
    }
};
