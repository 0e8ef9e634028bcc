"""GGUF files: llama.cpp's own conversion package, with the bytes of the quantised tensors replaced."""
