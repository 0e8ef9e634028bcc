#pragma once

// The embeddings of a batch go from it to the micro-batches without a flat copy in between, and are written there once: a picture of 1024
// tokens is 15 MB. Included by llama-batch.cpp.

#include <cstdint>
#include <vector>

// where the rows of a batch's embeddings are; is_embd says which entries of a mixed batch have one, it is empty for other batches
struct llama_mbq_rows {
    std::vector<int32_t> rows;

    explicit llama_mbq_rows(const std::vector<int8_t> & is_embd) : rows(is_embd.size(), -1) {
        int32_t n = 0;
        for (size_t i = 0; i < is_embd.size(); ++i) {
            if (is_embd[i]) {
                rows[i] = n++;
            }
        }
    }

    // append the row of entry idx to `to`; zeros for a token
    void append(std::vector<float> & to, const float * embd, int64_t n_embd, int32_t idx) const {
        const int64_t row = rows.empty() ? idx : rows[idx];
        if (row < 0) {
            to.insert(to.end(), n_embd, 0.0f);
        } else {
            to.insert(to.end(), embd + row*n_embd, embd + (row + 1)*n_embd);
        }
    }
};
