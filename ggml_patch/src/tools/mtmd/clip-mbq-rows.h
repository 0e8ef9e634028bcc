#pragma once

// Memory for a tower's output: rows of floats in the host memory that its backend copies to fastest (page-locked with a GPU), reused from picture
// to picture and not zero-filled. Upstream allocates a new vector each time. Included by clip-impl.h (clip-mbq-pixels.h).

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

// the memory pool of one mtmd_context's rows, or of all pictures' bytes (clip-mbq-bytes.h)
struct clip_mbq_row_pool {
    static constexpr size_t MAX_SPARE = 64u << 20; // bytes that are kept for later pictures: four pictures of 1024 tokens for a 7B

    explicit clip_mbq_row_pool(ggml_backend_buffer_type_t buft) : buft(buft) {}

    // a block of at least this many bytes: the smallest spare one, or a new one; nullptr if there is no memory, or if all blocks would be more than `most` bytes
    ggml_backend_buffer_t take(size_t n_bytes, size_t most = SIZE_MAX) {
        std::lock_guard<std::mutex> lock(mutex);
        auto best = spare.end();
        for (auto it = spare.begin(); it != spare.end(); ++it) {
            const size_t size = ggml_backend_buffer_get_size(*it);
            if (size >= n_bytes && (best == spare.end() || size < ggml_backend_buffer_get_size(*best))) {
                best = it;
            }
        }
        if (best != spare.end()) {
            ggml_backend_buffer_t buffer = *best;
            spare.erase(best);
            return buffer;
        }
        ggml_backend_buffer_ptr buffer(n_bytes <= most && n_all() <= most - n_bytes ? ggml_backend_buft_alloc_buffer(buft, n_bytes) : nullptr);
        if (!buffer) {
            return nullptr;
        }
        all.push_back(std::move(buffer));
        return all.back().get();
    }

    void give_back(ggml_backend_buffer_t buffer) {
        std::lock_guard<std::mutex> lock(mutex);
        if (closed) {
            return;
        }
        spare.push_back(buffer);
        while (n_spare() > MAX_SPARE) { // frees the oldest
            all.erase(std::find_if(all.begin(), all.end(), [&](const auto & other) { return other.get() == spare.front(); }));
            spare.erase(spare.begin());
        }
    }

    // bytes of spare blocks
    size_t n_spare() const {
        size_t n = 0;
        for (ggml_backend_buffer_t buffer : spare) {
            n += ggml_backend_buffer_get_size(buffer);
        }
        return n;
    }

    // bytes of all blocks, used or spare
    size_t n_all() const {
        size_t n = 0;
        for (const auto & buffer : all) {
            n += ggml_backend_buffer_get_size(buffer.get());
        }
        return n;
    }

    // frees everything: a batch may outlive its context, as when a server exits, and the GPU driver is gone by then
    void close() {
        std::lock_guard<std::mutex> lock(mutex);
        closed = true;
        spare.clear();
        all.clear();
    }

private:
    const ggml_backend_buffer_type_t buft;
    std::mutex mutex; // a batch may be freed while another thread encodes
    std::vector<ggml_backend_buffer_ptr> all;
    std::vector<ggml_backend_buffer_t> spare;
    bool closed = false;
};

// the rows of one chunk or batch, with the interface that upstream uses of std::vector<float>
struct clip_mbq_rows {
    clip_mbq_rows() = default;
    clip_mbq_rows(const clip_mbq_rows &) = delete;
    clip_mbq_rows & operator=(const clip_mbq_rows &) = delete;

    ~clip_mbq_rows() {
        give_back();
    }

    // resizes to this many floats, uninitialised
    void resize(const std::shared_ptr<clip_mbq_row_pool> & from, size_t n_floats) {
        if (!buffer || ggml_backend_buffer_get_size(buffer) < n_floats*sizeof(float)) {
            give_back();
            pool   = from;
            buffer = pool->take(n_floats*sizeof(float));
            if (!buffer) {
                throw std::bad_alloc();
            }
        }
        n = n_floats;
    }

    float * data() const {
        return buffer ? (float *) ggml_backend_buffer_get_base(buffer) : nullptr;
    }

    size_t size() const {
        return n;
    }

    bool empty() const {
        return n == 0;
    }

private:
    std::shared_ptr<clip_mbq_row_pool> pool;
    ggml_backend_buffer_t buffer = nullptr;
    size_t n = 0;

    void give_back() {
        if (buffer) {
            pool->give_back(buffer);
        }
        buffer = nullptr;
        n = 0;
    }
};

// an mtmd_context's output for pictures encoded without a batch, and the memory pool for all
struct clip_mbq_kept_rows : clip_mbq_rows {
    std::shared_ptr<clip_mbq_row_pool> memory; // once there is a tower

    ~clip_mbq_kept_rows() {
        if (memory) {
            memory->close();
        }
    }
};

struct clip_ctx;

// host memory that the tower's backend copies to
ggml_backend_buffer_type_t clip_mbq_host_buft(const clip_ctx * ctx);
