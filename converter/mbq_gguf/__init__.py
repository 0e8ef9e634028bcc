"""mbq-gguf: small, fast GGUF files of vision-language models that still see."""

__version__ = "0.1.0"
