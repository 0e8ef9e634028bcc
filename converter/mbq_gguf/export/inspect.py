"""Shows what a GGUF file contains and how it was made, as tables for a terminal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mbq_gguf.export.gguf_header import Header, TensorEntry, Value, read_header
from mbq_gguf.export.metadata import PREFIX, RATIO, version_sentences
from mbq_gguf.formats.static_ranges import RANGE, unread
from mbq_gguf.terminal import BARS

LAYER = re.compile(r"\bblk\.(\d{1,6})\.")
LONGEST_TEXT = 60  # characters shown of a value; chat templates are pages long
LONGEST_LIST = 8
LAYERED = {  # prefixes of keys with one number per layer: the table's title, and what the rest of the key names
    RATIO: ("vision over language sensitivity", "output of"),
    RANGE: ("static ranges of activations", "site and class"),
}


def inspect(path: Path) -> RenderableType:
    """Metadata, values per layer, and tensors of the GGUF file ``path``, and first why it will not load or which keys are ignored, if so.

    Raises UserError if it is not a GGUF file, or is damaged.
    """
    header = read_header(path)
    sentences = version_sentences(header.metadata)
    if ignored := unread(header.metadata, header.metadata.get("general.architecture") == "clip"):
        sentences.append(f"ranges that no program reads, so these activations are quantised dynamically: {', '.join(ignored)}")
    tables: list[RenderableType] = [printable(sentence) for sentence in sentences]
    tables.append(metadata_table(header))
    for prefix, (title, column) in LAYERED.items():
        if any(key.startswith(prefix) for key in header.metadata):
            tables.append(layered_table(header, prefix, title, column))
    return Group(*tables, tensor_table(header.tensors), totals_table(header.tensors, path.stat().st_size))


def metadata_table(header: Header) -> Table:
    """Keys and values; those that mbq-gguf wrote (mbq.*) come first."""
    table = _table("metadata", "key", "value")
    keys = [key for key in header.metadata if not key.startswith(tuple(LAYERED))]
    for key in sorted(keys, key=lambda key: not key.startswith(PREFIX)):
        table.add_row(printable(key), Text(format_value(header.metadata[key], header.lengths.get(key))))
    return table


def layered_table(header: Header, prefix: str, title: str, column: str) -> Table:
    """The keys that begin with ``prefix`` and have one number per layer."""
    table = _table(f"{title}, first layer to last", column, "per layer", "lowest", "median", "highest")
    for key in sorted(key for key in header.metadata if key.startswith(prefix)):
        value = header.metadata[key]
        numbers = [float(item) for item in value if isinstance(item, (int, float))] if isinstance(value, list) else []
        if numbers:
            ordered = sorted(numbers)
            picks = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
            table.add_row(printable(key.removeprefix(prefix)), sparkline(numbers), *(f"{pick:.3g}" for pick in picks))
    return table


def tensor_table(tensors: Sequence[TensorEntry]) -> Table:
    """One line for each kind of tensor: those that differ only in the layer's number share a line."""
    kinds: dict[tuple[str, str, tuple[int, ...]], list[TensorEntry]] = defaultdict(list)
    for tensor in tensors:
        kinds[LAYER.sub("blk.*.", tensor.name, count=1), tensor.type_name, tensor.shape].append(tensor)
    table = _table(f"{len(tensors)} tensors", "tensor", "layers", "type", "shape", "bits per weight")
    for (name, type_name, shape), members in kinds.items():
        layers = ranges([int(match.group(1)) for member in members if (match := LAYER.search(member.name))])
        size = " × ".join(str(length) for length in reversed(shape))  # rows first, as in Hugging Face
        table.add_row(printable(name), layers, type_name, size, f"{8 * members[0].nbytes / members[0].elements:.3f}")
    return table


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: "0-3, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def totals_table(tensors: Sequence[TensorEntry], file_size: int) -> Table:
    """One line for each type, and the total."""
    by_type: dict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.type_name].append(tensor)
    table = _table(f"totals (file: {file_size / 1e6:.1f} MB)", "type", "tensors", "weights", "MB", "bits per weight")
    for name, members in [*sorted(by_type.items()), ("all", list(tensors))]:
        weights, size = sum(item.elements for item in members), sum(item.nbytes for item in members)
        bits = f"{8 * size / weights:.3f}" if weights else ""
        table.add_row(name, str(len(members)), f"{weights:,}", f"{size / 1e6:.2f}", bits, style="bold" if name == "all" else None)
    return table


def sparkline(values: Sequence[float]) -> str:
    """One bar for each value, from zero to the greatest; negative and non-finite values show as a dot."""
    finite = [value for value in values if 0 <= value < float("inf")]
    top = max(finite, default=0.0)
    heights = {value: BARS[max(0, ceil(value / top * len(BARS)) - 1)] if top > 0 else BARS[0] for value in finite}
    return "".join(heights.get(value, "·") for value in values)


def format_value(value: Value, length: int | None) -> str:
    """``value`` on one line of limited length. ``length`` is the length of the whole array if ``value`` is only its beginning."""
    if isinstance(value, list):
        text = ", ".join(format_value(item, None) for item in value[:LONGEST_LIST])
        count = len(value) if length is None else length
        return f"[{text}]" if count <= LONGEST_LIST else f"[{text}, … {count} in all]"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    line = printable(text).plain
    return line if len(line) <= LONGEST_TEXT else f"{line[:LONGEST_TEXT]}… ({len(text)} characters)"


def printable(text: str) -> Text:
    """``text`` without control characters, and not interpreted as markup."""
    return Text("".join(character if character.isprintable() else " " for character in text))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        numeric = column in ("bits per weight", "tensors", "weights", "MB", "lowest", "median", "highest")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table
