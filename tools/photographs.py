"""Writes photographs unlike anything that the reference VLM has seen, with free questions: a set for ``mbq-gguf eval --data``.

    python tools/photographs.py FOLDER
    mbq-gguf eval bf16.gguf out.gguf --mmproj M --data FOLDER/photographs.jsonl --text README.md

The pictures come with scikit-image. There are no expected answers: each file is forced along the reference's own answers, which measures
how far a file is from its original on data that no calibration set covers.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from PIL import Image

PICTURES = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "horse", "moon", "page", "text", "rocket")
QUESTIONS = ("Describe this image.", "What is the main color of this picture?", "How many objects are there?")
LONGEST = 320  # pixels at the longer side: some 130 vision tokens of the reference VLM


def shipped() -> Path:
    """The folder of scikit-image's pictures."""
    import skimage

    return Path(skimage.__file__).parent / "data"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write the pictures, scaled down, and photographs.jsonl to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in PICTURES:
        (source,) = shipped().glob(f"{name}.*")
        with Image.open(source) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((LONGEST, LONGEST))
        picture.save(folder / f"{name}.png")
        turns = [{"question": question, "task": "photograph"} for question in QUESTIONS]
        lines.append(json.dumps({"image": f"{name}.png", "turns": turns}))
    (folder / "photographs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    click.echo(folder / "photographs.jsonl")


if __name__ == "__main__":
    main()
