"""KL divergence between next-token distributions, and disk storage for the reference's distributions and encoded pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mbq_cbind.vision import EncodedImage

from mbq_gguf.errors import UserError

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Doubles = npt.NDArray[np.float64]


def log_softmax(logits: Floats | Halves) -> Doubles:
    """Log-probabilities (nats) along the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def compress(logits: Floats) -> Halves:
    """Log-probabilities as float16, half the size of logits.

    Rounding changes each by at most 2^-11 of its value. :func:`divergence` normalises what it reads, so the reference remains a
    distribution and the error of a small divergence is of second order: 1e-6 nats if both are equal.
    """
    return log_softmax(logits).astype(np.float16)


def divergence(reference: Floats | Halves, candidate: Floats) -> Doubles:
    """KL(reference || candidate) in nats, row by row: both are [n, vocabulary], logits or log-probabilities."""
    p, q = log_softmax(reference), log_softmax(candidate)
    # Not negative by Gibbs' inequality; float64 sums over a vocabulary can be some 1e-16 below zero for equal rows.
    rows: Doubles = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.maximum(rows, 0.0)


class Store:
    """Arrays in a folder, because large models' embeddings and distributions do not fit into memory in addition to two models."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put_image(self, key: str, image: EncodedImage) -> None:
        """Store an encoded picture. Raises UserError if the disk is full."""
        with self._writing():
            np.savez(self._folder / f"image-{key}.npz", np.array([image.width, image.height]), *image.embeddings)

    def image(self, key: str) -> EncodedImage | None:
        """The encoded picture, None if it is not stored."""
        path = self._folder / f"image-{key}.npz"
        if not path.is_file():
            return None
        with np.load(path) as data:
            size, *embeddings = (data[name] for name in data.files)
            return EncodedImage(int(size[0]), int(size[1]), tuple(embeddings))

    def put_logits(self, key: str, logits: Floats) -> None:
        """Store distributions, [n, vocabulary]. Raises UserError if the disk is full."""
        with self._writing():
            np.save(self._folder / f"logits-{key}.npy", compress(logits))

    def logits(self, key: str) -> Halves:
        """The log-probabilities stored under ``key``, as from :func:`compress`."""
        loaded: Halves = np.load(self._folder / f"logits-{key}.npy")
        return loaded

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # numpy gives those of a full disk no number
            raise UserError(
                f"distributions and pictures of the evaluation cannot be kept in {self._folder.parent} ({error.strerror or error}): "
                "free some space there, or set TMPDIR to a folder on another disk"
            ) from error
