"""The report of a conversion for a terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mbq_gguf.export.injection import TensorRecord
from mbq_gguf.formats.grid import grid_of
from mbq_gguf.formats.own import OWN
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.formats.static_ranges import RANGE
from mbq_gguf.formats.stock import UNQUANTISED

SINKS = {"positions": "mbq.act.sink.positions", "tokens": "mbq.act.sink.tokens"}


@dataclass(frozen=True)
class ConvertReport:
    """The two files of a conversion. Sizes are in bytes, times in seconds by stage."""

    out: Path
    mmproj: Path | None  # None: only the language model
    tensors: Sequence[TensorRecord]
    mmproj_tensors: Sequence[TensorRecord]
    size_before: int  # the checkpoint's safetensors
    fallbacks: Sequence[str]  # notes, such as one sentence for each type that a row length ruled out
    seconds: Mapping[str, float] = field(default_factory=dict)
    allocation: RenderableType | None = None  # the types by kind of tensor, if they were allocated
    calibration: str = ""  # a sentence that says how many samples were used

    @property
    def size_after(self) -> int:
        """Bytes of both files together."""
        return self.out.stat().st_size + (self.mmproj.stat().st_size if self.mmproj else 0)

    def render(self) -> RenderableType:
        """Tensors by type, sizes, times and fallbacks."""
        parts: list[RenderableType] = [type_table(self)]
        parts += [self.allocation] if self.allocation else []
        parts += [Text(f"note: {sentence}", style="yellow") for sentence in self.fallbacks]
        parts += [Text(self.calibration)] if self.calibration else []
        before, after = self.size_before, self.size_after
        change = f"{before / after:.2f} times smaller" if after <= before else f"{after / before:.2f} times larger"
        parts.append(Text(f"{megabytes(before)} before, {megabytes(after)} after: {change}"))
        if self.seconds:
            parts.append(Text(", ".join(f"{stage} {duration(time)}" for stage, time in self.seconds.items())))
        return Group(*parts)


def type_table(report: ConvertReport) -> Table:
    """One line per file, and one per file and type."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    table.add_column("type")
    for column in ("tensors", "weights", "size", "bits per weight"):
        table.add_column(column, justify="right")
    for path, records in ((report.out, report.tensors), (report.mmproj, report.mmproj_tensors)):
        if path is None:
            continue
        by_type: dict[str, list[TensorRecord]] = defaultdict(list)
        for record in records:
            by_type[record.type_name].append(record)
        table.add_row(Text(path.name), "", *_sums(records), style="bold")
        for name, members in sorted(by_type.items()):
            table.add_row("", name, *_sums(members))
        table.add_section()
    return table


def fallback_sentences(wanted: str, quantised: Mapping[str, tuple[str, int]], records: Sequence[TensorRecord]) -> list[str]:
    """One sentence for each fallback type, with the row length that ruled out the requested one.

    ``quantised`` maps tensor names to (type, columns), for the requested type ``wanted``; ``records`` have their own requested types.
    """
    counts: dict[tuple[str, str, int], int] = defaultdict(int)
    for name, columns in quantised.values():
        if name != wanted:
            counts[wanted, name, columns] += 1
    for record in records:
        if record.wanted is not None:
            counts[record.wanted, record.type_name, record.shape[-1]] += 1
    return [
        f"{count} tensor{'s' if count > 1 else ''} with rows of {columns} weights: stored as {name}, since no block of {asked} fits"
        for (asked, name, columns), count in counts.items()
    ]


def nearest_sentences(quantised: Iterable[str]) -> list[str]:
    """One sentence for each type among ``quantised`` (one name per tensor) that has no grid for GPTQ."""
    counts = Counter(name for name in quantised if name not in UNQUANTISED and grid_of(quant_type(name)) is None)
    return [
        f"{count} tensor{'s' if count > 1 else ''} in {name}: rounded to nearest, since GPTQ supports only types with evenly spaced values"
        for name, count in counts.items()
    ]


def transform_sentences(quantised: Iterable[str]) -> list[str]:
    """A warning for a file with an online transform if its types (one name per tensor) let every llama.cpp load it."""
    if any(name in OWN for name in quantised):
        return []
    return [
        "only mbq-gguf's llama.cpp computes the transform of --rotate full: others load this file and produce nonsense"
        " (--rotate offline works everywhere)"
    ]


def static_sentences(keys: Mapping[str, Any]) -> list[str]:
    """Says which rows are dynamic in a file with static scales, from its metadata ``keys``."""
    if "mbq.act.version" not in keys:
        return []
    sinks = [f"{name} {', '.join(map(str, keys[key]))}" for name, key in SINKS.items() if keys[key]]
    return [f"static activation scales ({keys['mbq.act.estimator']}), dynamic at {' and '.join(sinks) or 'no token: no sink was found'}"]


def tower_sentences(keys: Mapping[str, Any]) -> list[str]:
    """The same for a vision file."""
    if "mbq.act.version" not in keys:
        return []
    ranges = [value for key, values in keys.items() if key.startswith(RANGE) for value in values]
    dynamic = f", {ranges.count(0.0)} of {len(ranges)} dynamic because of outliers" if 0.0 in ranges else ""
    return [f"static scales of the tower's activations ({keys['mbq.act.estimator']}){dynamic}"]


def megabytes(size: int) -> str:
    """Bytes as kB, MB (10^6) or GB."""
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds in a human-readable form."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _sums(records: Sequence[TensorRecord]) -> tuple[str, str, str, str]:
    weights, size = sum(record.elements for record in records), sum(record.nbytes for record in records)
    return str(len(records)), f"{weights:,}", megabytes(size), f"{8 * size / weights:.3f}"
