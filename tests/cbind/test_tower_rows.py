"""A tower's output memory, which is reused from picture to picture: what a caller still reads is kept, and what it has returned is
reused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_cbind.types import Floats
from PIL import Image

SIDES = (448, 224)  # pixels


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two of each size, noise."""
    paths = [tmp_path / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        size = (SIDES[seed // 2],) * 2
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def model(static_file: Any, large_mmproj: Path) -> Iterator[Model]:
    with Model(static_file({}), large_mmproj, context=1024, threads=1) as opened:
        yield opened


class Batch:
    """One picture through the tower as llama-server does it; its rows stay the tower's own."""

    def __init__(self, model: Model, picture: Path) -> None:
        vision, self.c = model.vision, model._binding.c
        self.cut = vision._cut(vision._bitmap(picture), among=1)
        (chunk,) = self.cut.__enter__()
        self.batch = self.c.mtmd_batch_init(vision._context)
        assert self.c.mtmd_batch_add_chunk(self.batch, chunk) == 0
        assert self.c.mtmd_batch_encode(self.batch) == 0
        self.output = self.c.mtmd_batch_get_output_embd(self.batch, chunk)
        self.rows: Floats = vision._rows(chunk, self.output)
        self.again = lambda: vision._rows(chunk, self.output)

    def free(self) -> None:
        self.c.mtmd_batch_free(self.batch)
        self.cut.__exit__(None, None, None)


def test_rows_in_use_are_not_overwritten(model: Model, pictures: list[Path]) -> None:
    expected = [model.vision.encode(picture).embeddings[0] for picture in pictures]
    batches = [Batch(model, picture) for picture in pictures]
    assert len({batch.output for batch in batches}) == len(pictures)
    for batch, rows in zip(batches, expected, strict=True):
        assert np.array_equal(batch.again(), rows)
        batch.free()


def test_rows_given_back_are_taken_by_the_next_picture(model: Model, pictures: list[Path]) -> None:
    first = Batch(model, pictures[0])
    place = first.output
    first.free()
    for picture in (*pictures, pictures[0]):  # smaller ones too
        batch = Batch(model, picture)
        assert batch.output == place
        assert np.array_equal(batch.rows, model.vision.encode(picture).embeddings[0])
        batch.free()


def test_a_context_without_batches_has_one_place(model: Model, pictures: list[Path]) -> None:
    """mtmd_get_output_embd: the last picture's, where the largest before it was."""
    c, places = model._binding.c, []
    for picture in (*pictures, pictures[1]):
        rows = model.vision.encode(picture).embeddings[0]
        places.append(c.mtmd_get_output_embd(model.vision._context))
        assert np.array_equal(rows, Batch(model, picture).rows)
    assert len(set(places)) == 1


def test_a_batch_may_be_freed_behind_its_context(static_file: Any, large_mmproj: Path, pictures: list[Path]) -> None:
    with Model(static_file({}), large_mmproj, context=1024, threads=1) as model:
        batch = Batch(model, pictures[0])
    batch.free()
