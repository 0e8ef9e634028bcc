"""Speeds up writing the vocabulary to a GGUF file: caches it, and packs it as a whole.

A conversion opens a model two or three times (rehearsal, file size, file). Each time, llama.cpp's conversion package reads tokenizer and
merges again, and its writer packs them token by token. With 150 000 tokens, each of these takes a second or more.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}  # all other files of a model may affect its vocabulary
KEPT = 4  # cached results of about 10 MB each: tokens and merges of two models

_kept: OrderedDict[Hashable, Any] = OrderedDict()


def speed_up_vocabulary(text_model: Any, gguf: Any) -> None:
    """Patch the package's TextModel (``text_model``) and classes of ``gguf``, once; results and bytes stay the same."""
    if getattr(gguf.SpecialVocab, "mbq_quick", False):
        return
    gguf.SpecialVocab.mbq_quick = True
    read, load, pack = text_model.get_vocab_base, gguf.SpecialVocab._load, gguf.GGUFWriter._pack_val

    def get_vocab_base(model: Any) -> Any:
        key = (type(model).__qualname__, model.hparams.get("vocab_size"), files_hash(model.dir_model))
        return cached(key, lambda: read(model))

    def _load(vocabulary: Any, path: Path) -> None:
        asked = (vocabulary.load_merges, vocabulary.n_vocab, tuple(vocabulary.special_token_types), files_hash(path))

        def loaded() -> dict[str, Any]:
            load(vocabulary, path)
            return dict(vars(vocabulary))

        vars(vocabulary).update(cached(asked, loaded))

    def _pack_val(writer: Any, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        order = "<" if writer.endianess == gguf.GGUFEndian.LITTLE else ">"
        items = pack_array(val, order) if vtype is gguf.GGUFValueType.ARRAY and sub_type is None and isinstance(val, list) and val else None
        if items is not None:
            head: bytes = pack(writer, val[:1], vtype, add_vtype)[: 8 if add_vtype else 4]  # the types, as the writer packs them
            return head + struct.pack(f"{order}Q", len(val)) + items
        whole: bytes = pack(writer, val, vtype, add_vtype, sub_type)
        return whole

    text_model.get_vocab_base, gguf.SpecialVocab._load, gguf.GGUFWriter._pack_val = get_vocab_base, _load, _pack_val


def cached(key: Hashable, make: Callable[[], Any]) -> Any:
    """The cached result of ``make`` for ``key``, as a copy, because the package changes the lists."""
    if key not in _kept:
        _kept[key] = make()
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return copy.deepcopy(_kept[key])


def files_hash(folder: Path) -> str:
    """A hash of all files in ``folder`` except the weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in WEIGHTS and path.is_file():
            data = path.read_bytes()
            digest.update(b"%s %d " % (path.name.encode(errors="surrogateescape"), len(data)) + data)
    return digest.hexdigest()


def pack_array(values: list[Any], order: str) -> bytes | None:
    """Pack the items of a GGUF array of strings or int32, in byte order ``order`` ("<" or ">"); None for other lists."""
    if all(isinstance(value, str) for value in values):
        encoded = [value.encode("utf-8") for value in values]
        length = struct.Struct(f"{order}Q").pack
        return b"".join([part for value in encoded for part in (length(len(value)), value)])
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return struct.pack(f"{order}{len(values)}i", *values)
    return None
