#pragma once

#include "clip-impl.h"
#include "ggml-row-scale.h"
#include "ggml.h"
#include "gguf.h"

#include <stdexcept>

// Matrices of a vision file whose blocks repeat one scale over the whole row: the keys of src/llama-mbq-row-scale.cpp and the contract of
// ggml-row-scale.h. The flag is set on the tensors of the metadata context; their copies with data inherit it.

static void clip_mbq_set_row_scale(const gguf_context * gguf, ggml_context * outline) {
    const char * const KEY     = "mbq.row_scale";
    const char * const VERSION = "mbq.row_scale.version";

    const int64_t key = gguf_find_key(gguf, KEY);
    if (key < 0) {
        return;
    }
    const int64_t version = gguf_find_key(gguf, VERSION);
    if (version < 0 || gguf_get_kv_type(gguf, version) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(string_format("%s must be a u32 beside %s", VERSION, KEY));
    }
    if (gguf_get_val_u32(gguf, version) != 1) {
        throw std::runtime_error(string_format("%s is %u: this program knows 1", VERSION, gguf_get_val_u32(gguf, version)));
    }
    if (gguf_get_kv_type(gguf, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, key) != GGUF_TYPE_STRING) {
        throw std::runtime_error(string_format("%s must be an array of strings", KEY));
    }
    for (size_t i = 0; i < gguf_get_arr_n(gguf, key); ++i) {
        const char  * name   = gguf_get_arr_str(gguf, key, i);
        ggml_tensor * tensor = ggml_get_tensor(outline, name);
        if (tensor == nullptr) {
            throw std::runtime_error(string_format("%s names %s: the file holds no such tensor", KEY, name));
        }
        if (tensor->type != GGML_TYPE_Q4_0 && tensor->type != GGML_TYPE_Q8_0) {
            throw std::runtime_error(string_format("%s names %s: it must be Q4_0 or Q8_0 and is %s", KEY, name, ggml_type_name(tensor->type)));
        }
        tensor->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
    }
}
