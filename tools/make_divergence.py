"""Remake the divergence table of docs/results.md: how far each file moves from BF16 on drawn scenes, photographs and plain text.

    python tools/make_results.py                        # makes BF16.gguf and ours, asks them through llama-server
    python tools/make_divergence.py MBQ3 Q4_0 Q4_0+imatrix

A name is a file in the same folder, or a type that llama-quantize makes of BF16.gguf, with ``+imatrix`` by the importance matrix that
``mbq-gguf imatrix`` computes. Runs ``mbq-gguf eval`` on the demo's questions with README.md as text, and on the photographs of
photographs.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import click
from make_results import BEGIN, END, PAGE, machine, run_measured, table
from mbq_gguf.errors import UserError
from mbq_gguf.evaluate.classes import COLOURS_POSITIONS, DIGITS, WORDS
from mbq_gguf.llama_cpp.cache import cache_root

ROOT = Path(__file__).parents[1]
STORE = ROOT / "docs" / "results" / "divergence.json"
MARKS = BEGIN.replace("quality", "divergence").replace("make_results", "make_divergence"), END.replace("quality", "divergence")
CLASSES = (WORDS, DIGITS, COLOURS_POSITIONS)
Summary = dict[str, Any]


def measure(files: list[Path], mmproj: Path, draft: Path, *more: str) -> list[Summary]:
    """One summary a file of what ``mbq-gguf eval`` finds. Raises UserError where it fails."""
    command = [sys.executable, "-m", "mbq_gguf", "eval", *map(str, files), "--mmproj", str(mmproj), "--out", str(draft), *more]
    if subprocess.run(command, check=False).returncode:
        raise UserError("`mbq-gguf eval` failed: its own words are above")
    kept = ("name", "file_bytes", "bits_per_weight", "layer_bits_per_weight", "seconds")
    return [
        {key: file[key] for key in kept} | {"text": file["text"]} | file["summary"]
        for file in json.loads(draft.read_text(encoding="utf-8"))["files"]
    ]


def made(name: str, folder: Path) -> Path:
    """The file called ``name`` in ``folder``, made by llama-quantize where it is missing."""
    path = folder / f"{name}.gguf"
    if not path.is_file():
        kind, _, with_imatrix = name.partition("+")
        matrix = folder / "imatrix.gguf"
        if with_imatrix and not matrix.is_file():
            run_measured(["mbq-gguf", "imatrix", str(folder / "reference-vlm"), str(matrix)], matrix.with_suffix(".log"))
        options = ["--imatrix", str(matrix)] if with_imatrix else []
        run_measured(["llama-quantize", *options, str(folder / "BF16.gguf"), str(path), kind, "2"], path.with_suffix(".log"))
    return path


def row(scenes: Summary, photographs: Summary) -> list[str]:
    """One line of the table."""
    divergence = scenes["divergence"]
    by_class = [f"{scenes['divergence_by_class'][name]['mean']:.4f}" if name in scenes["divergence_by_class"] else "" for name in CLASSES]
    return [
        scenes["name"].removesuffix(".gguf"),
        f"{scenes['file_bytes'] / 1e6:.1f}",
        f"{scenes['layer_bits_per_weight']:.2f}",
        f"{scenes['exact_match']:.3f}",
        f"{divergence['mean']:.4f} ± {divergence['error']:.4f}",
        f"{divergence['median']:.1e}",
        f"{divergence['p99']:.3f}",
        *by_class,
        f"{scenes['agreement']:.4f}",
        f"{photographs['divergence']['mean']:.3f} ± {photographs['divergence']['error']:.3f}",
        f"{scenes['text']['divergence']['mean']:.3f}",
    ]


def render(found: Summary) -> str:
    """The section between the markers."""
    head = ["file", "MB", "bits a weight, layers", "exact match", "KLD", "median", "99 %", *CLASSES, "same top-1"]
    rows = [row(*pair) for pair in zip(found["scenes"], found["photographs"], strict=True)]
    return "\n".join(
        [
            f"Measured on {found['machine']}, {found['date']}, with `{found['command']}`: {found['questions']} questions about scenes,",
            f"{found['photograph_questions']} about photographs, {found['text_tokens']} tokens of text. KL divergence from BF16 in nats, "
            "mean ± standard error over answer tokens.",
            "",
            table([*head, "KLD, photographs", "KLD, text"], rows),
        ]
    )


def write_page(text: str) -> None:
    """Put ``text`` between the markers of docs/results.md; raises UserError where they are missing."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise UserError(f"{PAGE} has lost its markers: put `{MARKS[0]}` and `{MARKS[1]}` back where the table goes")
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--questions", type=click.IntRange(min=1), default=306, show_default=True, help="Questions about scenes, all tasks alike.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the GGUF files (default: the user cache).")
def main(names: tuple[str, ...], questions: int, out: Path | None) -> None:
    """Compare the files or stock types NAMES with BF16.gguf, in the folder that make_results.py fills."""
    folder = (out or cache_root() / "results").resolve()
    mmproj, draft, pictures = folder / "mmproj-BF16.gguf", folder / "divergence.tmp", folder / "photographs"
    try:
        files = [made(name, folder) for name in ("BF16", *names)]
        subprocess.run([sys.executable, str(Path(__file__).with_name("photographs.py")), str(pictures)], check=True)
        scenes = measure(files, mmproj, draft, "--questions", str(questions), "--text", str(ROOT / "README.md"))
        photographs = measure(files, mmproj, draft, "--data", str(pictures / "photographs.jsonl"))
        found = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "command": f"python tools/make_divergence.py --questions {questions} {' '.join(names)}",
            "questions": questions,
            "photograph_questions": len((pictures / "photographs.jsonl").read_text().splitlines()) * 3,
            "text_tokens": scenes[0]["text"]["divergence"]["tokens"],
            "scenes": scenes,
            "photographs": photographs,
        }
        STORE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_page(render(found))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
