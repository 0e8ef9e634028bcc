"""Flash attention on the CPU has the same bits for any split of the rows, any batch, and any number of threads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbq_cbind.attention import flash_attention
from mbq_cbind.types import Floats

TILE = 64  # rows from which llama.cpp takes its own tiles; also cells of the cache in a tile
WIDTHS = [(64, 64), (128, 128), (80, 80), (72, 72), (40, 24), (7, 5)]


def causal(random: np.random.Generator, streams: int, rows: int, cells: int) -> Floats:
    """Each row sees the cells up to its own place and no further; some cells within belong to nobody."""
    ends = np.sort(random.integers(1, cells + 1, (streams, rows)), axis=1)
    seen = (np.arange(cells) < ends[..., None]) & (random.random((streams, 1, cells)) < random.choice([0.7, 1.0]))
    seen[..., 0] = True
    return np.where(seen, 0, -np.inf).astype(np.float32)


def exact(q: Floats, k: Floats, v: Floats, mask: Floats) -> Floats:
    """In float64, keys and values in fp16."""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x.astype(np.float16).astype(np.float64), repeat, axis=1) for x in (k, v))
    scores = np.einsum("shrd,shcd->shrc", q, keys) / np.sqrt(q.shape[3]) + mask[:, None]
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    return np.asarray(np.einsum("shrc,shcd->srhd", weights / weights.sum(axis=3, keepdims=True), values))


@settings(max_examples=60)
@given(data=st.data())
def test_rows_cut_anyhow_give_the_same_bits(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    streams, heads, shared = (data.draw(st.integers(1, most), name) for most, name in ((2, "streams"), (2, "key heads"), (7, "shared by")))
    rows, cells = data.draw(st.integers(2, 150), "rows"), data.draw(st.integers(1, 700), "cells")
    width, value_width = data.draw(st.sampled_from(WIDTHS), "widths")
    q = random.normal(size=(streams, heads * shared, rows, width)).astype(np.float32)
    k, v = (random.normal(size=(streams, heads, cells, size)).astype(np.float32) for size in (width, value_width))
    mask = causal(random, streams, rows, cells)
    options: dict[str, Any] = {"kind": data.draw(st.sampled_from(["F16", "F32"]), "kind")}
    options |= data.draw(st.sampled_from([{}, {}, {"softcap": 30.0}, {"bias": 8.0}, {"sinks": random.normal(size=heads * shared)}]), "more")

    def attend(piece: slice, stream: slice = slice(None), behind: int = 0) -> Floats:
        """Some rows of some streams; ``behind`` cells that none of them sees stand behind the others."""
        room = [(0, 0), (0, 0), (0, behind), (0, 0)]
        keys, values = (np.pad(x[stream], room, constant_values=9) for x in (k, v))
        seen = np.pad(mask[stream, piece], [(0, 0), (0, 0), (0, behind)], constant_values=-np.inf)
        return flash_attention(q[stream, :, piece], keys, values, seen, threads=data.draw(st.integers(1, 3), "threads"), **options)

    whole = attend(slice(None))
    cuts = [0]
    while cuts[-1] < rows:
        cuts.append(min(rows, cuts[-1] + data.draw(st.sampled_from([1, 2, 31, TILE - 1, TILE, TILE + 1, 100]), "rows of a piece")))
    for begin, end in pairwise(cuts):
        alone = data.draw(st.integers(0, streams - 1), "stream")
        behind = data.draw(st.sampled_from([0, 1, 256]), "behind")
        part = attend(slice(begin, end), slice(alone, alone + 1), behind)
        assert np.array_equal(part[0], whole[alone, begin:end]), f"rows {begin} to {end - 1} of stream {alone}"


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, TILE - 1, TILE, 80]), st.integers(0, 3), st.sampled_from(WIDTHS))
def test_other_sequences_in_one_cache_move_no_bit(seed: int, rows: int, tiles: int, widths: tuple[int, int]) -> None:
    """What other sequences' cells hold does not matter, nor whole tiles of them; only how one's own cells lie within tiles does."""
    random = np.random.default_rng(seed)
    cells, before = int(random.integers(1, 300)), tiles * TILE
    q = random.normal(size=(1, 4, rows, widths[0])).astype(np.float32)
    k, v = (random.normal(size=(1, 2, cells, size)).astype(np.float32) for size in widths)
    mask = causal(random, 1, rows, cells)
    others = np.concatenate([np.ones(before, dtype=bool), ~np.isfinite(mask[0]).any(axis=0), np.ones(40, dtype=bool)])

    def among_others(loudness: float) -> Floats:
        keys, values = (np.pad(x, [(0, 0), (0, 0), (before, 40), (0, 0)]) for x in (k, v))
        for x in (keys, values):
            x[:, :, others] = random.normal(size=x[:, :, others].shape) * loudness
        seen = np.pad(mask, [(0, 0), (0, 0), (before, 40)], constant_values=-np.inf)
        return flash_attention(q, keys, values, seen)

    alone = flash_attention(q, k, v, mask)
    assert np.array_equal(among_others(1), alone)
    assert np.array_equal(among_others(1000), alone)


@pytest.mark.parametrize("rows", [1, 5, TILE, 80])
def test_it_is_attention(rows: int) -> None:
    """Sums are fp32: within 1e-6 of the largest value; fp16 sums, as llama.cpp has for few rows, are off by 1e-3."""
    random = np.random.default_rng(rows)
    q = random.normal(size=(2, 6, rows, 64)).astype(np.float32)
    k, v = (random.normal(size=(2, 2, 300, 64)).astype(np.float32) for _ in range(2))
    mask = causal(random, 2, rows, 300)
    theirs = exact(q, k, v, mask)
    assert float(np.abs(flash_attention(q, k, v, mask) - theirs).max() / np.abs(theirs).max()) <= 1e-6
