#pragma once

#include "ggml-backend.h"
#include "ggml-row-scale.h"

#include <memory>

struct gguf_context;
struct llama_hparams;
struct llama_model_loader;

// mbq.hadamard.ffn_down, the block size of the online Hadamard transform before ffn_down: read and checked after the FFN widths
// throws std::runtime_error for a value that the graph could not use
void llama_mbq_load_hparams(const gguf_context * metadata, llama_hparams & hparams);

// mbq.act.*, static ranges of activations: read, checked and stored in hparams; null if the file has none
// throws std::runtime_error for a value that the graph could not use
std::shared_ptr<const struct llama_mbq_act> llama_mbq_load_act(const gguf_context * metadata, llama_hparams & hparams);

// throws std::runtime_error for metadata and types that would abort the process during computation
void llama_mbq_check_file(llama_model_loader & ml);

// mbq.row_scale: sets GGML_TENSOR_FLAG_ROW_SCALE on the weights that it names; throws std::runtime_error if a weight cannot have it
void llama_mbq_set_row_scale(llama_model_loader & ml);

// false for buffer types that repack weights (CPU_REPACK, AMX and the like), whose products do not follow the contract
bool llama_mbq_buft_allowed(const ggml_tensor * weight, ggml_op op, ggml_backend_buffer_type_t buft, ggml_backend_dev_t dev);

// for a file that is requantised
void llama_mbq_remove_row_scale(gguf_context * metadata);
