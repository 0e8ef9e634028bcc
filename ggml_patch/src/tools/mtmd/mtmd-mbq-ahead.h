#pragma once

// Preprocesses several pictures of a prompt at a time. Included by mtmd.cpp before mtmd_tokenizer.

#include "ggml-at-once.h"
#include "mtmd-image.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <thread>
#include <vector>

struct mtmd_mbq_ahead {
    int n_pictures = 0; // in the prompt: some families preprocess a single picture differently

    // B has nx, ny, is_audio, is_placeholder() and get_ro_buf(), like mtmd_bitmap; groups are the tokenizer's
    template <typename B>
    void start(const mtmd_image_preprocessor * preprocessor, const std::vector<std::vector<const B *>> & groups) {
        std::vector<const B *> pictures;
        n_pictures = groups.size();
        for (const auto & group : groups) {
            for (const B * picture : group) {
                if (!picture->is_audio && !picture->is_placeholder() && picture->nx > 0 && picture->ny > 0 && !results.count(picture)) {
                    results[picture] = {};
                    pictures.push_back(picture);
                }
            }
        }
        const size_t n_threads = std::min<size_t>(pictures.size(), std::max(1u, std::thread::hardware_concurrency()));
        if (!preprocessor || n_threads < 2) {
            results.clear();
            return;
        }

        std::atomic<size_t> next = 0;
        ggml_at_once(n_threads, [&](size_t) {
            for (size_t i = next++; i < pictures.size(); i = next++) {
                clip_image_u8 img;
                img.set_size({ (int) pictures[i]->nx, (int) pictures[i]->ny }, false);
                img.cpy_buf(pictures[i]->get_ro_buf());
                results.at(pictures[i]) = std::make_unique<mtmd_image_preproc_out>(preprocessor->preprocess_among(img, n_pictures));
            }
        });
    }

    // the result of start() for a picture, which can be taken once; for others, calls make()
    template <typename B, typename F>
    mtmd_image_preproc_out take(const B * picture, F make) {
        auto it = results.find(picture);
        if (it == results.end() || !it->second) {
            return make();
        }
        mtmd_image_preproc_out res = std::move(*it->second);
        results.erase(it);
        return res;
    }

private:
    std::map<const void *, std::unique_ptr<mtmd_image_preproc_out>> results;
};
