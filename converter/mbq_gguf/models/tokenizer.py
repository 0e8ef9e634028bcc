"""Loads the tokenizer of a model directory: with transformers, or from tokenizer.model if transformers would need code or protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError, describe
from mbq_gguf.models.as_llama import language_model
from mbq_gguf.models.checks import read_json_object
from mbq_gguf.models.remote_code import runs_remote_code

SPACE = "▁"
ENDS = ("<|im_end|>", "<|end|>")  # end a turn; the settings may name the end of a document instead


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of ``model_dir``. Raises whatever transformers, tokenizers and sentencepiece raise for its files."""
    from transformers import AutoTokenizer

    if language_model(read_json_object(model_dir / "config.json")):
        return of_pieces(Pieces.of(model_dir))
    return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=runs_remote_code())


@dataclass(frozen=True)
class Pieces:
    """An open tokenizer.model (SentencePiece, BPE) and the ``settings`` of tokenizer_config.json, whose added tokens replace pieces."""

    model: Any
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, model_dir: Path) -> Pieces:
        """Open those of ``model_dir``. Raises UserError if a file is missing or of another kind, or the settings lack a token."""
        from sentencepiece import SentencePieceProcessor

        file, beside = model_dir / "tokenizer.model", model_dir / "tokenizer_config.json"
        try:
            model = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file} is not a SentencePiece tokenizer ({describe(error)}): download it again") from error
        found = cls(model, read_json_object(beside))
        try:
            known = [token in found.ids for token in (found.named("bos"), found.named("unk"), found.eos)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{beside} lacks settings of a tokenizer, or has wrong ones ({describe(error)}): download it again") from error
        if not all(known):
            raise UserError(f"{beside} names a bos_token, eos_token or unk_token that {file} does not have: download both again")
        return found

    @cached_property
    def added(self) -> dict[int, Mapping[str, Any]]:
        """Added tokens by id, in ascending order."""
        return dict(sorted((int(number), token) for number, token in self.settings.get("added_tokens_decoder", {}).items()))

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token."""
        found = {self.model.id_to_piece(number): number for number in range(self.model.vocab_size()) if number not in self.added}
        return found | {str(token["content"]): number for number, token in self.added.items()}

    @property
    def eos(self) -> str:
        """The token that ends an answer."""
        return next((end for end in ENDS if end in self.ids), None) or self.named("eos")

    @property
    def begin_with_space(self) -> bool:
        """Whether a text gets a space in front of it (add_dummy_prefix), which the library shows only by its results.

        Without ``legacy`` this holds only for the start of a whole text, and a conversation never starts with plain text.
        """
        return bool(self.settings.get("legacy", True) and self.model.encode("a", out_type=str)[0].startswith(SPACE))

    @property
    def strip(self) -> bool:
        """Whether white space after added tokens is removed."""
        return any(token.get("rstrip") for token in self.added.values())

    def merges(self) -> list[tuple[str, str]]:
        """All pairs of pieces whose concatenation is a piece, by descending score, then by id."""
        kinds = (self.model.is_unknown, self.model.is_control, self.model.is_byte, self.model.is_unused)
        normal = {
            self.model.id_to_piece(number): (-self.model.get_score(number), number)
            for number in range(self.model.vocab_size())
            if number not in self.added and not any(kind(number) for kind in kinds)
        }
        halves = ((whole[:cut], whole[cut:]) for whole in sorted(normal, key=normal.__getitem__) for cut in range(1, len(whole)))
        return [pair for pair in halves if pair[0] in normal and pair[1] in normal]

    def named(self, which: str) -> str:
        """The special token ``which``, which the settings have as a string or an object."""
        token = self.settings[f"{which}_token"]
        return str(token["content"] if isinstance(token, dict) else token)


def of_pieces(pieces: Pieces) -> Any:
    """A transformers tokenizer with the vocabulary of ``pieces`` and the chat template of their settings.

    It splits texts as llama.cpp does: neighbours whose concatenation has the best score are joined first, and added tokens are never split.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    bos, unk, spaced = pieces.named("bos"), pieces.named("unk"), pieces.begin_with_space
    tokenizer = Tokenizer(models.BPE(vocab=pieces.ids, merges=pieces.merges(), unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([*[normalizers.Prepend(SPACE)] * spaced, normalizers.Replace(" ", SPACE)])
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, *[decoders.Strip(" ", 1, 0)] * spaced])
    for token in pieces.added.values():
        add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
        add([AddedToken(token["content"], normalized=False, rstrip=bool(token.get("rstrip")))])
    if pieces.settings.get("add_bos_token", True):
        special = [(bos, pieces.ids[bos])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=pieces.settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        bos_token=bos,
        eos_token=pieces.eos,
        unk_token=unk,
    )
