"""A class for llama.cpp's conversion package that writes InternLM2 and Phi-3 of InternVL 2 as the equivalent Llama.

The package's own classes keep queries, keys and values fused, or split them only on writing, which does not fit their separate
quantisation; the class for InternLM2 needs protobuf; and under the architecture names that they write, the runtime does not support text
and pictures in one pass. As a Llama, the model computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from mbq_gguf.models import as_llama
from mbq_gguf.models.tokenizer import Pieces

STRIPS = "Phi-3"  # in a model's name, it makes the runtime strip white space after special tokens
FACTORS = "rope_factors_"


def text_class(package: Any) -> Any:
    """A subclass of the package's Llama class that accepts the tensors and vocabulary of these models."""
    base, gguf = package.conversion.get_model_class("LlamaForCausalLM", mmproj=False), package.gguf

    def index_tensors(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for taken, get in base.index_tensors(self, *args, **options).items():
            names = as_llama.names_of(taken)
            found |= {name: partial(part, self, taken, get, place) if len(names) > 1 else get for place, name in enumerate(names)}
        return found

    def set_vocab(self: Any) -> None:
        tokens, scores, kinds = self._create_vocab_sentencepiece()
        pieces, special = Pieces.of(self.dir_model), gguf.SpecialVocab(self.dir_model, n_vocab=len(tokens))
        special.special_token_ids["eos"] = pieces.ids[pieces.eos]
        writer = self.gguf_writer
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(pieces.begin_with_space)
        special.add_to_gguf(writer)

    def set_type(self: Any) -> None:
        base.set_type(self)
        if Pieces.of(self.dir_model).strip and STRIPS.lower() not in self.metadata.name.lower():
            self.metadata.name += f" {STRIPS}"

    def set_gguf_parameters(self: Any) -> None:
        base.set_gguf_parameters(self)
        if "long_factor" in self.rope_parameters:
            original = self.rope_parameters["original_max_position_embeddings"]
            scale = max(self.hparams["max_position_embeddings"] / original, 1)
            self.gguf_writer.add_rope_scaling_orig_ctx_len(original)
            self.gguf_writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))

    def generate_extra_tensors(self: Any) -> Iterable[tuple[str, torch.Tensor]]:
        yield from base.generate_extra_tensors(self)
        for length in ("long", "short"):
            if factors := self.rope_parameters.get(f"{length}_factor"):
                yield f"{FACTORS}{length}.weight", torch.tensor(factors, dtype=torch.float32)

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        found: Iterable[tuple[str, Any]] = [(name, tensor)] if name.startswith(FACTORS) else base.modify_tensors(self, tensor, name, layer)
        return found

    functions = (index_tensors, set_vocab, set_type, set_gguf_parameters, generate_extra_tensors, modify_tensors)
    methods = {function.__name__: function for function in functions}
    return type("AsLlama", (base,), {"model_arch": base.model_arch, **methods})


def part(model: Any, name: str, get: Callable[[], Any], place: int) -> Any:
    """Part ``place`` of the fused tensor ``name``, split according to the settings of ``model``."""
    return as_llama.parts_of(name, get(), model.hparams["num_attention_heads"], model.hparams["num_key_value_heads"])[place]
