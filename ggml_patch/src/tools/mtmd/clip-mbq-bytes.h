#pragma once

// A picture's bytes in page-locked memory, as soon as a vision tower runs on a GPU: a pass then starts with the transfer. Copying 2.4 MB (896 x 896 pixels) to page-locked
// memory first takes one thread 0.1 to 0.4 ms. Included by clip-impl.h (clip-mbq-pixels.h).

#include "clip-mbq-rows.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

// One pool per process, because pictures may outlive every context. It is never destroyed, because the GPU driver may shut down first, and frees no block before:
// freeing page-locked memory waits for the GPU.
struct clip_mbq_byte_memory {
    static constexpr size_t MOST = clip_mbq_row_pool::MAX_SPARE; // beyond this, pictures use ordinary memory

    // makes the pool, once; returns buft
    static ggml_backend_buffer_type_t use(ggml_backend_buffer_type_t buft) {
        std::lock_guard<std::mutex> lock(mutex());
        if (!pool()) {
            pool() = std::make_shared<clip_mbq_row_pool>(buft);
        }
        return buft;
    }

    // nullptr if no tower has been on a GPU yet
    static std::shared_ptr<clip_mbq_row_pool> get() {
        std::lock_guard<std::mutex> lock(mutex());
        return pool();
    }

private:
    static std::mutex & mutex() {
        static auto * made = new std::mutex;
        return *made;
    }

    static std::shared_ptr<clip_mbq_row_pool> & pool() {
        static auto * made = new std::shared_ptr<clip_mbq_row_pool>;
        return *made;
    }
};

// a copy of a picture's bytes
struct clip_mbq_bytes {
    clip_mbq_bytes() = default;
    clip_mbq_bytes(const clip_mbq_bytes &) = delete;
    clip_mbq_bytes & operator=(const clip_mbq_bytes &) = delete;

    ~clip_mbq_bytes() {
        if (buffer) {
            pool->give_back(buffer);
        }
    }

    // to be called once
    void copy(const std::vector<uint8_t> & from) {
        n    = from.size();
        pool = clip_mbq_byte_memory::get();
        if (pool && n > 0) {
            buffer = pool->take(n, clip_mbq_byte_memory::MOST);
        }
        if (buffer) {
            memcpy(ggml_backend_buffer_get_base(buffer), from.data(), n);
        } else {
            ordinary = from;
        }
    }

    const uint8_t * data() const { return buffer ? (const uint8_t *) ggml_backend_buffer_get_base(buffer) : ordinary.data(); }
    size_t size() const { return n; }
    bool empty() const { return n == 0; }
    bool is_page_locked() const { return buffer != nullptr; }

private:
    std::shared_ptr<clip_mbq_row_pool> pool;
    ggml_backend_buffer_t buffer = nullptr;
    std::vector<uint8_t> ordinary;
    size_t n = 0;
};
