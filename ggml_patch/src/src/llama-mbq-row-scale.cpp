// weights whose blocks repeat one scale over the whole row: the file names them, and ggml multiplies them with integer sums (ggml-row-scale.h)
//
//   mbq.row_scale.version  u32, 1
//   mbq.row_scale          array of strings: names of tensors of type Q4_0 or Q8_0
//
// that scales repeat is promised by the writer and not verified here: verification would read all weights, which mmap avoids

#include "llama-mbq.h"

#include "gguf.h"
#include "llama-impl.h"
#include "llama-model-loader.h"

#include <stdexcept>

static const char * const KEY     = "mbq.row_scale";
static const char * const VERSION = "mbq.row_scale.version";

void llama_mbq_set_row_scale(llama_model_loader & ml) {
    const int64_t key = gguf_find_key(ml.metadata, KEY);
    if (key < 0 || ml.files.empty()) { // without files there are no tensors yet
        return;
    }
    const int64_t version = gguf_find_key(ml.metadata, VERSION);
    if (version < 0 || gguf_get_kv_type(ml.metadata, version) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("%s must be a u32 beside %s", VERSION, KEY));
    }
    if (gguf_get_val_u32(ml.metadata, version) != 1) {
        throw std::runtime_error(format("%s is %u: this program knows 1", VERSION, gguf_get_val_u32(ml.metadata, version)));
    }
    if (gguf_get_kv_type(ml.metadata, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ml.metadata, key) != GGUF_TYPE_STRING) {
        throw std::runtime_error(format("%s must be an array of strings", KEY));
    }
    for (size_t i = 0; i < gguf_get_arr_n(ml.metadata, key); ++i) {
        const char  * name   = gguf_get_arr_str(ml.metadata, key, i);
        ggml_tensor * tensor = ml.get_tensor_meta(name);
        if (tensor == nullptr) {
            throw std::runtime_error(format("%s names %s: the file holds no such tensor", KEY, name));
        }
        if (tensor->type != GGML_TYPE_Q4_0 && tensor->type != GGML_TYPE_Q8_0) {
            throw std::runtime_error(format("%s names %s: it must be Q4_0 or Q8_0 and is %s", KEY, name, ggml_type_name(tensor->type)));
        }
        tensor->flags |= GGML_TENSOR_FLAG_ROW_SCALE;
    }
}

bool llama_mbq_buft_allowed(const ggml_tensor * weight, ggml_op op, ggml_backend_buffer_type_t buft, ggml_backend_dev_t dev) {
    return (weight->flags & GGML_TENSOR_FLAG_ROW_SCALE) == 0 || op != GGML_OP_MUL_MAT ||
        ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU || buft == ggml_backend_dev_buffer_type(dev);
}

void llama_mbq_remove_row_scale(gguf_context * metadata) {
    gguf_remove_key(metadata, KEY);
    gguf_remove_key(metadata, VERSION);
}
