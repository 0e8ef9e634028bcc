"""MiniCPM-V 2.6 and 4.5 in PyTorch: SigLIP, a resampler, and a language model of transformers.

transformers has no class for them, and the published one is code in the model directory. This is written from that architecture
(modeling_navit_siglip.py, resampler.py). Each picture and slice goes through the tower by itself; its patches use the nearest positions of
a table of 70 by 70. Then learned queries attend to its patches, whose keys have sine and cosine position embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LlavaConfig, SiglipVisionModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

HEAD = 128  # channels per head of the resampler's attention
BASE = 10000.0


class Tower(SiglipVisionModel):  # type: ignore[misc]
    """SigLIP for pictures of any aspect ratio."""

    def forward(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
        """The patches of each picture [rows * columns, width]. ``pixel_values`` [1, 3, patch, all patches * patch] has all patches in a
        row, ``target_sizes`` [pictures, 2] the rows and columns of patches of each picture."""
        embeddings = self.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)[0]
        side = round(embeddings.num_positions**0.5)
        found, start = [], 0
        for rows, columns in target_sizes.tolist():
            placed = patches[start : start + rows * columns] + embeddings.position_embedding(
                nearest_positions(rows, columns, side).to(patches.device)
            )
            hidden = self.encoder(inputs_embeds=placed[None]).last_hidden_state
            found.append(self.post_layernorm(hidden)[0])
            start += rows * columns
        return found


def nearest_positions(rows: int, columns: int, side: int) -> torch.Tensor:
    """The position, in a table of ``side`` by ``side``, of each of ``rows`` by ``columns`` patches [rows * columns], as in llama.cpp.

    The published code computes positions in float32; with 25, 49, 50 or 55 patches per row or column they are off by one.
    """
    down, across = (torch.arange(count) * side // count for count in (rows, columns))
    return (down[:, None] * side + across).flatten()


class Attention(nn.Module):
    """PyTorch's MultiheadAttention with separate matrices for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_q, self.in_proj_k, self.in_proj_v, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend from queries [queries, width] to keys and values [patches, width]; the result is [queries, width]."""
        parts = (self.in_proj_q(queries), self.in_proj_k(keys), self.in_proj_v(values))
        heads = (part.unflatten(-1, (-1, HEAD)).transpose(0, 1)[None] for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1).flatten(1)
        out: torch.Tensor = self.out_proj(mixed)
        return out


class Resampler(nn.Module):
    """Turns the patches of a picture into ``query_num`` tokens."""

    def __init__(self, query_num: int, width: int, patch_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(query_num, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.attn = Attention(width)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Turn the patches [rows * columns, patch width] of one picture into tokens [query_num, width]."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + position_embeddings(rows, columns, values.shape[-1]).to(values)
        out: torch.Tensor = self.proj(self.ln_post(self.attn(self.ln_q(self.query), keys, values)))
        return out


def position_embeddings(rows: int, columns: int, width: int) -> torch.Tensor:
    """Position embeddings [rows * columns, width]: sines and cosines of each patch's column, then of its row."""
    omega = BASE ** (-torch.arange(width // 4) / (width // 4))
    down, across = (torch.arange(count)[:, None] * omega for count in (rows, columns))
    by_row, by_column = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (down, across))
    both = (by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1))
    return torch.cat(both, dim=-1).flatten(0, 1)


class Body(LlavaPreTrainedModel):  # type: ignore[misc]
    """Tower, resampler, and language model without its head."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.vision_tower = Tower(vision)
        self.resampler = Resampler(config.query_num, text.hidden_size, vision.hidden_size)
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, target_sizes: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        """The language model's output for token ids [1, tokens], with picture tokens replaced by the resampler's output."""
        hidden = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None and target_sizes is not None:
            seen = zip(self.vision_tower(pixel_values, target_sizes), target_sizes.tolist(), strict=True)
            features = torch.cat([self.resampler(patches, *size) for patches, size in seen])
            place = (input_ids == self.config.image_token_id)[..., None]
            hidden = hidden.masked_scatter(place, features.to(hidden))
        return self.language_model(inputs_embeds=hidden, **inputs)


class MiniCPMV(LlavaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The whole model. Its configuration is LLaVA's, which has the same parts, plus ``query_num``."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012  (transformers requires it)

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, logits_to_keep: int = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Logits [1, tokens, vocabulary] of the last ``logits_to_keep`` tokens (0: all)."""
        out = self.model(input_ids, attention_mask=attention_mask, **inputs)
        rest = {name: value for name, value in out.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state[:, -logits_to_keep:]), **rest)
