"""Language models that no class of transformers reads, as their authors publish them: small random checkpoints and their graph in PyTorch.

Written from their code (modeling_qwen.py, modeling_chatglm.py, modeling_cogvlm.py), by which a test holds the class that stands for them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_vlm import DEMO
from tokens import TOKENS
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers.convert_slow_tokenizer import bytes_to_unicode

Tensors = Mapping[str, torch.Tensor]
WIDTH, FFN, HEADS, HEAD, LAYERS, CONTEXT = 128, 256, 4, 32, 2, 512
EPS = 1e-6


@dataclass(frozen=True)
class Graph:
    """Where a published checkpoint has what a decoder is made of, and how it turns queries and keys.

    ``layer`` begins the names in layer ``{}``; ``gate`` and ``up`` are matrices, or halves of one (its name and 0 or 1). ``turned`` is the
    share of a head's channels that are; ``neighbours``: in pairs of neighbours, not of a channel and one half a head away.
    """

    layer: str
    embeddings: str
    norm: str
    head: str
    qkv: str
    out: str
    gate: tuple[str, int | None]
    up: tuple[str, int | None]
    down: str
    norms: tuple[str, str]
    groups: int = HEADS
    base: float = 10000.0
    turned: float = 1.0
    neighbours: bool = False
    qkv_bias: bool = True

    def logits(self, tensors: Tensors, ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] in float32."""
        values = {name: tensor.float() for name, tensor in tensors.items()}
        hidden = values[f"{self.embeddings}.weight"][ids]
        for index in range(LAYERS):
            own = {name.removeprefix(self.layer.format(index)): tensor for name, tensor in values.items()}
            hidden = hidden + linear(self.attention(own, normed(hidden, own, self.norms[0])), own[f"{self.out}.weight"])
            x = normed(hidden, own, self.norms[1])
            gate, up = (linear(x, half(own[f"{name}.weight"], part)) for name, part in (self.gate, self.up))
            hidden = hidden + linear(silu(gate) * up, own[f"{self.down}.weight"])
        return linear(normed(hidden, values, self.norm), values[f"{self.head}.weight"])

    def attention(self, own: Tensors, x: torch.Tensor) -> torch.Tensor:
        """What each token takes of those up to it [tokens, width]."""
        mixed = linear(x, own[f"{self.qkv}.weight"], own.get(f"{self.qkv}.bias") if self.qkv_bias else None)
        sizes = [WIDTH, self.groups * HEAD, self.groups * HEAD]
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(0, 1) for part in mixed.split(sizes, -1))
        k, v = (part.repeat_interleave(HEADS // self.groups, 0) for part in (k, v))
        return scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True).transpose(0, 1).flatten(1)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [heads, tokens, channels], turned by their positions."""
        count = int(HEAD * self.turned)
        angles = torch.arange(x.shape[1])[:, None] * self.base ** (-torch.arange(0, count, 2) / count)
        first, second = (x[..., :count:2], x[..., 1:count:2]) if self.neighbours else x[..., :count].chunk(2, -1)
        parts = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        turned = torch.stack(parts, -1).flatten(-2) if self.neighbours else torch.cat(parts, -1)
        return torch.cat([turned, x[..., count:]], -1)


def normed(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"], EPS)


def half(matrix: torch.Tensor, part: int | None) -> torch.Tensor:
    return matrix if part is None else matrix.chunk(2)[part]


@dataclass(frozen=True)
class Published:
    """A family's graph, what its config.json and tokenizer are, and tensors beside: a vision part, and biases."""

    graph: Graph
    config: Mapping[str, Any]
    tokens: Callable[[Path], int]
    biased: bool = False
    beside: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """A small random checkpoint in bfloat16."""
        folder.mkdir(parents=True)
        size = self.tokens(folder)
        (folder / "config.json").write_text(json.dumps({**self.config, "vocab_size": size, "padded_vocab_size": size}))
        save_file(dict(self.tensors(size)), folder / "model.safetensors", {"format": "pt"})
        return folder

    def tensors(self, size: int) -> Iterable[tuple[str, torch.Tensor]]:
        """Matrices that matter beside the residual stream, norms and biases that show where they are forgotten."""
        graph, draw = self.graph, torch.Generator().manual_seed(0)
        rows = WIDTH + 2 * graph.groups * HEAD
        ends = {name: FFN if part is None else 2 * FFN for name, part in (graph.gate, graph.up)}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size, WIDTH) for name in (graph.embeddings, graph.head)}
        shapes |= {f"{graph.norm}.weight": (WIDTH,), **dict.fromkeys(self.beside, (WIDTH, WIDTH))}
        for layer in map(graph.layer.format, range(LAYERS)):
            shapes |= {f"{layer}{name}.weight": (WIDTH,) for name in graph.norms} | {f"{layer}{graph.qkv}.weight": (rows, WIDTH)}
            shapes |= {f"{layer}{graph.out}.weight": (WIDTH, WIDTH), f"{layer}{graph.down}.weight": (WIDTH, FFN)}
            shapes |= {f"{layer}{name}.weight": (count, WIDTH) for name, count in ends.items()}
            shapes |= {f"{layer}{graph.qkv}.bias": (rows,)} if self.biased else {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=draw) * (0.08 if len(shape) > 1 else 0.3)
            yield name, (value + 1 if len(shape) == 1 and name.endswith("weight") else value).bfloat16()


def ranks(folder: Path, name: str) -> int:
    """tiktoken's file of a small vocabulary: each byte, then the demo's first merges; returns how many tokens it has."""
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    merges = json.loads((DEMO / "tokenizer.json").read_text())["model"]["merges"][:TOKENS]
    joined = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
    found = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(bytes(bytes_of[letter] for letter in token) for token in joined)])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(found)]
    (folder / name).write_text("".join(lines))
    return len(lines)
