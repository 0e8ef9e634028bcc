"""A GGUF file's vocabulary and special tokens.

Separate from special_tokens.py, which calibration imports: reading GGUF files is then no part of what code_hash.py hashes.
"""

from __future__ import annotations

from pathlib import Path

from mbq_gguf.export.gguf_header import read_header

UNKNOWN, CONTROL = 2, 3  # llama.cpp's token types that are read as themselves only where special tokens are parsed
LARGEST_VOCABULARY = 1 << 24


def file_tokens(path: Path) -> list[str]:
    """The vocabulary of the GGUF file ``path``, [] if it has none. Raises UserError if it cannot be read."""
    tokens = read_header(path, longest_array=LARGEST_VOCABULARY).metadata.get("tokenizer.ggml.tokens")
    return [str(token) for token in tokens] if isinstance(tokens, list) else []


def file_special_tokens(path: Path) -> frozenset[str]:
    """The special tokens of the GGUF file ``path``. Raises UserError if it cannot be read."""
    metadata = read_header(path, longest_array=LARGEST_VOCABULARY).metadata
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return frozenset()
    return frozenset(str(token) for token, kind in zip(tokens, kinds, strict=False) if kind in (UNKNOWN, CONTROL))
