"""A tiktoken vocabulary as a tokenizer of transformers: it recovers the merges from which the ranks were made."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from mbq_gguf.models import tiktoken
from tiny_vlm import DEMO
from transformers.convert_slow_tokenizer import bytes_to_unicode


def test_ranks_give_the_merges_back(tmp_path: Path) -> None:
    """All 48 900 of the demo's tokenizer, which were learned one by one, as ranks are."""
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = [*(bytes([byte]) for byte in range(256)), *(bytes(byte_of[letter] for letter in "".join(merge)) for merge in merges)]
    file = tmp_path / "some.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    made = tiktoken.tokenizer(file, r"\S+|\s+", ["<end>", "<other>"], whole=False, eos_token="<end>")
    made.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert [tuple(merge) for merge in saved["merges"]] == merges
    assert made.convert_tokens_to_ids(["<end>", "<other>"]) == [len(tokens), len(tokens) + 1]
    assert made.decode([*made("red circles")["input_ids"], len(tokens)], skip_special_tokens=True) == "red circles"
