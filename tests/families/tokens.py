"""Small tokenizers with a part of the demo's vocabulary, since a whole one takes seconds to convert."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiny_vlm import DEMO

TOKENS = 1152  # of the demo's vocabulary, two line ends among them
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of SentencePiece's pieces


def plain(specials: Iterable[str], folder: Path) -> dict[str, int]:
    """Write the first tokens and merges of the demo's tokenizer, and ``specials``; returns the id of every token."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    model = tokenizer["model"]
    ids: dict[str, int] = {token: number for token, number in model["vocab"].items() if number < TOKENS}
    return _write(tokenizer, ids, specials, folder)


def spaced(specials: Iterable[str], folder: Path) -> dict[str, int]:
    """The same in Gemma's manner: a space is a letter, bytes that no letter has are tokens, and a text begins with BOS."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    model = tokenizer["model"]
    ordered = sorted((number, token.replace("Ġ", SPACE)) for token, number in model["vocab"].items() if number < TOKENS)
    named = [token["content"] for token in tokenizer["added_tokens"]]
    letters = [token for _, token in ordered if token not in named and all("!" <= letter <= "~" or letter == SPACE for letter in token)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = {token: number for number, token in enumerate(dict.fromkeys([*named, *bytes_, "\n", "\n\n", *letters]))}
    model["merges"] = [["\n", "\n"], *([part.replace("Ġ", SPACE) for part in _parts(merge)] for merge in model["merges"])]
    model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": named[0]}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    begin = {"id": named[1], "ids": [ids[named[1]]], "tokens": [named[1]]}
    tokenizer |= {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": named[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {named[1]: begin},
        },
    }
    _write(tokenizer, ids, specials, folder)
    file = folder / "tokenizer_config.json"  # which llama.cpp's conversion asks for special tokens, of this kind alone
    file.write_text(json.dumps(json.loads(file.read_text()) | {"additional_special_tokens": [*specials, *named]}))
    return ids


def pieces(specials: Iterable[str], folder: Path) -> dict[str, int]:
    """Of Gemma's kind again, with the tokenizer.model of SentencePiece that llama.cpp's conversion reads of some families.

    SentencePiece joins the pair whose whole has the best score, whatever its halves; so tokenizer.json gets every pair, in that order.
    """
    ids = spaced(specials, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    named = {token["content"] for token in tokenizer["added_tokens"]}
    words = [token for token in ids if token not in named and not token.startswith("<0x")]
    halves = {word: [(word[:cut], word[cut:]) for cut in range(1, len(word))] for word in words}
    tokenizer["model"]["merges"] = [list(pair) for word in words for pair in halves[word] if ids.keys() >= set(pair)]
    file.write_text(json.dumps(tokenizer))
    kinds = dict.fromkeys(named, CONTROL) | {token: BYTE for token in ids if token.startswith("<0x")}
    kinds |= {tokenizer["model"]["unk_token"]: UNKNOWN}
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_prefix_space": False}))
    (folder / "tokenizer.model").write_bytes(sentencepiece([(token, kinds.get(token, NORMAL)) for token in ids]))
    return ids


def sentencepiece(pieces: Iterable[tuple[str, int]], space: bool = False) -> bytes:
    """A tokenizer.model of pieces and their types, the first ones with the best scores: of type BPE, with byte_fallback, all spaces kept,
    and one put before a text where there is to be a ``space``."""
    model = b"".join(_field(1, _piece(token, -float(number), kind)) for number, (token, kind) in enumerate(pieces))
    return model + _field(2, b"\x18\x02\x98\x02\x01") + _field(3, bytes([0x18, space, 0x20, 0]))


def _piece(token: str, score: float, kind: int) -> bytes:
    """SentencePiece's message of a piece: its text, score and type."""
    return _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes in protobuf's wire format."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def _write(tokenizer: dict[str, Any], ids: dict[str, int], specials: Iterable[str], folder: Path) -> dict[str, int]:
    model = tokenizer["model"]
    merges = [_parts(merge) for merge in model["merges"]]
    model["merges"] = [merge for merge in merges if "".join(merge) in ids and all(part in ids for part in merge)]
    for token in specials:
        added = {"id": ids.setdefault(token, len(ids)), "content": token, "special": True}
        tokenizer["added_tokens"].append(added | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    model["vocab"] = ids
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    return ids


def _parts(merge: Any) -> list[str]:
    return merge if isinstance(merge, list) else merge.split(" ")
