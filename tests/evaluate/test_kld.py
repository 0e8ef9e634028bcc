"""KL divergence against its definition, and the effect of float16 storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mbq_cbind.vision import EncodedImage
from mbq_gguf.errors import UserError
from mbq_gguf.evaluate.kld import Store, compress, divergence, log_softmax

SELF_DIVERGENCE = 0.5 * (2.0**-8) ** 2  # nats: log-probabilities down to -16 are off by 2^-8 at most, half of whose square enters
STORED_DIVERGENCE = 1e-2  # of a divergence of 0.01 nats, relative: the same rounding, met by the difference of two flat distributions


def test_two_outcomes_by_hand() -> None:
    p, q = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert divergence(p.astype(np.float32), q.astype(np.float32)) == pytest.approx([expected], rel=1e-6)


def test_logits_are_normalised() -> None:
    logits = np.array([[1.0, 2.0, 3.0]], np.float32)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1)
    assert divergence(logits, logits + 100) == pytest.approx([0], abs=1e-9)


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert np.all(np.isfinite(divergence(logits, logits[:, ::-1].copy())))


@given(st.integers(0, 2**32 - 1))
def test_divergence_is_never_negative(seed: int) -> None:
    p, q = np.random.default_rng(seed).normal(scale=5, size=(2, 3, 40)).astype(np.float32)
    assert np.all(divergence(p, q) >= 0)


def test_storage_in_half_the_room(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=3, size=(20, 49152)).astype(np.float32)
    other = logits + random.normal(scale=0.14, size=logits.shape).astype(np.float32)
    store = Store(tmp_path)
    store.put_logits("a", logits)
    assert np.array_equal(store.logits("a"), compress(logits))
    assert store.logits("a").dtype == np.float16
    assert divergence(store.logits("a"), logits).max() <= SELF_DIVERGENCE
    exact = divergence(logits, other)
    assert exact.mean() == pytest.approx(0.01, rel=0.1)
    assert np.all(np.abs(divergence(store.logits("a"), other) - exact) <= STORED_DIVERGENCE * exact)


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.image("0") is None
    chunks = tuple(np.random.default_rng(i).normal(size=(3 + i, 8)).astype(np.float32) for i in range(12))
    store.put_image("0", EncodedImage(640, 480, chunks))
    back = store.image("0")
    assert back is not None
    assert (back.width, back.height) == (640, 480)
    assert all(np.array_equal(a, b) for a, b in zip(back.embeddings, chunks, strict=True))


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """/dev/full fails every write as a full disk does; numpy's own error has no number."""
    (tmp_path / "logits-0.npy").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"cannot be kept in {tmp_path.parent} \(.*\): free some space there, or set TMPDIR"):
        Store(tmp_path).put_logits("0", np.zeros((2, 1000), np.float32))
