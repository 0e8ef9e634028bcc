// online Hadamard transform before ffn_down, for weights that were rotated offline (mbq-gguf: convert --rotate full)
//
// mbq.hadamard.ffn_down = n in the file means that ffn_down was multiplied by the inverse of a block-diagonal Walsh-Hadamard matrix with
// blocks of n on its input side, so its input must be transformed accordingly. without the key the graph is exactly upstream's.

#include "llama-mbq.h"

#include "gguf.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <cmath>
#include <stdexcept>
#include <vector>

namespace {

// the limit of ggml-cuda's fast transform; mbq-gguf writes no larger blocks
constexpr uint32_t HADAMARD_MAX = 512;

// the matrix itself, read only by backends without the GGML_HINT_SRC0_IS_HADAMARD fast path; filled on demand
class llm_graph_input_mbq_hadamard : public llm_graph_input_i {
public:
    explicit llm_graph_input_mbq_hadamard(ggml_tensor * rot) : rot(rot) {}

    void set_input(const llama_ubatch * /*ubatch*/) override {
        if (rot->buffer == nullptr) { // not allocated if no backend reads it
            return;
        }
        const int64_t n = rot->ne[0];
        std::vector<float> data(n*n);

        // Sylvester's doubling, as the fast path computes it
        data[0] = 1.0f/sqrtf(float(n));
        for (int64_t s = 1; s < n; s *= 2) {
            for (int64_t i = 0; i < s; ++i) {
                for (int64_t j = 0; j < s; ++j) {
                    const float val = data[i*n + j];

                    data[(i + s)*n + (j    )] =  val;
                    data[(i    )*n + (j + s)] =  val;
                    data[(i + s)*n + (j + s)] = -val;
                }
            }
        }
        ggml_backend_tensor_set(rot, data.data(), 0, ggml_nbytes(rot));
    }

    bool can_reuse(const llm_graph_params & /*params*/) override { return true; }

    ggml_tensor * rot;
};

} // namespace

void llama_mbq_load_hparams(const gguf_context * metadata, llama_hparams & hparams) {
    const int64_t key = gguf_find_key(metadata, "mbq.hadamard.ffn_down");
    if (key < 0) {
        return;
    }
    if (gguf_get_kv_type(metadata, key) != GGUF_TYPE_UINT32) {
        throw std::runtime_error("mbq.hadamard.ffn_down must be a u32");
    }
    const uint32_t n = gguf_get_val_u32(metadata, key);
    if (n < 2 || n > HADAMARD_MAX || (n & (n - 1)) != 0) {
        throw std::runtime_error(format("mbq.hadamard.ffn_down is %u: it must be a power of two from 2 to %u", n, HADAMARD_MAX));
    }
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.n_ff(il) % n != 0) {
            throw std::runtime_error(format("mbq.hadamard.ffn_down is %u: it must divide the FFN width %u of layer %u", n, hparams.n_ff(il), il));
        }
    }
    hparams.mbq_hadamard_ffn_down = n;
}

ggml_tensor * llm_graph_context::build_mbq_hadamard(ggml_tensor * cur) const {
    const int64_t n = hparams.mbq_hadamard_ffn_down;
    if (n == 0) {
        return cur;
    }
    if (cur->ne[0] % n != 0) { // a branch of another width, such as a shared expert
        throw std::runtime_error(format("mbq.hadamard.ffn_down is %d: it must divide the FFN width %d", int(n), int(cur->ne[0])));
    }

    // one matrix for all layers
    ggml_tensor * rot = nullptr;
    for (const auto & inp : res->inputs) {
        if (const auto * had = dynamic_cast<const llm_graph_input_mbq_hadamard *>(inp.get())) {
            rot = had->rot;
        }
    }
    if (rot == nullptr) {
        rot = ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, n, n);
        ggml_set_input(rot);
        ggml_set_name(rot, "mbq_hadamard");
        res->add_input(std::make_unique<llm_graph_input_mbq_hadamard>(rot));
    }

    return llama_mul_mat_hadamard(ctx0, cur, rot);
}
