"""InternLM2's file: a class for llama.cpp's conversion package that writes it as the Llama that it is.

The package's own class wants protobuf, takes queries, keys and values as one, which are quantised apart, and gives the model a name of its
own, of which the runtime does not know that text and pictures can go in one pass. Under Llama's name it computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mbq_gguf.models import internlm2
from mbq_gguf.models.tokenizer import END, begins_with_space


def text_class(package: Any) -> Any:
    """The class of Llama that takes InternLM2's tensors and vocabulary."""
    base, gguf = package.conversion.get_model_class("LlamaForCausalLM", mmproj=False), package.gguf

    def index_tensors(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for taken, get in base.index_tensors(self, *args, **options).items():
            names = internlm2.names_of(taken)
            found |= {name: partial(part, self, get, place) if len(names) > 1 else get for place, name in enumerate(names)}
        return found

    def set_vocab(self: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        tokens, scores, kinds = self._create_vocab_sentencepiece()
        special = gguf.SpecialVocab(self.dir_model, n_vocab=len(tokens))
        if END.encode() in tokens:
            special.special_token_ids["eos"] = tokens.index(END.encode())
        writer = self.gguf_writer
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(begins_with_space(SentencePieceProcessor(model_file=str(self.dir_model / "tokenizer.model"))))
        special.add_to_gguf(writer)

    methods = {"model_arch": base.model_arch, "index_tensors": index_tensors, "set_vocab": set_vocab}
    return type("InternLM2Model", (base,), methods)


def part(model: Any, get: Callable[[], Any], place: int) -> Any:
    """Queries, keys or values of a merged matrix, as the settings of ``model`` say."""
    return internlm2.parts_of(get(), model.hparams["num_attention_heads"], model.hparams["num_key_value_heads"])[place]
