#pragma once

// A picture's rows stay in the caller's memory until they are written to a backend. For 1024 tokens that is 15 MB, which upstream copies
// to the batch and again to the micro-batch. Batches without pictures take upstream's path. Included by llama-batch.h.

#include "ggml-at-once.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>
#include <vector>

// a row that is added to a batch: its address if it may stay in place, else nullptr and a copy appended to `embd`
static inline const float * llama_mbq_keep_row(std::vector<float> & embd, const float * data, size_t n, bool picture) {
    if (picture) {
        return data;
    }
    embd.insert(embd.end(), data, data + n);
    return nullptr;
}

// the addresses of a batch's rows, nullptr for a token; false, and no addresses, if no row belongs to a picture
template <typename B> // llama_batch_ext
static bool llama_mbq_take_rows(const B & batch, std::vector<const float *> & rows) {
    rows.clear();
    if (std::none_of(batch.tokens.begin(), batch.tokens.end(), [](const auto & t) { return t.row; })) {
        return false;
    }
    for (const auto & t : batch.tokens) {
        rows.push_back(t.row || !t.has_embd ? t.row : batch.embd.data() + t.embd_off);
    }
    return true;
}

// a micro-batch's embeddings as one block: in place, or in `copy` if they are not contiguous. Nothing reads a mixed micro-batch as a block,
// so any address will do there.
static inline float * llama_mbq_block(const std::vector<const float *> & rows, std::vector<float> & copy, int64_t n_embd, bool mixed) {
    if (rows.empty()) {
        return copy.data();
    }
    if (mixed) {
        return const_cast<float *>(*std::find_if(rows.begin(), rows.end(), [](const float * row) { return row; }));
    }
    for (size_t i = 1; i < rows.size(); ++i) {
        if (rows[i] != rows[0] + i*n_embd) {
            for (const float * row : rows) {
                copy.insert(copy.end(), row, row + n_embd);
            }
            return copy.data();
        }
    }
    return const_cast<float *>(rows[0]);
}

// copies n rows at `from` to row i of an input; uses four threads for many, since the GPU waits for the first micro-batch's 7 MB
static inline void llama_mbq_set_run(ggml_tensor * to, const float * from, size_t i, size_t n) {
    const size_t n_parts = n*to->nb[1] >= 1 << 21 ? 4 : 1;
    ggml_at_once(n_parts, [=](size_t k) {
        const size_t begin = k*n/n_parts, end = (k + 1)*n/n_parts;
        ggml_backend_tensor_set(to, from + begin*to->ne[0], (i + begin)*to->nb[1], (end - begin)*to->nb[1]);
    });
}

// Writes a mixed micro-batch's embeddings, one run of contiguous rows at a time. The rows of tokens are then overwritten in the graph, in place and on the
// CPU, where the inputs and the token table are. Therefore every kind of micro-batch copies one tensor to the GPU, the scheduler's plan stays valid when the
// kind changes (for a new plan, the scheduler first waits), and the host prepares a micro-batch while the GPU computes the previous one.
template <typename U> // llama_ubatch
static void llama_mbq_set_rows(ggml_tensor * to, const U & ubatch) {
    if (!ubatch.data || ubatch.data->rows.empty()) {
        ggml_backend_tensor_set(to, ubatch.embd, 0, ggml_nbytes(to));
        return;
    }
    const auto & rows = ubatch.data->rows;
    for (size_t i = 0, n = 0; i < rows.size(); i += std::max<size_t>(n, 1)) {
        for (n = 0; i + n < rows.size() && rows[i] && rows[i + n] == rows[i] + n*to->ne[0]; ++n) {}
        if (n > 0) {
            llama_mbq_set_run(to, rows[i], i, n);
        }
    }
}
