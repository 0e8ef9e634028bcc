"""The tokenizer of a model directory: transformers', or of tokenizer.model alone where that wants code of the directory or protobuf."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from mbq_gguf.models.checks import read_object
from mbq_gguf.models.remote_code import runs_remote_code

SPACE = "▁"
INTERNLM2 = "InternLM2Tokenizer"
END = "<|im_end|>"  # ends a turn of InternLM2's, whose settings name the end of a document


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of ``model_dir``. Raises whatever transformers, tokenizers and sentencepiece raise of its files."""
    from transformers import AutoTokenizer

    file = model_dir / "tokenizer_config.json"
    settings = read_object(file) if file.is_file() else {}
    if settings.get("tokenizer_class") == INTERNLM2:
        return of_pieces(model_dir, settings)
    return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=runs_remote_code())


def of_pieces(model_dir: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer of tokenizer.model (SentencePiece, of kind BPE) with the added tokens and the chat template of ``settings``.

    It cuts texts as llama.cpp does: the pair of neighbours whose whole has the best score is joined first, added tokens stand whole, and
    nothing beside them is stripped.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    added = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    ids = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size()) if number not in added}
    ids |= {token["content"]: number for number, token in added.items()}
    names = {f"{which}_token": named(settings, which) for which in ("bos", "eos", "unk")}
    names |= {"eos_token": END} if END in ids else {}
    bpe = models.BPE(vocab=ids, merges=merges_of(pieces, added), unk_token=names["unk_token"], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefixed = begins_with_space(pieces)
    tokenizer.normalizer = normalizers.Sequence([*[normalizers.Prepend(SPACE)] * prefixed, normalizers.Replace(" ", SPACE)])
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, *[decoders.Strip(" ", 1, 0)] * prefixed])
    for _, token in sorted(added.items()):
        add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
        add([AddedToken(token["content"], normalized=False)])
    if settings.get("add_bos_token", True):
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, ids[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=settings.get("chat_template"), clean_up_tokenization_spaces=False, **names
    )


def merges_of(pieces: Any, added: Container[int]) -> list[tuple[str, str]]:
    """Every pair of pieces whose whole is one, the best first, of equal ones the first id; without pieces that ``added`` replace."""
    kinds = (pieces.is_unknown, pieces.is_control, pieces.is_byte, pieces.is_unused)
    normal = {
        pieces.id_to_piece(number): (-pieces.get_score(number), number)
        for number in range(pieces.vocab_size())
        if number not in added and not any(kind(number) for kind in kinds)
    }
    halves = ((whole[:cut], whole[cut:]) for whole in sorted(normal, key=normal.__getitem__) for cut in range(1, len(whole)))
    return [pair for pair in halves if pair[0] in normal and pair[1] in normal]


def begins_with_space(pieces: Any) -> bool:
    """Whether a text gets a space in front of it (add_dummy_prefix), which the library tells of by its results alone."""
    return bool(pieces.encode("a", out_type=str)[0].startswith(SPACE))


def named(settings: Mapping[str, Any], which: str) -> str:
    """The token that ``settings`` name as ``which``: a text, or an object with one."""
    token = settings[f"{which}_token"]
    return str(token["content"] if isinstance(token, dict) else token)
