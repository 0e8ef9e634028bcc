"""Progress bars, one a stage, with the time left; of files they count megabytes."""

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
    """An empty display of bars; use it as a context manager."""
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
    """What the process holds now of host and card, beside the bars that are not full."""

    max_refresh = 1.0  # seconds between two looks

    def render(self, task: Task) -> Text:
        """As "3.1 GB, card 20.4 GB"."""
        if task.finished:
            return Text("")
        card = gpu_bytes()
        return Text(f"{process_bytes() / 1e9:.1f} GB" + (f", card {card / 1e9:.1f} GB" if card else ""))


def download_bars(console: Console) -> Progress:
    """The same for files that are fetched: bytes, and gone at the end."""
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True)


class Stages:
    """Calls (stage, done, total) to bars: a stage's bar appears with its first call. ``told`` is called with the same."""

    def __init__(self, bars: Progress, told: Callable[[str, int, int], None] | None = None) -> None:
        self._bars = bars
        self._told = told
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of ``stage`` are finished."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        if self._told:
            self._told(stage, done, total)

    def counter(self, stage: str) -> Callable[[int, int], None]:
        """For callers that tell (newly done, total) in bytes: a function that keeps the sum, and shows megabytes."""
        done = 0

        def advance(more: int, total: int) -> None:
            nonlocal done
            done += more
            self(stage, done // MB, total // MB)

        return advance
