"""mbq-gguf: small, fast GGUF files of vision-language models that still see."""

import os

# Before torch is loaded. Waiting OpenMP threads that spin take the cores from whatever else runs: beside another conversion on two cores
# the texts took seven minutes instead of half a minute. Programs that are started from here (llama-server) inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
