"""Synthetic samples: generated texts, procedural pictures, and their use in calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.generate import _Sampler, written_texts
from mbq_gguf.calibration.pictures import SIDES, noise, picture
from mbq_gguf.calibration.synthetic import synthetic_streams
from mbq_gguf.errors import UserError
from mbq_gguf.models import LoadedModel
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings

LENGTH = 12


def texts(loaded: LoadedModel, count: int, seed: int = 0) -> torch.Tensor:
    return written_texts(loaded, count, LENGTH, 1.6, seed, lambda done, total: None)


def test_texts_are_plain_tokens_of_the_asked_shape(tiny: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    stored = next(tiny.decoder.layers.parameters()).dtype
    ids = written_texts(tiny, 6, LENGTH, 1.6, 0, lambda done, total: seen.append((done, total)))
    assert ids.shape == (6, LENGTH)
    assert seen[-1] == (LENGTH, LENGTH)
    special = torch.tensor([*tiny.prompts.tokenizer.all_special_ids, *tiny.prompts.tokenizer.added_tokens_decoder])
    begin = tiny.prompts.tokenizer.bos_token_id
    assert not torch.isin(ids[:, begin is not None :], special).any()
    assert len({tuple(row) for row in ids.tolist()}) == 6
    assert {(p.dtype, p.device.type) for p in tiny.decoder.layers.parameters()} == {(stored, "meta")}  # in its files again


def test_a_seed_gives_the_same_texts(tiny: LoadedModel) -> None:
    assert torch.equal(texts(tiny, 3), texts(tiny, 3))
    assert not torch.equal(texts(tiny, 3), texts(tiny, 3, seed=1))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's threads for the time of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_parts_in_threads_write_what_one_writes(tiny: LoadedModel, threads: Callable[[int], None]) -> None:
    """Five texts as two and three. Products of other shapes sum in another order, by which a token tips over now and then: four agree."""
    found = []
    for number in (1, 2):
        threads(number)
        found.append(texts(tiny, 5))
    assert torch.get_num_threads() == 2
    assert (found[0] == found[1]).all(dim=1).sum() >= 4


def test_an_error_ends_all_parts(tiny: LoadedModel, threads: Callable[[int], None]) -> None:
    """Within a token: 100,000 would take an hour."""

    def failing(done: int, total: int) -> None:
        raise OSError("the terminal is gone")

    threads(2)
    with pytest.raises(OSError, match="the terminal is gone"):
        written_texts(tiny, 4, 100_000, 1.6, 0, failing)


def test_a_card_too_small_is_a_sentence_and_leaves_the_decoder(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    stored = next(tiny.decoder.layers.parameters()).dtype
    monkeypatch.setattr(tiny.model, "generate", full)
    with pytest.raises(UserError, match=r"cannot hold the whole decoder.*--synthetic 0"):
        texts(tiny, 2)
    assert {parameter.dtype for parameter in tiny.decoder.layers.parameters()} == {stored}
    assert not tiny.decoder.embed_tokens._forward_hooks
    assert not tiny.decoder.head._forward_pre_hooks


def test_sampler_draws_by_the_tempered_softmax() -> None:
    """Frequencies of 20,000 draws within five standard errors; tokens that are not plain never."""
    scores = torch.tensor([3.0, 0.0, 9.0, 1.0, -2.0])
    plain, other = torch.tensor([0, 1, 3, 4]), torch.tensor([2])
    draws = 20_000
    numbers = torch.rand(draws, 1, generator=torch.Generator().manual_seed(0))
    sampler = _Sampler(other, 1.6, iter([numbers]), lambda done: None)
    chosen = sampler(torch.zeros(draws, 1, dtype=torch.long), scores.repeat(draws, 1)).argmax(dim=1)
    expected = (scores[plain] / 1.6).softmax(dim=0)
    found = torch.bincount(chosen, minlength=5) / draws
    assert found[2] == 0
    assert ((found[plain] - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_pictures_differ_and_fit_the_processor() -> None:
    draw = np.random.default_rng(0)
    made = [picture(draw) for _ in range(6)]
    assert all(image.mode == "RGB" and image.width == image.height and image.width in SIDES for image in made)
    assert len({image.tobytes() for image in made}) == 6
    assert min(np.asarray(image).std() for image in made) > 10  # never a blank sheet


@pytest.mark.parametrize("seed", range(4))
def test_noise_has_the_spectrum_of_photographs(seed: int) -> None:
    """Amplitude falls as 1/f^a with a from 0.8 to 2: the slope of its logarithm from 0.02 to 0.4 cycles a pixel, within 0.15."""
    values = noise(np.random.default_rng(seed), 224).mean(axis=2)
    amplitude = np.abs(np.fft.rfft2(values))
    frequency = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.rfftfreq(224)[None])
    inside = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[inside]), np.log(amplitude[inside]), 1)[0]
    assert -2.15 < slope < -0.65


def test_streams_are_texts_then_pictures(tiny: LoadedModel, samples: list[Sample]) -> None:
    streams = list(synthetic_streams(tiny, texts(tiny, 4), samples, pictures=2))
    assert [bool(stream.vision.any()) for stream in streams] == [False] * 4 + [True] * 2
    assert not any(stream.labels.any() for stream in streams)
    assert [len(stream.ids) for stream in streams[:4]] == [LENGTH] * 4


@pytest.mark.parametrize("token_weights", ["uniform", "token", "modality"])
def test_synthetic_samples_change_the_rounding(tiny: LoadedModel, samples: list[Sample], token_weights: str) -> None:
    settings = QuantiseSettings(refits=0, clip=False, synthetic=0, token_weights=token_weights)  # type: ignore[arg-type]
    plain, richer = (quantise(tiny, samples, chosen).quantised for chosen in (settings, replace(settings, synthetic=4)))
    assert plain.keys() == richer.keys()
    assert any(plain[name].data.tobytes() != richer[name].data.tobytes() for name in plain)
