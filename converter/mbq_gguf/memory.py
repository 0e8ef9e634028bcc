"""Free and used memory, of the host and of GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # progress bars are imported for --help too, which must not import torch
    import torch

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Free bytes on ``device``. On a GPU: what the driver and torch's pool have left, within torch's memory fraction. On the host: what is
    available without swapping, within a container's limit; unlimited if the system does not tell."""
    if device.type == "cuda":
        import torch

        card = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(card)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(card))
        pool = torch.cuda.memory.memory_stats_as_nested_dict(card)  # memory_allocated flattens this twice, which takes 0.5 ms
        taken, reserved = (int(pool[f"{kind}_bytes"]["all"]["current"]) for kind in ("allocated", "reserved"))
        return max(0, min(free + reserved - taken, allowed - taken))
    return min(_kilobytes(MEMINFO, "MemAvailable"), _left_in_container())


def to_host(x: torch.Tensor) -> torch.Tensor:
    """``x`` in host memory. From a GPU, this starts an asynchronous copy to page-locked memory (55 MB to pageable memory take 40 ms): wait
    for an :func:`arrival` before reading it."""
    import torch

    return x if x.device.type == "cpu" else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)


def arrival(device: torch.device) -> Callable[[], None]:
    """A function that waits until ``device`` has completed all work launched before this call."""
    if device.type != "cuda":
        return lambda: None
    import torch

    told = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    told.record(torch.cuda.current_stream(device))
    return told.synchronize


def process_bytes() -> int:
    """Host memory of this process in bytes, without the pages of mapped files, which the system can reclaim."""
    return _kilobytes(STATUS, "RssAnon")


def gpu_bytes() -> int:
    """Bytes that torch has allocated on all GPUs; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(number) for number in range(torch.cuda.device_count()))


def _left_in_container() -> int:
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
        return int(limit) - int(used) + int(cache)
    except (OSError, ValueError):  # no container, or no limit ("max")
        return 1 << 62


def _kilobytes(file: Path, name: str) -> int:
    try:
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62 if file is MEMINFO else 0
