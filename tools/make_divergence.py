"""Updates the divergence tables of docs/results.md: how far each file is from BF16 on generated scenes, photographs and plain text.

    python tools/make_results.py                        # makes BF16.gguf and ours, asks them through llama-server
    python tools/make_divergence.py                     # compares every existing file without an up-to-date row
    python tools/make_divergence.py MBQ3 Q4_0+imatrix   # compares these

A name is one of variants.py, or a type that llama-quantize makes from BF16.gguf, with ``+imatrix`` by the importance matrix that ``mbq-gguf
imatrix`` computes. Runs ``mbq-gguf eval`` on the demo's questions, with text.md as text (an old version of the README, so that it does not
change), and on the photographs of photographs.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import click
from make_results import BEGIN, END, PAGE, TABLE, Row, load_rows, machine, run_measured, table
from mbq_gguf.errors import UserError
from mbq_gguf.evaluate.classes import COLOURS_POSITIONS, DIGITS, WORDS
from mbq_gguf.llama_cpp.cache import cache_root
from photographs import QUESTIONS
from variants import REFERENCE, STEPS, THREADS, VARIANTS

ROOT = Path(__file__).parents[1]
STORE = ROOT / "docs" / "results" / "divergence.json"
TEXT = Path(__file__).with_name("text.md")
STOCK = tuple(
    f"{kind}{how}" for kind in ("Q3_K_M", "IQ3_S", "IQ4_XS", "Q4_0", "Q4_K_M") for how in ("", "+imatrix") if (kind, how) != ("IQ3_S", "")
)
CLASSES = (WORDS, DIGITS, COLOURS_POSITIONS)
Summary = dict[str, Any]  # of one file on one set of questions
Pair = dict[str, Any]  # the summaries of one file on "scenes" and "photographs"


def measure(files: list[Path], mmproj: Path, draft: Path, *more: str) -> list[Summary]:
    """One summary for each file, from ``mbq-gguf eval``. Raises UserError if it fails."""
    command = [sys.executable, "-m", "mbq_gguf", "eval", *map(str, files), "--mmproj", str(mmproj), "--out", str(draft), *more]
    if subprocess.run(command, check=False).returncode:
        raise UserError("`mbq-gguf eval` failed: do what its own words above say")
    kept = ("file_bytes", "bits_per_weight", "layer_bits_per_weight", "seconds")
    return [
        {key: file[key] for key in kept} | {"text": file["text"]} | file["summary"]
        for file in json.loads(draft.read_text(encoding="utf-8"))["files"]
    ]


def stock(name: str, folder: Path, model: Path, *options: str) -> Path:
    """The file ``TYPE`` or ``TYPE+imatrix``, made by llama-quantize from BF16.gguf if it is missing."""
    path = folder / f"{name}.gguf"
    if not path.is_file():
        kind, _, with_imatrix = name.partition("+")
        matrix = folder / "imatrix.gguf"
        if with_imatrix and not matrix.is_file():
            run_measured(["mbq-gguf", "imatrix", str(model), str(matrix), "--samples", "128"], matrix.with_suffix(".log"))
        options = (*options, "--imatrix", str(matrix)) if with_imatrix else options
        command = ["llama-quantize", *options, str(folder / f"{REFERENCE}.gguf"), str(path), kind, str(THREADS)]
        run_measured(command, path.with_suffix(".log"))
    return path


def made(name: str, folder: Path) -> Path:
    """The file called ``name``: one of variants.py, or a stock type."""
    for variant in VARIANTS:
        if variant.name == name:
            return folder / variant.file_name
    return stock(name, folder, folder / "reference-vlm")


def stale(folder: Path, rows: dict[str, Pair]) -> list[str]:
    """The files of variants.py whose size or commit differs from their row, and the stock types without one."""
    finished = load_rows(TABLE)
    there = [v.name for v in VARIANTS if v.name in finished and v.name != REFERENCE and (folder / v.file_name).is_file()]
    fresh = {name for name in there if name in rows and rows[name]["made"] == made_at(finished[name])}
    return [name for name in there if name not in fresh] + [name for name in STOCK if name not in rows]


def made_at(row: Row) -> list[str]:
    """Identifies when a file was made."""
    return [row.commit, row.date, f"{row.seconds:.2f}"]


def figures(pair: Pair) -> list[str]:
    """The columns that both tables have."""
    divergence, photographs = pair["scenes"]["divergence"], pair["photographs"]["divergence"]
    return [
        f"{pair['scenes']['layer_bits_per_weight']:.2f}",
        f"{pair['scenes']['exact_match']:.3f}",
        f"{divergence['mean']:.4f} ± {divergence['error']:.4f}",
        f"{divergence['median']:.1e}",
        f"{divergence['p99']:.3f}",
        f"{photographs['mean']:.3f} ± {photographs['error']:.3f}",
        f"{pair['scenes']['text']['divergence']['mean']:.3f}",
    ]


FIGURES = ["bits per weight, layers", "exact match", "KLD", "median", "99 %", "KLD, photographs", "KLD, text"]


def file_line(name: str, pair: Pair) -> list[str]:
    """A line of the table of files."""
    by_class = pair["scenes"]["divergence_by_class"]
    classes = [f"{by_class[one]['mean']:.4f}" if one in by_class else "" for one in CLASSES]
    return [name, f"{pair['scenes']['file_bytes'] / 1e6:.1f}", *figures(pair), *classes, f"{pair['scenes']['agreement']:.4f}"]


def step_line(name: str, pair: Pair, row: Row) -> list[str]:
    """A line of the table of steps."""
    return [f"`--type {name}`", *figures(pair), f"{row.seconds:.0f}", f"{row.peak_bytes / 1e9:.2f}", row.commit]


def render_files(found: Summary) -> str:
    """The table of files: ours beside llama-quantize's."""
    steps = {variant.name for variant in STEPS}
    order = [variant.name for variant in VARIANTS if variant.program == "convert"] + list(STOCK)
    lines = [file_line(name, found["rows"][name]) for name in order if name in found["rows"] and name not in steps]
    dates = ", ".join(sorted({row["date"] for row in found["rows"].values()}))
    return "\n".join(
        [
            f"Measured on {found['machine']}, {dates}, with `python tools/make_divergence.py`:",
            f"{found['questions']} questions about scenes,",
            f"{found['photograph_questions']} about photographs, {found['text_tokens']} tokens of text. KL divergence from BF16 in nats, "
            "mean ± standard error over answer tokens.",
            "",
            table(["file", "MB", *FIGURES, *CLASSES, "same top-1"], lines),
        ]
    )


def render_steps(found: Summary) -> str:
    """The table of steps: the default with one thing changed."""
    finished = load_rows(TABLE)
    names = [name for name in ("MBQ3", "MBQ3S", *(variant.name for variant in STEPS)) if name in found["rows"] and name in finished]
    lines = [step_line(name, found["rows"][name], finished[name]) for name in names]
    return table(["`mbq-gguf convert reference-vlm out.gguf` with", *FIGURES, "CPU seconds", "peak GB", "commit"], lines)


def write_page(which: str, text: str, tool: str = "make_divergence") -> None:
    """Put ``text`` between the markers of docs/results.md; raises UserError if they are missing."""
    marks = BEGIN.replace("quality", which).replace("make_results", tool), END.replace("quality", which)
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise UserError(f"{PAGE} has lost its markers: put `{marks[0]}` and `{marks[1]}` back where the table goes")
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def compare(files: dict[str, Path], folder: Path, questions: int) -> dict[str, Pair]:
    """The results of ``mbq-gguf eval`` for ``files`` by name, and for BF16.gguf in ``folder``, the reference."""
    mmproj, draft, pictures = folder / f"mmproj-{REFERENCE}.gguf", folder / "divergence.tmp", folder / "photographs"
    names, paths = [REFERENCE, *files], [folder / f"{REFERENCE}.gguf", *files.values()]
    subprocess.run([sys.executable, str(Path(__file__).with_name("photographs.py")), str(pictures)], check=True)
    scenes = measure(paths, mmproj, draft, "--questions", str(questions), "--text", str(TEXT))
    photographs = measure(paths, mmproj, draft, "--data", str(pictures / "photographs.jsonl"))
    return {name: {"scenes": a, "photographs": b} for name, a, b in zip(names, scenes, photographs, strict=True)}


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--questions", type=click.IntRange(min=1), default=204, show_default=True, help="Questions about scenes, the same number for each task."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the GGUF files (default: the user cache).")
def main(names: tuple[str, ...], questions: int, out: Path | None) -> None:
    """Compare the files NAMES (default: all whose row is missing or outdated) with BF16.gguf, in the folder that make_results.py fills."""
    folder = (out or cache_root() / "results").resolve()
    try:
        before = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}
        rows = before["rows"] if before.get("questions") == questions else {}
        wanted = list(names) or stale(folder, rows)
        if wanted:
            finished = load_rows(TABLE)
            for name, pair in compare({name: made(name, folder) for name in wanted}, folder, questions).items():
                rows[name] = pair | {"made": made_at(finished[name]) if name in finished else [], "date": date.today().isoformat()}
        found = {
            "machine": machine(),
            "questions": questions,
            "photograph_questions": len((folder / "photographs" / "photographs.jsonl").read_text().splitlines()) * len(QUESTIONS),
            "text_tokens": rows[REFERENCE]["scenes"]["text"]["divergence"]["tokens"],
            "rows": rows,
        }
        STORE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_page("divergence", render_files(found))
        write_page("steps", render_steps(found))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
