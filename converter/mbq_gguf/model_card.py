"""The model card, README.md beside GGUF files: how they were made, how large they are, what they lost, and how to run them.

A card is generated from its folder: the files' metadata, and the JSON files there that ``eval --out`` wrote about them. What no file
records (the command) is kept in a comment of the card, which also marks the card as ours. It can be updated after an evaluation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

import mbq_gguf
from mbq_gguf.errors import UsageError
from mbq_gguf.export.anyres_tower import PROJECTOR_TYPE
from mbq_gguf.export.atomic import staged
from mbq_gguf.export.gguf_header import Header, read_header
from mbq_gguf.export.metadata import version_sentences
from mbq_gguf.export.report import megabytes
from mbq_gguf.formats.own import OWN
from mbq_gguf.llama_cpp.pin import read_pin

MARK = re.compile(r"<!-- mbq-gguf card (\{.*\}) -->")
LARGEST = 1 << 28  # bytes; larger JSON files are ignored
SETTINGS = "mbq."  # prefix of the metadata keys that say how a file was made; arrays are left out
OF_TOWER = ("mbq.tower.", "mbq.act.")  # keys of a vision file; the decoder's rotation is recorded in the text file


@dataclass(frozen=True)
class Entry:
    """One file of the card."""

    name: str
    size: str
    bits_per_weight: str
    types: str
    made: dict[str, str]  # command, version and pin, if known
    settings: dict[str, Any]
    mmproj: str | None
    mmproj_size: str
    patched: bool  # whether it needs the patched llama.cpp
    unknown: list[str]  # why even that one will not load the file or its vision file


@dataclass(frozen=True)
class Loss:
    """One row of an evaluation."""

    name: str
    reference: str
    questions: int
    exact_match: float
    agreement: float
    divergence: float
    error: float
    text: float | None


def check_card(out: Path) -> None:
    """Raise UsageError if the folder of ``out`` has a README.md that this module did not write."""
    read_origins(out.parent / "README.md")


def read_origins(card: Path) -> dict[str, dict[str, str]]:
    """How each file of ``card`` was made, as its comment records; {} if there is no card. Raises UsageError for other README files."""
    if not card.exists():
        return {}
    found = MARK.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if found is None:
        raise UsageError(f"{card} was not written by mbq-gguf: move it away, or leave out --card")
    kept = json.loads(found[1])
    return {str(name): dict(made) for name, made in kept.items()}


def write_card(out: Path, command: str | None = None) -> Path:
    """Write or update README.md beside ``out`` and return its path. ``command`` has made ``out`` (None: as recorded, or unknown)."""
    card = out.parent / "README.md"
    made = read_origins(card)
    if command is not None:
        pin = read_pin()
        made[out.name] = {"command": command, "version": mbq_gguf.__version__, "pin": f"{pin.package} {pin.version}"}
    made.setdefault(out.name, {})
    made = {name: facts for name, facts in made.items() if (out.parent / name).is_file()}
    headers = {name: read_header(out.parent / name) for name in made}
    entries = [entry(out.parent / name, headers[name], facts) for name, facts in made.items()]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mbq_gguf", "."), autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.get_template("model_card.md.j2").render(
        front=yaml.safe_dump(front_matter(headers[out.name]), sort_keys=False, allow_unicode=True).strip(),
        title=headers[out.name].metadata.get("general.name") or out.stem,
        source=headers[out.name].metadata.get("general.source.url"),
        entries=entries,
        losses=[loss for name in made for loss in losses(out.parent / name)],
        mark=json.dumps(made).replace(">", "\\u003e"),
    )
    with staged(card) as (part,):
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may be invalid UTF-8
    return card


def front_matter(header: Header) -> dict[str, Any]:
    """The model card's metadata for the hub; base model and licence if the file records them."""
    known = header.metadata
    found: dict[str, Any] = {}
    repository = re.fullmatch(r"https?://[^/]+/([^/]+/[^/]+)", str(known.get("general.source.repo_url", "")))
    if repository:
        found |= {"base_model": repository[1], "base_model_relation": "quantized"}
    for key, name in (("license", "general.license"), ("license_name", "general.license.name"), ("license_link", "general.license.link")):
        if known.get(name):
            found[key] = str(known[name])
    return {**found, "library_name": "gguf", "pipeline_tag": "image-text-to-text", "tags": ["gguf", "mbq-gguf", "llama.cpp", "vision"]}


def entry(path: Path, header: Header, made: dict[str, str]) -> Entry:
    """The card's entry for the GGUF file ``path``."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.nbytes
    bits = 8 * sum(sizes.values()) / max(1, sum(tensor.elements for tensor in header.tensors))
    mmproj = path.with_name(f"mmproj-{path.name}")
    there = mmproj.is_file()
    vision = read_header(mmproj) if there else None
    settings = settings_table(header, SETTINGS)
    if vision:
        settings |= {f"vision file: {key}": value for key, value in settings_table(vision, *OF_TOWER).items()}
    return Entry(
        name=path.name,
        size=megabytes(path.stat().st_size),
        bits_per_weight=f"{bits:.2f}",
        types=", ".join(sorted(sizes, key=lambda name: -sizes[name])),
        made=made,
        settings=settings,
        mmproj=mmproj.name if there else None,
        mmproj_size=megabytes(mmproj.stat().st_size) if there else "",
        patched=bool(OWN.keys() & sizes.keys())
        or "mbq.hadamard.ffn_down" in header.metadata
        or (vision is not None and needs_patched_tiling(vision)),
        unknown=[
            f"{name}: {table_cell(sentence)}"
            for name, found in ((path.name, header), (mmproj.name, vision))
            if found
            for sentence in version_sentences(found.metadata)
        ],
    )


def settings_table(header: Header, *beginnings: str) -> dict[str, str]:
    """The values of keys with these prefixes, without arrays."""
    found = {key.removeprefix(SETTINGS): value for key, value in header.metadata.items() if key.startswith(beginnings)}
    return {key: table_cell(value) for key, value in sorted(found.items()) if not isinstance(value, list)}


def needs_patched_tiling(vision: Header) -> bool:
    """Whether the vision file needs a tiling of pictures that only the patched llama.cpp has."""
    return vision.metadata.get("clip.projector_type") == PROJECTOR_TYPE


def table_cell(value: object) -> str:
    """A metadata value as a table cell."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def losses(file: Path) -> list[Loss]:
    """Results for ``file`` from JSON files of ``eval --out`` in its folder, matched by name and size."""
    found = []
    for path in sorted(file.parent.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < LARGEST else {}
            reference, *others = document["files"]
            for result in [
                other for other in others if (Path(other["path"]).name, other["file_bytes"]) == (file.name, file.stat().st_size)
            ]:
                summary = result["summary"]
                spread, text = summary["divergence"], result["text"]
                found.append(
                    Loss(
                        name=file.name,
                        reference=Path(reference["path"]).name,
                        questions=len(document["questions"]),
                        exact_match=float(summary["exact_match"]),
                        agreement=float(summary["agreement"]),
                        divergence=float(spread["mean"]),
                        error=float(spread["error"]),
                        text=float(text["divergence"]["mean"]) if text else None,
                    )
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not an evaluation
    return found
