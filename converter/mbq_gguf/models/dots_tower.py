"""dots.ocr in PyTorch: its vision tower and Qwen2's language model. transformers has no class for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM

ROPE_BASE = 10000.0
MERGER_EPS = 1e-6


def rope_angles(rows: int, columns: int, merge: int, head: int) -> torch.Tensor:
    """Rotary angles of each patch [rows * columns, head / 2]: the first half depends on its row, the second on its column.

    Patches are in the merger's order: one square of ``merge`` by ``merge`` patches after the other.
    """
    squares = (rows // merge, merge, columns // merge, merge)
    places = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    frequencies = ROPE_BASE ** -(torch.arange(0, head // 2, 2).float() / (head // 2))
    of_axis = [place.view(squares).transpose(1, 2).flatten()[:, None] * frequencies for place in places]
    return torch.cat(of_axis, dim=-1)


def apply_rope(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """``x`` [heads, patches, head] after rotary embedding by ``angle`` [patches, head / 2], computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


class Patchifier(nn.Module):
    """Patch embedding, followed by a norm."""

    def __init__(self, vision: Mapping[str, Any], width: int, eps: float) -> None:
        super().__init__()
        self.shape = (vision.get("num_channels", 3), vision["patch_size"], vision["patch_size"])
        self.proj = nn.Conv2d(self.shape[0], width, self.shape[1], self.shape[1])
        self.norm = nn.RMSNorm(width, eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed pixels [patches, channels * side * side] as [patches, width]."""
        return self.norm(self.proj(pixels.view(-1, *self.shape).to(self.proj.weight.dtype)).flatten(1))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Wraps the patchifier, as tensor names in the checkpoint require."""

    def __init__(self, patchifier: Patchifier) -> None:
        super().__init__()
        self.patchifier = patchifier

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`Patchifier.forward`."""
        return self.patchifier(pixels)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Full attention between the patches of a picture."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """``x`` are patches of one picture [patches, width], as is the result; ``angle`` is [patches, head / 2]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        q, k = apply_rope(q, angle), apply_rope(k, angle)
        # without the batch dimension, torch chooses an implementation that needs more memory
        mixed = functional.scaled_dot_product_attention(q[None], k[None], v[None])
        return self.proj(mixed[0].transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*shape, bias=bias) for shape in ((width, inner), (inner, width), (width, inner)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """fc2(silu(fc1(x)) * fc3(x)) of ``x`` [patches, width]."""
        return self.fc2(functional.silu(self.fc1(x)) * self.fc3(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, with a norm before each."""

    def __init__(self, vision: Mapping[str, Any], width: int, eps: float) -> None:
        super().__init__()
        bias = bool(vision.get("use_bias", False))
        self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attn = Attention(width, vision["num_attention_heads"], bias)
        self.mlp = GatedMLP(width, vision["intermediate_size"], bias)

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """``x`` are patches of one picture [patches, width], as is the result; ``angle`` is [patches, head / 2]."""
        x = x + self.attn(self.norm1(x), angle)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Merger(nn.Module):
    """Merges squares of patches into tokens."""

    def __init__(self, width: int, merge: int, out: int) -> None:
        super().__init__()
        self.joined = width * merge**2
        self.ln_q = nn.LayerNorm(width, MERGER_EPS)
        self.mlp = nn.Sequential(nn.Linear(self.joined, self.joined), nn.GELU(), nn.Linear(self.joined, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge patches [patches, width], ordered by square, into tokens [patches / merge ** 2, out]."""
        return self.mlp(self.ln_q(x).view(-1, self.joined))  # type: ignore[no-any-return]


class Tower(nn.Module):
    """The vision tower. ``vision`` is the published vision_config, ``out`` the width of the language model."""

    def __init__(self, vision: Mapping[str, Any], out: int) -> None:
        super().__init__()
        width, eps = vision["embed_dim"], vision["rms_norm_eps"]
        self.merge, self.head = vision["spatial_merge_size"], width // vision["num_attention_heads"]
        self.patch_embed = PatchEmbed(Patchifier(vision, width, eps))
        self.blocks = nn.ModuleList([Block(vision, width, eps) for _ in range(vision["num_hidden_layers"])])
        self.post_trunk_norm = nn.RMSNorm(width, eps)
        self.merger = Merger(width, self.merge, out)

    def forward(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Tokens of all pictures; ``grids`` [pictures, 3] has the frames (one), rows and columns of each picture's patches."""
        sizes = [(rows, columns) for _, rows, columns in grids.tolist()]
        parts = self.patch_embed(pixels).split([rows * columns for rows, columns in sizes])
        return torch.cat([self.picture(part, *size) for part, size in zip(parts, sizes, strict=True)])

    def picture(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The tokens of one picture, given its patches [rows * columns, width]."""
        angle = rope_angles(rows, columns, self.merge, self.head).to(x.device)
        for block in self.blocks:
            x = block(x, angle)
        return self.merger(self.post_trunk_norm(x))  # type: ignore[no-any-return]


class DotsOCR(Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 with the tower's tokens in place of ``image_token_id`` in the prompt."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower = Tower(config.vision_config, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``pixel_values`` [patches, channels * side * side] has all pictures of ``input_ids`` [1, tokens], ``image_grid_thw``
        [pictures, 3] their frames, rows and columns."""
        if pixel_values is None or input_ids is None:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        embeds = self.get_input_embeddings()(input_ids)
        tokens = self.vision_tower(pixel_values, image_grid_thw).to(embeds.dtype)
        seen = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
        return super().forward(inputs_embeds=embeds.masked_scatter(seen, tokens), **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        """Pass the picture with the prompt only, not with each generated token."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs if is_first_iteration else inputs | {"pixel_values": None}
