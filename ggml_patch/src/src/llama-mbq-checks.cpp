// metadata and types that graph building asserts: files that violate them are rejected when they are opened
//
// hparams and vocabulary are checked by their readers; nothing else checks these before they are used

#include "llama-mbq.h"

#include "gguf.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"

#include <cmath>
#include <stdexcept>
#include <string>

static bool ends_with(const std::string & name, const char * end) {
    const std::string suffix = end;
    return name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// -1 if the key is missing or has another type (its reader rejects that)
static int64_t find(const llama_model_loader & ml, const char * name, gguf_type type) {
    const int64_t key = gguf_find_key(ml.metadata, (ml.get_arch_name() + "." + name).c_str());
    return key >= 0 && gguf_get_kv_type(ml.metadata, key) == type ? key : -1;
}

static int64_t number(const llama_model_loader & ml, const char * name) {
    const int64_t key = find(ml, name, GGUF_TYPE_UINT32);
    return key < 0 ? -1 : (int64_t) gguf_get_val_u32(ml.metadata, key);
}

// the sections of a multi-dimensional rotary embedding: ggml_rope_multi requires a positive sum within the width of a head
static void check_rope_sections(const llama_model_loader & ml) {
    const int64_t key = find(ml, "rope.dimension_sections", GGUF_TYPE_ARRAY);
    const int64_t one = find(ml, "rope.dimension_sections", GGUF_TYPE_INT32); // read as an array of it
    if (one < 0 && (key < 0 || gguf_get_arr_type(ml.metadata, key) != GGUF_TYPE_INT32)) {
        return;
    }
    const int32_t repeated = one < 0 ? 0 : gguf_get_val_i32(ml.metadata, one);
    const int32_t four[4] = { repeated, repeated, repeated, repeated };
    const int32_t * sections = one < 0 ? (const int32_t *) gguf_get_arr_data(ml.metadata, key) : four;
    const size_t n = one < 0 ? gguf_get_arr_n(ml.metadata, key) : 4;
    const int64_t n_head = number(ml, "attention.head_count");
    int64_t width = number(ml, "attention.key_length");
    if (width < 0 && n_head > 0) {
        width = number(ml, "embedding_length") / n_head;
    }
    int64_t sum = 0;
    int64_t first = 0; // time, height and width: ggml requires at least one of them
    for (size_t i = 0; i < n; ++i) {
        if (sections[i] < 0 || (width > 0 && sections[i] > width)) {
            throw std::runtime_error(format("rope.dimension_sections holds %d for heads of %d channels", sections[i], (int) width));
        }
        sum += sections[i];
        first = i < 3 ? sum : first;
    }
    const llm_arch arch = ml.get_arch();
    const bool needed = arch == LLM_ARCH_QWEN2VL || arch == LLM_ARCH_QWEN3VL || arch == LLM_ARCH_QWEN3VLMOE;
    if ((needed && first == 0) || (width > 0 && sum > width)) {
        throw std::runtime_error(format("rope.dimension_sections are %d in all, the first three %d, for heads of %d channels",
            (int) sum, (int) first, (int) width));
    }
}

// norms and biases are used as floats; matrices need a product with floats, or a lookup of rows
static void check_type(const std::string & name, const ggml_tensor * t) {
    const bool vector = ggml_n_dims(t) == 1 && (ends_with(name, "norm.weight") || ends_with(name, ".bias"));
    if (vector && t->type != GGML_TYPE_F32) {
        throw std::runtime_error(format("%s is of type %s: norms and biases are F32", name.c_str(), ggml_type_name(t->type)));
    }
    const bool number = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 || ggml_is_quantized(t->type);
    const bool matrix = ggml_n_dims(t) > 1 && ends_with(name, ".weight") && !ends_with(name, "tid2eid.weight"); // holds indices of experts
    if (matrix && !number) {
        throw std::runtime_error(format("%s is of type %s, which nothing computes with", name.c_str(), ggml_type_name(t->type)));
    }
}

void llama_mbq_check_file(llama_model_loader & ml) {
    const int64_t n_layer = number(ml, "block_count");
    if (n_layer == 0 || n_layer > (int64_t) LLAMA_MAX_LAYERS) {
        throw std::runtime_error(format("block_count is %d: it must be 1 to %d", (int) n_layer, (int) LLAMA_MAX_LAYERS));
    }
    for (const char * name : { "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon" }) {
        const int64_t key = find(ml, name, GGUF_TYPE_FLOAT32);
        const float eps = key < 0 ? 0.0f : gguf_get_val_f32(ml.metadata, key);
        if (!(eps >= 0.0f) || !std::isfinite(eps)) {
            throw std::runtime_error(format("%s is %f: it must be a number from 0 up", name, eps));
        }
    }
    check_rope_sections(ml);
    for (const auto & it : ml.weights_map) {
        check_type(it.first, it.second.tensor);
    }
}
