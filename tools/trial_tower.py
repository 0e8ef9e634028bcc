#!/usr/bin/env python3
"""Measures how a vision tower in 8 and 4 bits changes a VLM's answers: one language model, one vision file per row, compared with F16.

    python tools/trial_tower.py MODEL_DIR FOLDER --questions 51 --side 224 --side 308
    python tools/trial_tower.py MODEL_DIR FOLDER --data photographs.jsonl

Missing vision files are made in FOLDER. Every row answers through libllama and libmtmd; divergence is from the BF16 language model with the
F16 tower, in nats per token of the answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from mbq_cbind.model import Model
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions, stratified
from mbq_gguf.evaluate.kld import Store
from mbq_gguf.evaluate.measure import Evaluator
from mbq_gguf.evaluate.results import spread
from mbq_gguf.llama_cpp.bindings import bind
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One vision file."""

    type: str
    rounding: str = "gptq"
    rotate: bool = False
    static: bool = False  # ranges of activations

    def __str__(self) -> str:
        rounding = () if self.type in ("F16", "Q8_0") else (self.rounding,)
        return ", ".join((self.type, *rounding, *(["rotated"] if self.rotate else []), *(["static"] if self.static else [])))


ROWS = (
    Row("F16"),
    Row("F16", rotate=True),
    Row("Q8_0"),
    *(
        Row(kind, rounding, rotate, static)
        for kind in ("W8A8", "W4A8")
        for rounding, static in (("nearest", False), ("gptq", False), ("gptq", True))
        for rotate in (False, True)
    ),
)


def options_of(model_dir: Path, folder: Path, row: Row, samples: int) -> ConvertOptions:
    """How the vision file of ``row`` is made; the language model beside it is BF16."""
    int8 = row.type in ("W8A8", "W4A8")
    out = folder / f"{row.type}-{row.rounding}{'-rotated' if row.rotate else ''}{'-static' if row.static else ''}.gguf"
    return ConvertOptions(
        model_dir,
        out,
        type="BF16",
        mmproj_type=row.type,
        rounding=row.rounding,
        rotate_tower=row.rotate,
        mmproj_activations=("static" if row.static else "dynamic") if int8 else None,
        samples=samples,
    )


def made(options: ConvertOptions) -> Path:
    """The vision file of these options, if need be converted."""
    if not options.mmproj.is_file():
        convert(options, Console(stderr=True))
        if options.out.name != "F16-gptq.gguf":
            options.out.unlink()
    return options.mmproj


def limited(mmproj: Path, side: int | None, folder: Path) -> Path:
    """The vision file, or a copy with which every picture is resized to about ``side`` by ``side`` pixels, keeping its shape."""
    if side is None:
        return mmproj
    data = bytearray(mmproj.read_bytes())
    for key in (b"clip.vision.image_min_pixels", b"clip.vision.image_max_pixels"):
        place = data.index(key) + len(key) + 4  # the key is followed by the value's type and its four bytes
        data[place : place + 4] = (side * side).to_bytes(4, "little")
    copy = folder / mmproj.name
    copy.write_bytes(data)
    return copy


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--questions", "count", type=int, default=51)
@click.option("--data", type=click.Path(dir_okay=False, path_type=Path), default=SHIPPED)
@click.option(
    "--side",
    "sides",
    type=int,
    multiple=True,
    help="Resize pictures to as many pixels as a square of this side (default: the model's limits).",
)
@click.option("--samples", type=int, default=48, help="Calibration pictures.")
@click.option("--only", multiple=True, help="Only rows whose name contains this (F16 always).")
@click.option("--threads", type=int, default=2)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Append each row to this file as a line of JSON.")
def main(
    model_dir: Path,
    folder: Path,
    count: int,
    data: Path,
    sides: tuple[int, ...],
    samples: int,
    only: tuple[str, ...],
    threads: int,
    out: Path | None,
) -> None:
    """Make the vision files of MODEL_DIR in FOLDER and evaluate them."""
    folder.mkdir(parents=True, exist_ok=True)
    bind()
    rows = [row for row in ROWS if row == ROWS[0] or not only or any(part in str(row) for part in only)]
    files = {row: made(options_of(model_dir, folder, row, samples)) for row in rows}
    text = folder / "F16-gptq.gguf"
    table = Table("row", "side", "exact match", "divergence", "+-", "top-1", "MB", "change of the embeddings")
    for side in sides or (None,):
        questions = stratified(load_questions(data), count)
        with TemporaryDirectory() as scratch:
            examiner = Evaluator(questions, None, Store(Path(scratch)))
            plain: list[np.ndarray] = []
            for number, (row, mmproj) in enumerate(files.items()):
                examiner.pictures = str(number)
                with Model(text, limited(mmproj, side, Path(scratch)), threads=threads, context=2048) as model:
                    answers = examiner.answers(model, lambda: None)
                    seen = [np.concatenate(model.vision.encode(path).embeddings) for path in dict.fromkeys(q.image for q in questions)]
                plain = plain or seen
                moved = float(
                    np.sqrt(sum(np.square(a - b).sum() for a, b in zip(seen, plain, strict=True)) / sum(np.square(a).sum() for a in plain))
                )
                divergence = spread(answer.divergence for answer in answers)
                exact = float(np.mean([answer.right for answer in answers]))
                agrees = float(np.mean([same for answer in answers for same in answer.agrees]))
                figures = {"exact": exact, "divergence": divergence.mean, "error": divergence.error, "top1": agrees, "moved": moved}
                table.add_row(
                    str(row), str(side or "own"), f"{exact:.3f}", f"{divergence.mean:.5f}", f"{divergence.error:.5f}", f"{agrees:.4f}",
                    f"{mmproj.stat().st_size / 1e6:.1f}", f"{moved:.4f}",
                )  # fmt: skip
                print(row, side, figures, flush=True)
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps({"row": str(row), "side": side, "questions": len(questions), **figures}) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
