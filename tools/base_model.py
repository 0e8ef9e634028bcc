#!/usr/bin/env python3
"""Writes SmolLM2-135M-Instruct as a model directory that the converter accepts: a real text model, for results on text.

    python tools/base_model.py smollm2
    python tools/trial_rows.py smollm2 rows.jsonl --list w4a8 --device cuda --text tools/text.md

The weights are those from which the reference VLM was made, in that model's architecture and order of channels; both compute the same. The
vision tower is the reference VLM's, which the language model has never seen, so answers about pictures are meaningless.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import torch
from mbq_gguf.demo.assemble import COPIED, DATA, apply_change, read_language_model, shuffle_channels
from mbq_gguf.demo.base_model import base_gguf


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(out: Path) -> None:
    """Write the model to the folder OUT (290 MB)."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig.from_pretrained(DATA)
    language = read_language_model(base_gguf(), config.text_config)
    visual = apply_change({name: tensor.clone() for name, tensor in language.items()})
    shuffle_channels(language, visual, config.text_config)
    model = Qwen2VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language)
    model.model.visual.load_state_dict(visual)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    for name in COPIED:
        shutil.copyfile(DATA / name, out / name)


if __name__ == "__main__":
    main()
