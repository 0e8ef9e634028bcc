"""Synthetic samples, which need no data: texts that the model generates itself, and questions about procedural pictures.

A calibration set covers what users will ask. GPTQ may do anything, up to damping, in input directions that the set never excites, and the
model's other abilities depend on those. Texts sampled from a random first token (LLM-QAT, arXiv 2305.17888) and procedural pictures excite
them: on the reference VLM, calibrated on generated scenes, they halve the divergence on photographs and on text (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mbq_gguf.calibration.dataset import FREE_QUESTION, Sample
from mbq_gguf.calibration.generate import written_texts
from mbq_gguf.calibration.pictures import picture
from mbq_gguf.calibration.stream import capture_each
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.models.loaded import LoadedModel

TEXT_TOKENS = 128  # as many as the reference VLM's six minutes allow
TEMPERATURE = 1.6  # 1.0 gives too uniform texts: 0.60 to 0.64 nats on text, 0.53 to 0.57 with 1.3 to 2.0; 2.0 is worse on photographs
FREE_SHARE = 0.4  # share of the pictures with FREE_QUESTION; the others have a question of the samples
SEED = 0


def written(loaded: LoadedModel, count: int, progress: Callable[[int, int], None]) -> torch.Tensor:
    """Token ids [count, TEXT_TOKENS] of texts that the model generates; ``progress`` is called with the tokens per text so far and in
    total."""
    return written_texts(loaded, count, TEXT_TOKENS, TEMPERATURE, SEED, progress)


def synthetic_streams(
    loaded: LoadedModel, texts: torch.Tensor, samples: Sequence[Sample], pictures: int, workers: int = 1
) -> Iterator[Streamed]:
    """Each of ``texts`` [count, tokens] and ``pictures`` questions about pictures, before layer 0, by :func:`capture_each`. They have no
    answers."""
    yield from capture_each(loaded, list(texts), loaded.encode_text, workers=workers)
    draw = np.random.default_rng(SEED)
    asked = sorted({question for sample in samples for question, _ in sample.turns}) or [FREE_QUESTION]
    drawn = []
    for _ in range(pictures):
        question = FREE_QUESTION if draw.random() < FREE_SHARE else str(draw.choice(asked))
        drawn.append((picture(draw), question))
    yield from capture_each(loaded, drawn, lambda pair: loaded.encode(pair[0], [(pair[1], "")]), workers=workers)
