"""cffi bindings of the built libggml, libllama and libmtmd."""
