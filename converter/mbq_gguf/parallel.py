"""Work that several processes share (torchrun, one process per GPU), with the same bytes for any number of processes.

All processes take the same steps and hold the same state. Expensive work is divided into pieces that do not depend on the number of
processes: batches of samples, rows of a matrix, tiles of a sum. Each piece is computed by one process, in the same way as in a single
process, and sent to all, which continue from the same values. The order of additions never depends on the number of processes. Batches of
activations are exchanged rather than Hessians, because they are far smaller.

Tensors go from GPU to GPU (NCCL), or through the loopback interface (gloo). In a single process this module does nothing.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mbq_gguf import launch
from mbq_gguf.errors import UserError

Value = TypeVar("Value")
Piece = TypeVar("Piece")
Parts = dict[str, torch.Tensor]

LONGEST = timedelta(days=2)  # how long a process waits for others: the first may generate texts for an hour. If one dies, torchrun ends all
PAGE = 4096  # bytes
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the latter is its name before PyTorch 2.13
_first_alone = False  # inside broadcast_from_first, where the first process works alone


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """While open, this process is in a group with the others; does nothing for a single process."""
    if launch.count() == 1:
        yield
        return
    if launch.neighbours() == launch.count():  # on one machine: avoids looking up its name, which not every container can resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    card = torch.device(device)
    if card.type == "cuda":
        torch.cuda.set_device(card)
    with _connection_errors():
        dist.init_process_group("cpu:gloo,cuda:nccl" if card.type == "cuda" else "gloo", timeout=LONGEST)
    yield
    dist.destroy_process_group()


def world_size() -> int:
    """The number of processes that share the current work."""
    return dist.get_world_size() if dist.is_initialized() and not _first_alone else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def parallel_map(pieces: Sequence[Piece], compute: Callable[[Piece], Parts]) -> Iterator[tuple[Piece, Parts]]:
    """Compute all ``pieces`` in parallel; yields each piece, in order, with the result of ``compute`` on this process's device.

    Process r computes pieces r, r + count, and so on; one such set of pieces is a round. While a round is being computed, the two before
    are in transit: the last one has been described to all processes and is being sent, without waiting for late ones; the one before it has
    arrived. So ``compute`` must not depend on what the caller does with earlier results.
    """
    if world_size() == 1:
        for piece in pieces:
            yield piece, compute(piece)
        return
    rounds = [pieces[start : start + world_size()] for start in range(0, len(pieces), world_size())]
    described = ((here, PendingGather(compute(here[rank()]) if rank() < len(here) else {})) for here in rounds)
    sent = ((here, each.send()) for here, each in _delayed(described))
    for here, arriving in _delayed(sent):
        yield from zip(here, arriving, strict=False)


def parallel_map_values(pieces: Sequence[Piece], compute: Callable[[Piece], Value]) -> Iterator[Value]:
    """The results of ``compute`` for ``pieces``, in order, as in :func:`parallel_map`, for any value that can be pickled."""
    if world_size() == 1:
        yield from map(compute, pieces)
        return
    for _, parts in parallel_map(pieces, lambda piece: {"value": _pickled(compute(piece))}):
        yield _unpickled(parts["value"])


def broadcast_from_first(make: Callable[[], Value]) -> Value:
    """Call ``make`` in the first process only, while the others wait, and return its result in all of them."""
    global _first_alone
    if world_size() == 1:
        return make()
    if rank() > 0:
        value: Value = _unpickled(all_gather({})[0]["value"])
        return value
    _first_alone = True
    try:
        made = make()
    finally:
        _first_alone = False
    all_gather({"value": _pickled(made)})
    return made


def own_pieces(pieces: int) -> range:
    """The pieces, out of ``pieces``, that this process computes in :func:`parallel_map`."""
    return range(rank(), pieces, world_size())


def even_shares(pieces: int) -> list[range]:
    """``pieces`` divided into one contiguous range for each process, as evenly as possible."""
    size = world_size()
    return [range(pieces * each // size, pieces * (each + 1) // size) for each in range(size)]


def balanced_map(costs: Sequence[float], compute: Callable[[int], torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Compute pieces whose times are proportional to ``costs``; yields number and result of each, in any order. The longest pieces are
    assigned first, each to the process with the least work so far, and all results are exchanged at once. A single piece is computed by
    every process.
    """
    if world_size() == 1 or len(costs) == 1:
        for piece in range(len(costs)):
            yield piece, compute(piece)
        return
    hands: list[list[int]] = [[] for _ in range(world_size())]
    for piece in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        min(hands, key=lambda hand: sum(costs[other] for other in hand)).append(piece)
    for parts in all_gather({str(piece): compute(piece) for piece in hands[rank()]}):
        yield from ((int(name), part) for name, part in parts.items())


def gather_pieces(pieces: Sequence[torch.Tensor]) -> None:
    """Fill each of ``pieces`` with the values of the process that :func:`own_pieces` assigns it to. All processes have the same shapes.

    Each process sends all of its pieces as one message, since 60 messages would take the host 5 ms, and all processes send at once.
    """
    if world_size() == 1:
        return
    lengths = [[piece.numel() for piece in pieces[process :: world_size()]] for process in range(world_size())]
    whole = pieces[0].new_empty(world_size(), max(map(sum, lengths)))
    parts = [
        [(piece, part.view(piece.shape)) for piece, part in zip(pieces[process :: world_size()], line[: sum(own)].split(own), strict=True)]
        for process, (line, own) in enumerate(zip(whole, lengths, strict=True))
    ]
    for piece, part in parts[rank()]:
        part.copy_(piece)
    with _connection_errors():
        _all_gather(whole.view(-1), whole[rank()])
    for process, theirs in enumerate(parts):
        for piece, part in theirs if process != rank() else ():
            piece.copy_(part)


def all_gather(mine: Parts) -> list[Parts]:
    """The tensors of every process, in order of processes. They may differ in names, shapes and types, and arrive on a device of the same
    kind as they were sent from.
    """
    return list(PendingGather(mine).send())


class PendingGather:
    """An all-gather in progress; ``mine`` are this process's tensors."""

    def __init__(self, mine: Parts) -> None:
        self._mine = mine
        self._described = _start_gather_objects({name: (value.shape, value.dtype, value.device.type) for name, value in mine.items()})
        self._found: list[Parts] = []
        self._sending: list[dist.Work] = []

    def send(self) -> Iterator[Parts]:
        """Start sending once all processes have described their tensors; yields the tensors of each process, in order, when they have
        arrived."""
        described = self._described()
        with _connection_errors():
            for source, names in enumerate(described):
                parts = {}
                for name, (shape, dtype, kind) in names.items():
                    here = source == rank()
                    parts[name] = self._mine[name].detach().contiguous() if here else torch.empty(shape, dtype=dtype, device=_device(kind))
                    if parts[name].numel():
                        sending = dist.broadcast(_bytes(parts[name]), source, async_op=True)
                        assert sending is not None
                        self._sending.append(sending)
                self._found.append(parts)
        return self._arrived()

    def _arrived(self) -> Iterator[Parts]:
        with _connection_errors():
            for sending in self._sending:
                sending.wait()
        yield from self._found


def _delayed(values: Iterable[Value]) -> Iterator[Value]:
    """Yields each of ``values`` only after the next one has been computed."""
    before: list[Value] = []
    for value in values:
        yield from before
        before = [value]
    yield from before


def gather_objects(mine: Any) -> list[Any]:
    """The object of every process, in order of processes; it must be picklable."""
    return [mine] if world_size() == 1 else _start_gather_objects(mine)()


def _start_gather_objects(mine: Any) -> Callable[[], list[Any]]:
    """Start :func:`gather_objects`, and return a function that waits for its result. Objects that fit into PAGE bytes need a single message
    of known length: 0.4 ms between two processes, instead of 1.2 with a preceding message of lengths, for every batch that is exchanged.
    """
    pickled = pickle.dumps(mine)
    page = torch.frombuffer(bytearray(len(pickled).to_bytes(8, "little") + pickled).ljust(PAGE)[:PAGE], dtype=torch.uint8)
    pages = list(torch.empty(world_size(), PAGE, dtype=torch.uint8))
    with _connection_errors():
        sending = dist.all_gather(pages, page, async_op=True)
    assert sending is not None

    def result() -> list[Any]:
        with _connection_errors():
            sending.wait()
            messages = [each.numpy().tobytes() for each in pages]
            if any(int.from_bytes(each[:8], "little") > PAGE - 8 for each in messages):
                found: list[Any] = [None] * world_size()
                dist.all_gather_object(found, mine)
                return found
        return [pickle.loads(each[8:]) for each in messages]

    return result


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous ``value`` of any type, as a type that every backend can send."""
    return value.reshape(-1).view(torch.uint8)


def _pickled(value: object) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> Any:
    """The value; tensors from another process's GPU are placed on this process's."""
    return torch.load(io.BytesIO(data.numpy().data), map_location=_placed, weights_only=False)


def _placed(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turns a lost connection to another process into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch.distributed's errors are subclasses; gloo raises this class itself
        raise UserError(launch.ENDED) from error
