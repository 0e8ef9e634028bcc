"""Variants of a published MiniCPM-V that are not supported, each refused with its own message. Takes a second."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from mbq_gguf.convert import ConvertOptions
from mbq_gguf.errors import UserError
from mbq_gguf.models.load import load_meta
from mbq_gguf.models.minicpmv import TEXTS
from mbq_gguf.models.resampler import nearest_positions
from mbq_gguf.preflight import check_inputs, run_preflight
from recipe import write
from recipes import RECIPES

CONFIG, PICTURES, TOKENS = "config.json", "preprocessor_config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(RECIPES["MiniCPM-V 2.6"], tmp_path_factory.mktemp("minicpmv") / "checkpoint")


def test_a_known_type_is_not_warned_of(published: Path) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_meta(published)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == []


def nameless(tokenizer: Any) -> None:
    """Without the token that stands for pictures."""
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<unk>"]
    del tokenizer["model"]["vocab"]["<unk>"]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (CONFIG, lambda config: config.update(version=2.5), f"only versions {' and '.join(TEXTS)} are supported"),
        (CONFIG, lambda config: config.pop("version"), f"only versions {' and '.join(TEXTS)} are supported"),
        (CONFIG, lambda config: config.update(drop_vision_last_layer=True), "omits the last layer of its vision tower"),
        (PICTURES, lambda settings: settings.update(slice_mode=False), "does not slice pictures"),
        (TOKENS, nameless, "has no token <unk>"),
    ],
)
def test_another_kind_is_refused(published: Path, tmp_path: Path, file: str, change: Callable[[Any], None], said: str) -> None:
    for path in published.iterdir():
        if path.name != file:
            (tmp_path / path.name).symlink_to(path)
    settings = json.loads((published / file).read_text())
    change(settings)
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=re.escape(said)):
        load_meta(tmp_path)


def test_a_width_unlike_the_weights_takes_no_memory(published: Path, tmp_path: Path) -> None:
    """Of the table of positions, which has one row as long as the embeddings: their width is refused by what the checkpoint has."""
    for path in published.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((published / CONFIG).read_text()) | {"hidden_size": 8_000_000}))
    options = ConvertOptions(tmp_path, tmp_path / "out.gguf", synthetic=0, rounding="nearest")
    with LiveBytes() as live:
        check_inputs(options)
    assert live.most < 8_000_000  # a byte for each channel
    with pytest.raises(UserError, match=r"is \(256, 256\) in the checkpoint and \(8000000, 256\) by its config.json"):
        run_preflight(options, lambda _: None)


def test_positions_are_the_nearest_of_the_table() -> None:
    assert torch.equal(nearest_positions(70, 70, 70), torch.arange(70 * 70))
    assert nearest_positions(2, 3, 70).tolist() == [0, 23, 46, 35 * 70, 35 * 70 + 23, 35 * 70 + 46]
