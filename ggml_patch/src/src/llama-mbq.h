#pragma once

struct gguf_context;
struct llama_hparams;

// mbq.hadamard.ffn_down, the block of the online Hadamard transform before ffn_down: read and checked once the FFN widths are known
// throws std::runtime_error for a value that the graph could not use
void llama_mbq_load_hparams(const gguf_context * metadata, llama_hparams & hparams);
