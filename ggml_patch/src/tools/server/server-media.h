#pragma once

// Makes pictures in a request cost less before the model sees them. Included by server-common.cpp.

#include "ggml-at-once.h"
#include "server-common.h"
#include "mtmd-helper.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// decodes n letters, up to the first one outside base64's alphabet, like base64_decode()
static raw_buffer media_base64_decode(const char * text, size_t n) {
    // the value of a letter at each of the four places of a group; larger than 24 bits: outside the alphabet
    static const std::array<std::array<uint32_t, 256>, 4> tables = [] {
        std::array<std::array<uint32_t, 256>, 4> res;
        for (int place = 0; place < 4; place++) {
            res[place].fill(1u << 24);
            const auto set = [&](char letter, uint32_t value) { res[place][(uint8_t) letter] = value << (18 - 6*place); };
            for (int i = 0; i < 26; i++) {
                set('A' + i, i);
                set('a' + i, 26 + i);
            }
            for (int i = 0; i < 10; i++) {
                set('0' + i, 52 + i);
            }
            set('+', 62);
            set('/', 63);
        }
        return res;
    }();

    const auto * in = (const uint8_t *) text;
    raw_buffer out(n/4*3 + 3);
    uint8_t * to = out.data();

    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const uint32_t bits = tables[0][in[i]] | tables[1][in[i + 1]] | tables[2][in[i + 2]] | tables[3][in[i + 3]];
        if (bits >> 24) {
            break;
        }
        *to++ = bits >> 16;
        *to++ = bits >> 8;
        *to++ = bits;
    }

    // one to three letters of a group remain; two make one byte, three make two
    uint32_t bits = 0;
    int n_left = 0;
    for (; i < n && !(tables[3][in[i]] >> 24); i++) {
        bits = bits << 6 | tables[3][in[i]];
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

bool server_media_offline = false;

// whether handle_media() has nothing left to do: decodes the usual form of a file in a request, "data:image/...;base64,...", without copies, and refuses
// what --offline forbids
static bool media_taken(const std::string & url, std::vector<raw_buffer> & out_files) {
    if (server_media_offline && string_starts_with(url, "http")) {
        throw std::invalid_argument("http URLs are not allowed with --offline");
    }
    const size_t comma = url.find(',');
    if (comma == std::string::npos || url.find(',', comma + 1) != std::string::npos) {
        return false;
    }
    const std::string head = url.substr(0, comma);
    const bool known = string_starts_with(head, "data:image/") || string_starts_with(head, "data:video/") || string_starts_with(head, "data:audio/");
    if (!known || !string_ends_with(head, "base64")) {
        return false;
    }
    out_files.push_back(media_base64_decode(url.data() + comma + 1, url.size() - comma - 1));
    return true;
}

// the files of a prompt as bitmaps: each is hashed and decoded once, several at a time
struct media_bitmaps {
    std::vector<mtmd::bitmap_ptr> bitmaps;
    std::vector<mtmd_helper::video_ptr> videos;

    media_bitmaps(mtmd_context * mctx, const std::vector<raw_buffer> & files, bool placeholder, const mtmd_helper_init_opt & opt) :
            bitmaps(files.size()), videos(files.size()) {
        std::atomic<size_t> next = 0;
        const size_t n_threads = std::min<size_t>(files.size(), std::max(1u, std::thread::hardware_concurrency()));
        ggml_at_once(n_threads, [&](size_t) {
            for (size_t i = next++; i < files.size(); i = next++) {
                auto out = mtmd_helper_bitmap_init_from_buf(mctx, files[i].data(), files[i].size(), placeholder, opt);
                bitmaps[i].reset(out.bitmap);
                videos[i].reset(out.video_ctx);
            }
        });
    }

    // the caller owns the result; null if it could not be read
    mtmd_helper_bitmap_wrapper take(size_t i) {
        return { bitmaps[i].release(), videos[i].release() };
    }
};
