#!/usr/bin/env python3
"""Measures a conversion: seconds by stage, and memory of the host and of the GPU, as JSON.

    python tools/random_model.py qwen2-vl-7b big --layers 4
    python tools/measure_scale.py big out.gguf --device cuda --json 7b-4.json
    python tools/measure_scale.py huge out.gguf --device cuda --stop-after 2 --json 72b.json
    python tools/measure_scale.py one-layer-of-huge out.gguf --device cuda --texts-of 80 --card-gib 80 --json 72b-texts.json

Host memory is reported twice: the process's own (anonymous pages, which must fit), and all of its resident pages, including mapped files,
which the system can reclaim. With --stop-after the run ends after that many decoder layers, and the time of the others is extrapolated.
With --texts-of, the model only generates its texts, with that many layers that all use the first one's files. Other options of `mbq-gguf
convert` are set by name (--set samples=8).
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import click
import torch
from mbq_gguf import convert as converting
from mbq_gguf.calibration.generate import writing_bits
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.synthetic import written
from mbq_gguf.convert import ConvertOptions
from mbq_gguf.models.load import load
from mbq_gguf.settings import QuantiseSettings
from rich.console import Console

EVERY = 0.1  # seconds between two readings of memory


class StoppedError(Exception):
    """Ends a run after the requested layers."""


class Memory:
    """While open, watches this process's memory in bytes: ``peak`` by kind, ``by_stage`` the anonymous peak of each stage."""

    def __init__(self) -> None:
        self.peak = {"anonymous": 0, "resident": 0}
        self.by_stage: dict[str, int] = {}
        self.stage = "start"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(EVERY):
            found = {}
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                found[name] = value.split()
            anonymous, resident = (int(found[name][0]) * 1024 for name in ("RssAnon", "VmRSS"))
            self.peak["anonymous"] = max(self.peak["anonymous"], anonymous)
            self.peak["resident"] = max(self.peak["resident"], resident)
            self.by_stage[self.stage] = max(self.by_stage.get(self.stage, 0), anonymous)


class Times:
    """When each stage reported progress: seconds from the first to the last report, and of each layer."""

    def __init__(self, memory: Memory, stop_after: int | None) -> None:
        self.memory, self.stop_after = memory, stop_after
        self.begun = time.perf_counter()
        self.stages: dict[str, list[float]] = {}
        self.layers: list[float] = []
        self.of = 0
        self.card: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter() - self.begun
        self.memory.stage = stage
        self.stages.setdefault(stage, [now, now])[1] = now
        if torch.cuda.is_available():
            self.card[stage] = max(self.card.get(stage, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        if stage == "layers":
            self.layers.append(now)
            self.of = total
            if self.stop_after == done:
                raise StoppedError


def told_of(memory: Memory, times: Times) -> dict[str, Any]:
    """Stages and memory so far."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "told": times.stages,
        "host_gib": {kind: value / 2**30 for kind, value in memory.peak.items()},
        "host_gib_by_stage": {stage: value / 2**30 for stage, value in memory.by_stage.items()},
        "gpu_gib_by_stage": {stage: value / 2**30 for stage, value in times.card.items()},
        "gpu_gib_reserved": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
    }


def texts(model: Path, layers: int, device: str, count: int) -> dict[str, Any]:
    """Let a model of that many layers generate its texts; each layer uses the first one's files."""
    loading = importlib.import_module("mbq_gguf.models.load")
    first, known = re.compile(r"language_model\.layers\.0\."), loading.lazy_tensors

    def repeated(files: Any) -> dict[str, torch.Tensor]:
        found = known(files)
        for name in [name for name in found if first.search(name)]:
            found |= {first.sub(f"language_model.layers.{number}.", name): found[name] for number in range(1, layers)}
        return found

    with TemporaryDirectory() as folder, patch.object(loading, "lazy_tensors", repeated), Memory() as memory:
        for file in model.iterdir():
            (Path(folder) / file.name).symlink_to(file.absolute())
        config = json.loads((model / "config.json").read_text())
        config["text_config"] |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps(config))
        times = Times(memory, None)
        loaded = load(Path(folder), device, progress=lambda done, total: times("check weights", done, total))
        times("load", 1, 1)
        bits = writing_bits(loaded)
        with coarse_products(loaded.device):
            written(loaded, count, lambda done, total: times("write texts", done, total))
        seconds = time.perf_counter() - times.begun
    return {"ended": f"{count} texts of {layers} layers", "bits": bits, "seconds": seconds, **told_of(memory, times)}


def limit_card(gib: float) -> None:
    """Use no more GPU memory than a smaller GPU has."""
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def measured(options: ConvertOptions, stop_after: int | None, store: Path | None) -> dict[str, Any]:
    """Convert, and return the measurements; ``store`` receives those known so far."""
    with Memory() as memory:
        times = Times(memory, stop_after)

        def told(stage: str, done: int, total: int) -> None:
            if store:
                store.write_text(json.dumps({"ended": f"in {stage}", **told_of(memory, times)}, indent=1) + "\n", encoding="utf-8")
            times(stage, done, total)

        report, ended = None, "whole"
        try:
            report = converting.convert(options, Console(force_terminal=False), told)
        except StoppedError:
            ended = f"stopped behind layer {stop_after}"
        seconds = time.perf_counter() - times.begun
    steps = [later - earlier for earlier, later in zip(times.layers, times.layers[1:], strict=False)]
    a_layer = sum(steps) / len(steps) if steps else 0.0
    return {
        "ended": ended,
        "seconds": seconds,
        "seconds_a_layer": a_layer,
        "seconds_predicted": seconds + a_layer * (times.of - len(times.layers)),
        "layers": [len(times.layers), times.of],
        "by_stage": None if report is None else report.seconds,
        **told_of(memory, times),
    }


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--device", default="cpu")
@click.option("--type", "type_", default=ConvertOptions.type)
@click.option("--stop-after", type=click.IntRange(min=1))
@click.option("--texts-of", type=click.IntRange(min=1), help="Only generate the texts, with that many layers.")
@click.option("--card-gib", type=float, help="Limit on GPU memory, in GiB.")
@click.option("--set", "chosen", multiple=True, help="Option of the conversion as NAME=VALUE, with its Python name.")
@click.option("--json", "store", type=click.Path(dir_okay=False, path_type=Path))
def main(
    model: Path,
    out: Path,
    device: str,
    type_: str,
    stop_after: int | None,
    texts_of: int | None,
    card_gib: float | None,
    chosen: tuple[str, ...],
    store: Path | None,
) -> None:
    """Convert MODEL to OUT and report the measurements."""
    options = ConvertOptions(model, out, type=type_, device=device)
    for pair in chosen:
        name, _, value = pair.partition("=")
        options = replace(options, **{name: json.loads(value)})
    if card_gib:
        limit_card(card_gib)
    found = texts(model, texts_of, device, QuantiseSettings.synthetic) if texts_of else measured(options, stop_after, store)
    found = {"model": model.name, "set": list(chosen), "card_gib": card_gib, **found}
    text = json.dumps(found, indent=1)
    if store:
        store.write_text(text + "\n", encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
