"""How much memory there is and how much is taken, of the host and of a card."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # progress bars come with --help, which loads no torch
    import torch

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that are free on ``device``: what the driver and torch's own pool have left, as far as torch may take it, or what the
    system can give without swapping, within the limit of a container. Where the system does not say, all that one can address."""
    if device.type == "cuda":
        import torch

        card = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(card)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(card))
        pool = torch.cuda.memory.memory_stats_as_nested_dict(card)  # flattened, as memory_allocated does it twice, takes 0.5 ms
        taken, reserved = (int(pool[f"{kind}_bytes"]["all"]["current"]) for kind in ("allocated", "reserved"))
        return max(0, min(free + reserved - taken, allowed - taken))
    return min(_kilobytes(MEMINFO, "MemAvailable"), _left_in_container())


def to_host(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the host's memory. From a card it is on its way to page-locked memory, which the card writes itself (55 MB into other pages
    take 40 ms): who reads it waits for an :func:`arrival` first."""
    import torch

    return x if x.device.type == "cpu" else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)


def arrival(device: torch.device) -> Callable[[], None]:
    """What waits until ``device`` has done all that it has been told before this call."""
    if device.type != "cuda":
        return lambda: None
    import torch

    told = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    told.record(torch.cuda.current_stream(device))
    return told.synchronize


def process_bytes() -> int:
    """Bytes of the host that this process holds itself; pages of mapped files, which the system takes back at need, are none of them."""
    return _kilobytes(STATUS, "RssAnon")


def gpu_bytes() -> int:
    """Bytes that torch has taken on all cards; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(number) for number in range(torch.cuda.device_count()))


def _left_in_container() -> int:
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
        return int(limit) - int(used) + int(cache)
    except (OSError, ValueError):  # none, or one without a limit ("max")
        return 1 << 62


def _kilobytes(file: Path, name: str) -> int:
    try:
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62 if file is MEMINFO else 0
