"""Updates the table of docs/results.md on a model whose every row suits all types: the reference VLM widened by widen.py.

    python tools/make_results.py --only BF16   # assembles the reference VLM
    python tools/make_wide.py

Existing files are not made again, and finished rows are not measured again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
from make_divergence import FIGURES, ROOT, Pair, compare, figures, stock, write_page
from make_results import commit, machine, run_measured, table
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.cache import cache_root
from variants import REFERENCE, WIDE, Variant

STORE = ROOT / "docs" / "results" / "wide.json"
STOCK = ("Q3_K_S", "Q3_K_S+imatrix", "IQ3_S+imatrix", "IQ4_XS+imatrix", "Q4_0", "Q4_0+imatrix", "Q4_K_S+imatrix")
# As in our files, so that only the layers differ.
ENDS = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")


@dataclass(frozen=True)
class Making:
    """How a file of ours was made."""

    command: str
    commit: str
    date: str
    seconds: float  # of processor time
    peak_bytes: int


def make(variant: Variant, folder: Path, model: Path) -> None:
    """Make the file of ``variant`` if it is missing, and record how."""
    path = folder / variant.file_name
    if path.is_file():
        return
    command = variant.command(folder, model)
    click.echo(shlex.join(command))
    found = run_measured(command, path.with_suffix(".log"))
    shown = shlex.join(command).replace(f"{folder}/", "").replace(str(model), model.name)
    making = Making(shown, commit(), date.today().isoformat(), found.seconds, found.peak_bytes)
    path.with_suffix(".making.json").write_text(json.dumps(asdict(making)), encoding="utf-8")


def line(name: str, pair: Pair) -> list[str]:
    """A line of the table."""
    making = pair.get("making")
    made = [f"{making['seconds']:.0f}", f"{making['peak_bytes'] / 1e9:.2f}"] if making else ["", ""]
    shown = f"{name} by mbq-gguf" if making and name != REFERENCE else name
    return [shown, f"{pair['scenes']['file_bytes'] / 1e6:.1f}", *figures(pair), *made]


def render(found: dict[str, Any]) -> str:
    """The section between the markers."""
    rows = found["rows"]
    order = [name for name in (*(variant.name for variant in WIDE), *STOCK) if name in rows]
    return "\n".join(
        [
            f"Measured on {found['machine']}, {found['date']}, with `python tools/make_wide.py`:",
            f"{found['questions']} questions about scenes, the photographs and the text of the tables above. `+imatrix` is llama-quantize",
            "with the matrix of `mbq-gguf imatrix`; embeddings and output head are Q8_0 in all.",
            "",
            table(["file", "MB", *FIGURES, "CPU seconds", "peak GB"], [line(name, rows[name]) for name in order]),
        ]
    )


@click.command()
@click.option(
    "--questions", type=click.IntRange(min=1), default=102, show_default=True, help="Questions about scenes, the same number for each task."
)
@click.option("--only", multiple=True, type=click.Choice([v.name for v in WIDE]), help="Only make this file, without comparing.")
def main(questions: int, only: tuple[str, ...]) -> None:
    """Widen the reference VLM, convert it every way, compare the files with BF16."""
    folder = cache_root() / "wide"
    model, reference = folder / "wide-vlm", cache_root() / "results" / "reference-vlm"
    try:
        if not model.is_dir():
            subprocess.run([sys.executable, str(Path(__file__).with_name("widen.py")), str(reference), str(model)], check=True)
        for variant in WIDE:
            if not only or variant.name in only:
                make(variant, folder, model)
        if only:
            return
        found = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}
        rows: dict[str, Pair] = found["rows"] if found.get("questions") == questions else {}
        files = {variant.name: folder / variant.file_name for variant in WIDE if variant.name != REFERENCE}
        files |= {name: stock(name, folder, model, *ENDS) for name in STOCK}
        missing = {name: path for name, path in files.items() if name not in rows}
        if missing:
            for name, pair in compare(missing, folder, questions).items():
                making = (folder / name).with_suffix(".making.json")
                rows[name] = pair | ({"making": json.loads(making.read_text(encoding="utf-8"))} if making.is_file() else {})
            found = {"machine": machine(), "date": date.today().isoformat(), "questions": questions, "rows": rows}
            STORE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_page("wide", render(found), "make_wide")
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
