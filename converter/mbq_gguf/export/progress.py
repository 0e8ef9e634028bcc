"""Progress bars, one per stage, with the remaining time; bars for files count megabytes."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mbq_gguf.memory import gpu_bytes, process_bytes

MB = 10**6


def progress_bars(console: Console) -> Progress:
    """An empty set of progress bars, as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        MemoryColumn(),
        console=console,
    )


class MemoryColumn(ProgressColumn):
    """Shows the host and GPU memory that the process uses, next to unfinished bars."""

    max_refresh = 1.0  # seconds between updates

    def render(self, task: Task) -> Text:
        """The text, such as "3.1 GB, GPU 20.4 GB"."""
        if task.finished:
            return Text("")
        card = gpu_bytes()
        return Text(f"{process_bytes() / 1e9:.1f} GB" + (f", GPU {card / 1e9:.1f} GB" if card else ""))


def download_bars(console: Console) -> Progress:
    """Progress bars for downloads, in bytes; they disappear at the end."""
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True)


class Stages:
    """Maps calls (stage, done, total) to progress bars, which appear with a stage's first call. ``listener`` gets the same calls."""

    def __init__(self, bars: Progress, listener: Callable[[str, int, int], None] | None = None) -> None:
        self._bars = bars
        self._listener = listener
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are finished."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        if self._listener:
            self._listener(stage, done, total)

    def counter(self, stage: str) -> Callable[[int, int], None]:
        """A callback for (newly done, total) in bytes, which accumulates and shows megabytes."""
        done = 0

        def advance(more: int, total: int) -> None:
            nonlocal done
            done += more
            self(stage, done // MB, total // MB)

        return advance
