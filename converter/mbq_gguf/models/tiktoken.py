"""A vocabulary as tiktoken keeps it (lines of a token in base64 and its rank) as a tokenizer of transformers.

tiktoken joins the pair of neighbours whose whole has the lowest rank. So a token's last join, of what the tokens of lower rank make of its
bytes, is a merge of byte pair encoding, and the ranks are the merges' order.
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
    """transformers' tokenizer of the ranks in ``file`` for words that the regular expression ``pattern`` cuts; ``specials`` are
    tokens behind the vocabulary's, in this order.

    ``whole``: a word that is a token stays one even where no merges lead to it, as in tiktoken; llama.cpp does this for some models only.
    ``settings`` are the tokenizer's. Raises UserError if ``file`` is no such vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        vocabulary, merges = _vocabulary(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no vocabulary of tiktoken's ({error}): download it again") from error
    made = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=whole))
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings)


@lru_cache(maxsize=1)
def _vocabulary(data: bytes) -> tuple[Mapping[str, int], tuple[tuple[str, str], ...]]:
    """Tokens and merges in letters that stand for bytes; kept, since a conversion asks several times and 49 156 tokens take 0.8 s."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("its ranks have gaps, or a byte has none")

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    joined = ((token, _halves(ranks, token)) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = tuple((spelled(halves[0]), spelled(halves[1])) for _, halves in joined if len(halves) == 2)
    return {spelled(token): rank for token, rank in ranks.items()}, merges


def _halves(ranks: Mapping[bytes, int], token: bytes) -> list[bytes]:
    """What the tokens of lower rank make of the bytes of ``token``: two, where it can be reached."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        found = [(ranks.get(left + right, limit), place) for place, (left, right) in enumerate(pairwise(parts))]
        rank, place = min(found)
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
