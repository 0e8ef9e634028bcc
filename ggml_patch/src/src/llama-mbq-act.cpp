// static ranges of activations for weights with one scale per row (mbq-gguf: convert --activations static)
//
//   mbq.act.version            u32, 1; without it the file has no static ranges
//   mbq.act.range.SITE.CLASS   array of f32, one per layer: the largest |x| that int8 represents, 0: each row's own (dynamic)
//                              SITE is qkv, o, gate_up or down, the activation that these weights read; CLASS is text or vision
//   mbq.act.sink.positions     array of i32: rows at these positions are dynamic
//   mbq.act.sink.tokens        array of i32: rows of these tokens are dynamic
//
// the classes of rows are an input of the graph, so that one graph serves any mixture: an I32 input [n_tokens] selects all sites' ranges of each row
// from a table. tokens are text, embeddings that are flagged as a picture's are vision, all other embeddings are dynamic.

#include "llama-mbq.h"

#include "gguf.h"
#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t ACT_COLUMNS_MIN = 65; // fewer rows, such as in generation, are always dynamic: computing their ranges takes no noticeable time

const char * const ACT_SITES[]   = { "qkv", "o", "gate_up", "down" };
const char * const ACT_CLASSES[] = { "text", "vision" };

constexpr int ACT_N_SITES = 4;

enum row_class : int32_t { ROW_DYNAMIC, ROW_TEXT, ROW_VISION, ROW_CLASSES };

struct { const char * weight; int site; } const ACT_READERS[] = {
    { "attn_q.weight", 0 }, { "attn_k.weight", 0 }, { "attn_v.weight", 0 }, { "attn_qkv.weight", 0 },
    { "attn_output.weight", 1 }, { "ffn_gate.weight", 2 }, { "ffn_up.weight", 2 }, { "ffn_down.weight", 3 },
};

} // namespace

struct llama_mbq_act {
    int64_t n_sites; // of all layers
    std::vector<float>   table; // [ROW_CLASSES][n_sites]
    std::vector<int32_t> positions, tokens;

    int64_t site_of(const char * weight) const {
        int layer = -1, length = 0;
        if (sscanf(weight, "blk.%d.%n", &layer, &length) != 1 || length == 0 || layer < 0 || (layer + 1)*ACT_N_SITES > n_sites) {
            return -1;
        }
        for (const auto & reader : ACT_READERS) {
            if (strcmp(weight + length, reader.weight) == 0) {
                return layer*ACT_N_SITES + reader.site;
            }
        }
        return -1;
    }

    int32_t class_of(const llama_ubatch & ubatch, int64_t i) const {
        if (std::find(positions.begin(), positions.end(), ubatch.pos[i]) != positions.end()) {
            return ROW_DYNAMIC;
        }
        if (ubatch.embd && !(ubatch.is_mixed() && ubatch.type[i] == 0)) {
            return ubatch.data && i < (int64_t) ubatch.data->picture.size() && ubatch.data->picture[i] ? ROW_VISION : ROW_DYNAMIC;
        }
        return std::binary_search(tokens.begin(), tokens.end(), ubatch.token[i]) ? ROW_DYNAMIC : ROW_TEXT;
    }
};

namespace {

class llm_graph_input_mbq_act : public llm_graph_input_i {
public:
    llm_graph_input_mbq_act(ggml_context * ctx, const llama_mbq_act & act, int64_t n_tokens) : act(act) {
        classes = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens);
        table   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, act.n_sites, ROW_CLASSES);
        ranges  = ggml_get_rows(ctx, table, classes);
        ggml_set_input(classes);
        ggml_set_input(table);
        ggml_set_name(classes, "mbq_act_classes");
        ggml_set_name(table,   "mbq_act_table");
        ggml_set_name(ranges,  "mbq_act_ranges");
    }

    void set_input(const llama_ubatch * ubatch) override {
        if (classes->buffer == nullptr || table->buffer == nullptr) {
            return;
        }
        std::vector<int32_t> data(ubatch->n_tokens);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            data[i] = act.class_of(*ubatch, i);
        }
        ggml_backend_tensor_set(classes, data.data(), 0, ggml_nbytes(classes));
        ggml_backend_tensor_set(table, act.table.data(), 0, ggml_nbytes(table));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return classes->ne[0] == params.ubatch.n_tokens;
    }

    // the ranges of the rows of one site, [1, n_tokens] or [1, n_outputs]; they are added to the graph before the nodes that compute the activations, so that
    // they are available to a backend that computes and multiplies the activations in one kernel
    ggml_tensor * view(ggml_context * ctx, ggml_cgraph * gf, int64_t site, ggml_tensor * out_ids) {
        if (out_ids && gathered == nullptr) {
            gathered = ggml_get_rows(ctx, ranges, out_ids);
            ggml_set_name(gathered, "mbq_act_ranges_out");
        }
        ggml_tensor * & found = views[{ site, out_ids != nullptr }];
        if (found == nullptr) {
            ggml_tensor * of = out_ids ? gathered : ranges;
            found = ggml_view_2d(ctx, of, 1, of->ne[1], of->nb[1], site*sizeof(float));
            ggml_build_forward_expand(gf, found);
        }
        return found;
    }

    const llama_mbq_act & act;

    ggml_tensor * classes;            // I32 [n_tokens]
    ggml_tensor * table;              // F32 [n_sites, ROW_CLASSES]
    ggml_tensor * ranges;             // F32 [n_sites, n_tokens]
    ggml_tensor * gathered = nullptr; // F32 [n_sites, n_outputs]

    std::map<std::pair<int64_t, bool>, ggml_tensor *> views;
};

template <typename T>
T * input_of(const llm_graph_result & res) {
    for (const auto & input : res.inputs) {
        if (auto * found = dynamic_cast<T *>(input.get())) {
            return found;
        }
    }
    return nullptr;
}

// the array under key, or null
const void * array_of(const gguf_context * metadata, const std::string & key, gguf_type type, const char * type_name, size_t & n) {
    const int64_t id = gguf_find_key(metadata, key.c_str());
    if (id < 0) {
        n = 0;
        return nullptr;
    }
    if (gguf_get_kv_type(metadata, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(metadata, id) != type) {
        throw std::runtime_error(format("%s must be an array of %s", key.c_str(), type_name));
    }
    n = gguf_get_arr_n(metadata, id);
    return n > 0 ? gguf_get_arr_data(metadata, id) : nullptr;
}

std::vector<int32_t> sinks_of(const gguf_context * metadata, const char * key) {
    size_t n;
    const auto * data = (const int32_t *) array_of(metadata, key, GGUF_TYPE_INT32, "i32", n);
    std::vector<int32_t> sinks(data, data + (data ? n : 0));
    std::sort(sinks.begin(), sinks.end());
    if (!sinks.empty() && sinks[0] < 0) {
        throw std::runtime_error(format("%s holds %d: it must not be below 0", key, sinks[0]));
    }
    return sinks;
}

// ranges of unknown sites or classes are not an error, like other unknown keys: those rows are dynamic
void warn_of_unknown(const gguf_context * metadata) {
    const std::string prefix = "mbq.act.range.";
    for (int64_t i = 0; i < gguf_get_n_kv(metadata); ++i) {
        const std::string key = gguf_get_key(metadata, i);
        bool known = key.compare(0, prefix.size(), prefix) != 0;
        for (const char * site : ACT_SITES) {
            for (const char * kind : ACT_CLASSES) {
                known = known || key == prefix + site + "." + kind;
            }
        }
        if (!known) {
            LLAMA_LOG_WARN("%s: %s is of no site or class that this program knows: those activations are dynamic\n", __func__, key.c_str());
        }
    }
}

} // namespace

std::shared_ptr<const llama_mbq_act> llama_mbq_load_act(const gguf_context * metadata, llama_hparams & hparams) {
    const int64_t version = gguf_find_key(metadata, "mbq.act.version");
    if (version < 0) {
        return nullptr;
    }
    if (gguf_get_kv_type(metadata, version) != GGUF_TYPE_UINT32) {
        throw std::runtime_error("mbq.act.version must be a u32");
    }
    if (gguf_get_val_u32(metadata, version) != 1) {
        throw std::runtime_error(format("mbq.act.version is %u: this program knows 1", gguf_get_val_u32(metadata, version)));
    }
    auto act = std::make_shared<llama_mbq_act>();
    act->n_sites = (int64_t) hparams.n_layer_all*ACT_N_SITES;
    act->table.resize(act->n_sites*ROW_CLASSES);
    for (int kind = ROW_TEXT; kind < ROW_CLASSES; ++kind) {
        for (int site = 0; site < ACT_N_SITES; ++site) {
            const std::string key = format("mbq.act.range.%s.%s", ACT_SITES[site], ACT_CLASSES[kind - ROW_TEXT]);
            size_t n;
            const auto * range = (const float *) array_of(metadata, key, GGUF_TYPE_FLOAT32, "f32", n);
            if (n > hparams.n_layer_all) {
                throw std::runtime_error(format("%s has %zu values: the model has %u layers", key.c_str(), n, hparams.n_layer_all));
            }
            for (size_t il = 0; range && il < n; ++il) {
                if (range[il] != 0.0f && !(range[il] >= GGML_ROW_SCALE_AMAX_MIN && std::isfinite(range[il]))) {
                    throw std::runtime_error(format("%s is %g in layer %zu: it must be 0 or a range from 2^-95 up", key.c_str(), range[il], il));
                }
                act->table[kind*act->n_sites + il*ACT_N_SITES + site] = range[il];
            }
        }
    }
    warn_of_unknown(metadata);
    act->positions = sinks_of(metadata, "mbq.act.sink.positions");
    act->tokens    = sinks_of(metadata, "mbq.act.sink.tokens");
    hparams.mbq_act = act.get();
    return act;
}

void llm_graph_context::build_mbq_act(ggml_tensor * product) const {
    const llama_mbq_act * act = hparams.mbq_act;
    if (act == nullptr || !ggml_is_row_scale_mul_mat(product) || !loras->empty()) { // ranges were measured without adapters
        return;
    }
    const ggml_tensor * x = product->src[1];
    const int64_t site = act->site_of(product->src[0]->name);
    if (site < 0 || x->ne[1] < ACT_COLUMNS_MIN || x->ne[2] != 1 || x->ne[3] != 1) {
        return;
    }
    ggml_tensor * out_ids = nullptr;
    if (x->ne[1] != n_tokens) { // after the last attention: only the output rows
        const auto * out = input_of<llm_graph_input_out_ids>(*res);
        if (out == nullptr || out->out_ids->ne[0] != x->ne[1]) {
            return;
        }
        out_ids = out->out_ids;
    }
    auto * input = input_of<llm_graph_input_mbq_act>(*res);
    if (input == nullptr) {
        input = (llm_graph_input_mbq_act *) res->add_input(std::make_unique<llm_graph_input_mbq_act>(ctx0, *act, n_tokens));
    }
    product->src[2] = input->view(ctx0, gf, site, out_ids);
}
