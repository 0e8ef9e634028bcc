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

// the rows of a micro-batch (indices into the batch) in the order that they are computed in: those of pictures that ask for it (llama_embd) come
// first within their sequence set, everything else stays in its order. Attention's mask comes from positions, so only who lies beside whom changes.
inline std::vector<int32_t> llama_mbq_order(std::vector<int32_t> idxs, const std::vector<int8_t> & picture, size_t n_seqs) {
    const size_t n = idxs.size()/n_seqs;
    for (size_t s = 0; s < n_seqs; ++s) {
        std::stable_partition(idxs.begin() + s*n, idxs.begin() + (s + 1)*n, [&](int32_t i) { return picture[i] == 2; });
    }
    return idxs;
}
