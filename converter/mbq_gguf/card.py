"""README.md beside GGUF files: how they were made, how large they are, what they lost, and how to run them.

A card is made from what lies in its folder: the files' own metadata, and every JSON file there that ``eval --out`` wrote about them. What
no file knows (the command) is kept in a comment of the card, which also marks it as ours: made again after an evaluation, it says more.
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
LARGEST = 1 << 28  # bytes of a JSON file that is looked into
SETTINGS = "mbq."  # metadata keys that say how a file was made; arrays are left out
OF_TOWER = ("mbq.tower.", "mbq.act.")  # those of a vision file; what a rotation of the decoder changed in it stands in the other


@dataclass(frozen=True)
class Entry:
    """One file of the card."""

    name: str
    size: str
    bits_per_weight: str
    types: str
    made: dict[str, str]  # command, version and pin, where they are known
    settings: dict[str, Any]
    mmproj: str | None
    mmproj_size: str
    patched: bool  # whether it needs the patched llama.cpp
    unknown: list[str]  # why that one will not load it, or its vision file


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
    """Raise UsageError where the folder of ``out`` has a README.md that this module did not write."""
    made_before(out.parent / "README.md")


def made_before(card: Path) -> dict[str, dict[str, str]]:
    """What the card says of the making of each of its files; {} where there is none. Raises UsageError where it is another's."""
    if not card.exists():
        return {}
    found = MARK.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if found is None:
        raise UsageError(f"{card} was not written by mbq-gguf: move it away, or do without a card")
    kept = json.loads(found[1])
    return {str(name): dict(made) for name, made in kept.items()}


def write_card(out: Path, command: str | None = None) -> Path:
    """Write or renew README.md beside ``out``, which ``command`` has made (None: it is known, or nobody knows); returns its path."""
    card = out.parent / "README.md"
    made = made_before(card)
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
    text = environment.get_template("card.md.j2").render(
        front=yaml.safe_dump(front_matter(headers[out.name]), sort_keys=False, allow_unicode=True).strip(),
        title=headers[out.name].metadata.get("general.name") or out.stem,
        source=headers[out.name].metadata.get("general.source.url"),
        entries=entries,
        losses=[loss for name in made for loss in losses(out.parent / name)],
        mark=json.dumps(made).replace(">", "\\u003e"),
    )
    with staged(card) as (part,):
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file's name may be no UTF-8
    return card


def front_matter(header: Header) -> dict[str, Any]:
    """What the hub reads of a model card; base model and licence where the file knows them."""
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
    """What the card says of the GGUF file ``path``."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.nbytes
    bits = 8 * sum(sizes.values()) / max(1, sum(tensor.elements for tensor in header.tensors))
    mmproj = path.with_name(f"mmproj-{path.name}")
    there = mmproj.is_file()
    vision = read_header(mmproj) if there else None
    settings = settings_of(header, SETTINGS)
    if vision:
        settings |= {f"vision file: {key}": value for key, value in settings_of(vision, *OF_TOWER).items()}
    return Entry(
        name=path.name,
        size=megabytes(path.stat().st_size),
        bits_per_weight=f"{bits:.2f}",
        types=", ".join(sorted(sizes, key=lambda name: -sizes[name])),
        made=made,
        settings=settings,
        mmproj=mmproj.name if there else None,
        mmproj_size=megabytes(mmproj.stat().st_size) if there else "",
        patched=bool(OWN.keys() & sizes.keys()) or "mbq.hadamard.ffn_down" in header.metadata or (vision is not None and cut_by_us(vision)),
        unknown=[
            f"{name}: {shown(sentence)}"
            for name, found in ((path.name, header), (mmproj.name, vision))
            if found
            for sentence in version_sentences(found.metadata)
        ],
    )


def settings_of(header: Header, *beginnings: str) -> dict[str, str]:
    """What the keys with these beginnings say, arrays left out."""
    found = {key.removeprefix(SETTINGS): value for key, value in header.metadata.items() if key.startswith(beginnings)}
    return {key: shown(value) for key, value in sorted(found.items()) if not isinstance(value, list)}


def cut_by_us(vision: Header) -> bool:
    """Whether the pictures of a vision file are cut as only the patched llama.cpp does it."""
    return vision.metadata.get("clip.projector_type") == PROJECTOR_TYPE


def shown(value: object) -> str:
    """A value of the metadata in a table."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def losses(file: Path) -> list[Loss]:
    """What evaluations beside ``file`` say of it: JSON files of ``eval --out`` that compare a file of this name and size."""
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
            continue  # some other JSON
    return found
