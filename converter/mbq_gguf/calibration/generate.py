"""Generates text with the model: answers for pictures that have none, and free texts for calibration (synthetic.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import nn

from mbq_gguf.calibration.narrow import bits_with_room, in_bits
from mbq_gguf.calibration.precision import fast_bfloat16
from mbq_gguf.errors import UserError
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.parallel import broadcast_from_first
from mbq_gguf.threads import torch_threads

# Parts of the texts, each with a thread of its own on a CPU: 23 steps of 80 texts take 3.7 s on two cores. With two threads for each
# product, which synchronise a thousand times per step, they take 5.0.
HALVES = 2
INPUTS = "per_layer_model_projection"  # computes per-layer inputs from the embeddings (Gemma 4's small models)


def greedy_answer(loaded: LoadedModel, image: Image.Image, question: str, max_tokens: int) -> str:
    """The model's greedy answer to ``question`` about ``image``, at most ``max_tokens`` tokens, inside :func:`whole_decoder`."""
    encoded = loaded.encode(image, [(question, "")])
    out = _generate(loaded.model, encoded.inputs, do_sample=False, max_new_tokens=max_tokens)
    new = out[0, encoded.ids.shape[0] :]
    return str(loaded.prompts.tokenizer.decode(new, skip_special_tokens=True)).strip()


def written_texts(
    loaded: LoadedModel, count: int, length: int, temperature: float, seed: int, progress: Callable[[int, int], None]
) -> torch.Tensor:
    """Token ids [count, length], on the host, of texts that the model samples after the start of a text and a random token, without special
    tokens.

    ``progress`` is called with the number of tokens so far and ``length``. Raises UserError if the decoder does not fit on the device.
    """
    plain = _plain_tokens(loaded)
    draw = torch.Generator().manual_seed(seed)
    first = plain[torch.randint(len(plain), (count, 1), generator=draw)]
    first = torch.cat([torch.tensor([loaded.prompts.text_begin] * count, dtype=first.dtype), first], dim=1)
    other = torch.tensor(sorted(set(range(loaded.decoder.head.out_features)) - set(plain.tolist())), dtype=torch.long)
    steps = length - first.shape[1]
    numbers = torch.rand(steps, count, 1, generator=draw)
    stop = Event()

    def write(model: nn.Module, texts: slice) -> torch.Tensor:
        def done(tokens: int) -> None:
            if stop.is_set():
                raise InterruptedError("another part has ended")
            if texts.start == 0:
                progress(tokens, length)

        sampler = _Sampler(other.to(loaded.device), temperature, iter(numbers[:, texts]), done)
        inputs = loaded.prompts.text_inputs(first[texts].to(loaded.device))
        return _generate(model, inputs, logits_processor=[sampler], do_sample=False, max_new_tokens=steps).cpu()

    with whole_decoder(loaded):
        if loaded.device.type != "cpu" or fast_bfloat16():
            return write(loaded.model, slice(0, count))
        _lay_by_columns(loaded)
        return torch.cat(_in_parts(loaded, count, write, stop))


def _in_parts(loaded: LoadedModel, count: int, write: Callable[[nn.Module, slice], torch.Tensor], stop: Event) -> list[torch.Tensor]:
    """Run ``write`` for each part of ``count`` texts in a thread of its own; ``stop`` is set if one of them ends early."""
    parts = min(HALVES, count, torch.get_num_threads())
    texts = [slice(*bounds) for bounds in pairwise(count * part // parts for part in range(parts + 1))]
    with torch_threads(max(1, torch.get_num_threads() // parts)), ThreadPoolExecutor(parts) as pool:
        try:
            return list(pool.map(write, [loaded.twin().model for _ in texts], texts))
        except BaseException:
            stop.set()
            raise


def _lay_by_columns(loaded: LoadedModel) -> None:
    """Store the decoder's matrices column by column, as the library's products read them: with 40 or 80 texts 150 to 190 GFLOPS per core
    instead of 120 to 140.
    """
    for module in loaded.decoder.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def to_dtype(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """``values`` with floating-point tensors converted to ``dtype``."""
    return tuple(value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in values)


class _Sampler:
    """A logits processor that leaves one token per text, and none of the ``other`` ones. It overwrites the scores that it is given.

    It uses one uniform number per text, the next of ``numbers`` [texts, 1]. The sampling in transformers draws an exponential number for
    every token of the vocabulary, which takes half of the time of a step here.
    """

    def __init__(self, other: torch.Tensor, temperature: float, numbers: Iterator[torch.Tensor], progress: Callable[[int], None]) -> None:
        self.other, self.temperature, self.numbers, self.progress = other, temperature, numbers, progress

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sums = scores.div_(self.temperature).index_fill_(1, self.other, -torch.inf).softmax(dim=-1).cumsum(dim=-1)
        reached = (1 - next(self.numbers)).to(sums) * sums[:, -1:]  # above 0, so that tokens with probability 0 are never chosen
        self.progress(ids.shape[1] + 1)
        return scores.fill_(-torch.inf).scatter_(1, torch.searchsorted(sums, reached), 0.0)


def _plain_tokens(loaded: LoadedModel) -> torch.Tensor:
    """The ids of plain text: no turns, ends and pictures, no embeddings without a token."""
    tokenizer = loaded.prompts.tokenizer
    return torch.tensor(sorted(set(range(len(tokenizer))) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}))


@torch.no_grad()
def _generate(model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    mask = torch.ones_like(inputs["input_ids"])
    out: torch.Tensor = model.generate(**inputs, attention_mask=mask, use_cache=True, pad_token_id=0, **options)  # type: ignore[operator]
    return out


def writing_bits(loaded: LoadedModel) -> int:
    """The bits per weight of the decoder while it generates. Raises UserError if even the fewest do not fit on the device."""
    return bits_with_room(loaded, _writing_dtype(loaded))


def _writing_dtype(loaded: LoadedModel) -> torch.dtype:
    """The stored dtype, if the device multiplies faster in it."""
    stored = next(loaded.decoder.layers.parameters()).dtype
    return stored if loaded.device.type != "cpu" or fast_bfloat16() else loaded.dtype


@contextmanager
def whole_decoder(loaded: LoadedModel) -> Iterator[None]:
    """While open, the whole decoder is on the device. Raises UserError if it does not fit."""
    decoder, dtype = loaded.decoder, _writing_dtype(loaded)
    bits = broadcast_from_first(lambda: writing_bits(loaded))  # the same on all GPUs, whatever memory each has
    handles = [
        decoder.embed_tokens.register_forward_hook(lambda _module, _args, out: out.to(dtype)),
        # Only the last token's state is needed; for a slice of several, torch would copy the head's weight for every text (50 s of 80).
        decoder.head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype).contiguous(),)),
        *(layer.register_forward_pre_hook(lambda _module, args: to_dtype(args, dtype)) for layer in decoder.layers),
    ]
    if isinstance(projection := getattr(decoder.module, INPUTS, None), nn.Linear):
        handles.append(projection.register_forward_pre_hook(lambda module, args: to_dtype(args, module.weight.dtype)))
    try:
        with in_bits(loaded, bits, dtype):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{loaded.device} cannot hold the whole decoder to write texts with: give --synthetic 0 and a JSONL set, or --device cpu"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
