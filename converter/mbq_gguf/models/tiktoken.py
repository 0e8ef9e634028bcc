"""Converts tiktoken's vocabularies (one line for each token: base64 and rank) to tokenizers of transformers.

tiktoken repeatedly joins the neighbours whose concatenation has the lowest rank. Encoding the bytes of a token with only the tokens of
lower rank therefore gives the two halves that byte pair encoding merges into it, and the order of ranks is the order of merges.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from mbq_gguf.errors import UserError


def tokenizer(file: Path, pattern: str, specials: Sequence[str], *, whole: bool, **settings: Any) -> Any:
    """transformers' tokenizer with the vocabulary of ``file``. The regular expression ``pattern`` splits texts into words, and ``specials``
    are added after the vocabulary's tokens, in this order.

    ``whole``: a word that is a token is never split, even if no merges lead to it, as in tiktoken; llama.cpp does this for some models
    only. ``settings`` are those of the transformers tokenizer. Raises UserError if ``file`` is not such a vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        vocabulary, merges = _vocabulary(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a tiktoken vocabulary ({error}): download it again") from error
    made = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=whole))
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings)


@lru_cache(maxsize=1)
def _vocabulary(data: bytes) -> tuple[Mapping[str, int], tuple[tuple[str, str], ...]]:
    """Tokens and merges, spelled in the letters that stand for bytes. Cached: a conversion asks several times, and 49 156 tokens take 0.8
    s."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("ranks have gaps, or a byte has no rank")

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    joined = ((token, _halves(ranks, token)) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = tuple((spelled(halves[0]), spelled(halves[1])) for _, halves in joined if len(halves) == 2)
    return {spelled(token): rank for token, rank in ranks.items()}, merges


def _halves(ranks: Mapping[bytes, int], token: bytes) -> list[bytes]:
    """Encode ``token`` with only the tokens of lower rank. The result has two parts if merges can produce the token."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        found = [(ranks.get(left + right, limit), place) for place, (left, right) in enumerate(pairwise(parts))]
        rank, place = min(found)
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
