#pragma once

#include "llama-batch.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

// llama_embd.picture for each row of a batch
inline std::vector<int8_t> llama_mbq_pictures(const std::vector<llama_batch_ext::token> & tokens) {
    std::vector<int8_t> res(tokens.size());
    std::transform(tokens.begin(), tokens.end(), res.begin(), [](const llama_batch_ext::token & t) { return t.picture; });
    return res;
}

// the order in which the rows of a micro-batch (indices into the batch) are computed: those of pictures that request it (llama_embd) come first within
// their sequence set, the others keep their order. Attention's mask depends on positions, so only the neighbours of a row change.
inline std::vector<int32_t> llama_mbq_order(std::vector<int32_t> idxs, const std::vector<int8_t> & picture, size_t n_seqs) {
    const size_t n = idxs.size()/n_seqs;
    for (size_t s = 0; s < n_seqs; ++s) {
        std::stable_partition(idxs.begin() + s*n, idxs.begin() + (s + 1)*n, [&](int32_t i) { return picture[i] == 2; });
    }
    return idxs;
}
