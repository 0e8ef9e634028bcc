"""Metadata keys of static activation ranges (docs/format.md), as the patched llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Iterable

VERSION_KEY, VERSION = "mbq.act.version", 1
RANGE = "mbq.act.range."  # + SITE.CLASS
SITES = ("qkv", "o", "gate_up", "down")  # of a layer, or of a block of a vision tower; other sites are dynamic
CLASSES = ("text", "vision")  # a vision file has only the second


def range_key(site: str, kind: str) -> str:
    """The key of the ranges of ``site`` for tokens of class ``kind``, one per layer."""
    return f"{RANGE}{site}.{kind}"


def unread(keys: Iterable[str], tower: bool) -> list[str]:
    """The range keys among ``keys`` that no program reads; ``tower``: they are from a vision file."""
    keys = list(keys)
    known = {range_key(site, kind) for site in SITES for kind in (CLASSES[1:] if tower else CLASSES)} if VERSION_KEY in keys else set()
    return [key for key in keys if key.startswith(RANGE) and key not in known]
