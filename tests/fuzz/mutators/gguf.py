"""A GGUF file with one to four faults in metadata, table, data, or anywhere."""

from __future__ import annotations

import random

from mutators import gguf_blocks, gguf_keys, gguf_tensors, raw
from mutators.gguf_document import copy_of

PARTS = ((gguf_keys, 9), (gguf_tensors, 7), (gguf_blocks, 3))
PACKED = 0.6  # of the files have their tensors' data where readers want them, whatever was changed
ANYWHERE = 0.1  # of the files have raw damage after all


def mutate(seed: bytes, draw: random.Random) -> tuple[bytes, str]:
    """``seed`` spoilt, and what was done to it."""
    document, done = copy_of(seed), []
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        part = draw.choices([part for part, _ in PARTS], [weight for _, weight in PARTS])[0]
        edit = draw.choice(part.EDITS)
        edit(document, draw)
        done.append(f"{part.__name__.removeprefix('mutators.gguf_')}.{edit.__name__}")
    if draw.random() < PACKED:
        document.pack()
        done.append("packed")
    data = document.write()
    if draw.random() < ANYWHERE:
        data, damage = raw.mutate(data, draw)
        done.append(damage)
    return data, " ".join(done)
