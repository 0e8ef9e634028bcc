"""Reads how much memory a server uses, of the machine and of the GPU."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path


def resident(pid: int) -> int:
    """Resident memory of the process in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def on_card() -> int:
    """Bytes in use on the GPUs that are visible to this process, by any process; nvidia-smi takes half a second."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if cards := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={cards}")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(line) << 20 for line in done.stdout.split())


def growth(memory: Sequence[int]) -> tuple[float, float]:
    """Bytes at the beginning and at the end, each the median over a tenth of the samples."""
    span = max(1, len(memory) // 10)
    return statistics.median(memory[:span]), statistics.median(memory[-span:])
