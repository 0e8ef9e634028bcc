"""The next decoder layer's weights on their way out of their files, in a thread, while the layer before is quantised.

For a CPU it is enough that the system has them in memory. A card copies them, out of mapped pages by way of its driver's buffers, with all
of its work waiting; so they wait for it in page-locked memory, which it reads by itself: a layer of a 7B takes an H200 1.96 s so, and 2.36
from mapped pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from threading import Thread

import torch
from torch import nn

from mbq_gguf.models.stored import InFile, Made, leaves, tensors_of

PAGE = 4096  # bytes that the system reads at least
ALIGNED = 64  # bytes; of where a tensor begins


class ReadAhead:
    """All that ``module`` has in files, while it is read. Nobody needs to wait for it but who takes it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._made: Made = {}
        self._keeps = device.type == "cuda"
        found = {id(leaf): leaf for _, _, value in tensors_of(module) for leaf in leaves(value)}
        self._thread = Thread(target=self._read, args=(list(found.values()),), daemon=True)
        self._thread.start()

    def taken(self) -> Made:
        """For :func:`mbq_gguf.models.stored.read_into`: what a card is to copy, when all of it is there; it is kept no longer.

        Nothing for a CPU, or where no memory could be had: then the files are read as ever.
        """
        if not self._keeps:
            return {}
        self.wait()
        made, self._made = self._made, {}
        return made

    def wait(self) -> None:
        """Return when everything has been read."""
        self._thread.join()

    def _read(self, found: Sequence[InFile]) -> None:
        opened: Made = {}
        wholes = [leaf(opened) for leaf in found]
        if not self._keeps:
            for whole in wholes:
                whole.view(-1)[:: max(1, PAGE // whole.element_size())].sum()
            return
        try:
            self._made = {id(leaf): copied for leaf, copied in zip(found, page_locked(wholes), strict=True)}
        except RuntimeError:  # the driver's: no memory to lock
            return


def page_locked(wholes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of ``wholes`` in one piece of page-locked memory: PyTorch takes pieces of a power of two, and has them again for the next."""
    sizes = [-(-whole.nbytes // ALIGNED) * ALIGNED for whole in wholes]
    room = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    starts = [end - size for size, end in zip(sizes, accumulate(sizes), strict=True)]
    parts = [room[start : start + whole.nbytes].view(whole.dtype) for start, whole in zip(starts, wholes, strict=True)]
    return [part.view(whole.shape).copy_(whole) for part, whole in zip(parts, wholes, strict=True)]
