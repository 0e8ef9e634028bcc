#pragma once

#include <cstdint>

struct gguf_context;

// block of the online Hadamard transform before ffn_down (key mbq.hadamard.ffn_down), 0 if the file asks for none
uint32_t llama_mbq_hadamard_ffn_down(const gguf_context * metadata);
