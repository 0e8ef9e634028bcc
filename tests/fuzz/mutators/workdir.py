"""A work directory with one to three of its files spoilt: items, the fingerprint, what lies beside them."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

from mutators import json_text, raw, safetensors_file

TEXTS = (b"", b"[]", b"null", b"{}", b"{", b"7", b'{"model": 1}', b"[" * 5000, b"\xff\xfe", b'"' + b"a" * 5000 + b'"')


def mutate(folder: Path, draw: random.Random) -> str:
    """Spoil the work directory ``folder`` in place; says what was done."""
    return " ".join(_one(folder, draw) for _ in range(draw.choice((1, 1, 2, 3))))


def _one(folder: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(folder.iterdir()))
    how = draw.choice(("safetensors", "safetensors", "raw", "raw", "text", "remove", "folder", "link", "exchange", "beside"))
    if how == "beside":
        (folder / draw.choice((".mbq-gguf-left", "layer-9.safetensors", "notes.txt", "layer-0"))).write_bytes(draw.choice(TEXTS))
        return how
    content = file.read_bytes() if file.is_file() else b""
    if how == "safetensors" and file.suffix == ".safetensors":
        try:
            spoilt, done = safetensors_file.mutate(content, draw)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):  # it was spoilt before
            spoilt, done = raw.mutate(content, draw)
        return _write(file, spoilt, f"safetensors {done}")
    if how == "text":
        other = draw.choice(TEXTS) if draw.random() < 0.5 else json_text.mutate({"model": "a", "data": "b"}, draw)[0]
        return _write(file, other, how)
    if how == "exchange":
        target = draw.choice(sorted(folder.iterdir()))
        return _write(file, target.read_bytes() if target.is_file() else b"", f"{how} {target.name}")
    if how in ("remove", "folder", "link"):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        if how == "folder":
            (file / "inside").mkdir(parents=True)
        if how == "link":
            file.symlink_to(draw.choice(("/dev/null", "nowhere", "/", str(file))))
        if not any(folder.iterdir()):
            (folder / "layer-0.safetensors").write_bytes(b"")
        return f"{how} {file.name}"
    spoilt, done = raw.mutate(content, draw)
    return _write(file, spoilt, done)


def _write(file: Path, content: bytes, done: str) -> str:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    elif file.is_symlink():
        file.unlink()
    file.write_bytes(content)
    return f"{done} of {file.name}"
