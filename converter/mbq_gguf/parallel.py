"""Work that several processes share (torchrun, one a card), with the same bytes for any number of them.

All processes walk the same steps and hold the same state. What is worth sharing is cut into pieces that do not depend on how many processes
there are: batches of samples, rows of a matrix, tiles of a sum. Each piece is computed by one process, as it would be by a single one, and
sent to all, which go on from the same values: nothing is ever added up in an order that depends on their number. Batches of activations
are far smaller than the Hessians that come of them, so it is they that travel.

Tensors go from card to card (NCCL), or through the loopback (gloo); in a single process nothing here does anything.
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

LONGEST = timedelta(days=2)  # that a process waits for others: the first may write texts for an hour. torchrun ends all when one dies
PAGE = 4096  # bytes
_apart = False  # inside from_first, where the first process is alone


@contextmanager
def together(device: str) -> Iterator[None]:
    """Join the other processes for the time of the block; nothing where there are none."""
    if launch.count() == 1:
        yield
        return
    if launch.neighbours() == launch.count():  # of one machine: no need to ask for its name, which not every container can resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    card = torch.device(device)
    if card.type == "cuda":
        torch.cuda.set_device(card)
    with _heard():
        dist.init_process_group("cpu:gloo,cuda:nccl" if card.type == "cuda" else "gloo", timeout=LONGEST)
    yield
    dist.destroy_process_group()


def count() -> int:
    """How many processes share the work at hand."""
    return dist.get_world_size() if dist.is_initialized() and not _apart else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if count() > 1 else 0


def spread(pieces: Sequence[Piece], compute: Callable[[Piece], Parts]) -> Iterator[tuple[Piece, Parts]]:
    """Each of ``pieces``, in order, with what ``compute`` makes of it, on its device.

    Process r computes pieces r, r + count ...; those of one round at the same time. Two rounds are on their way while the next one is
    computed: the one before is described to all by then, and sent, without waiting for whoever is late; the one before that has arrived.
    So ``compute`` must not wait for what the caller does with the pieces before.
    """
    if count() == 1:
        for piece in pieces:
            yield piece, compute(piece)
        return
    rounds = [pieces[start : start + count()] for start in range(0, len(pieces), count())]
    described = ((here, Sent(compute(here[rank()]) if rank() < len(here) else {})) for here in rounds)
    sent = ((here, each.send()) for here, each in _one_later(described))
    for here, arriving in _one_later(sent):
        yield from zip(here, arriving, strict=False)


def spread_values(pieces: Sequence[Piece], compute: Callable[[Piece], Value]) -> Iterator[Value]:
    """What ``compute`` makes of each of ``pieces``, in order, as :func:`spread`; any value that can be pickled."""
    if count() == 1:
        yield from map(compute, pieces)
        return
    for _, parts in spread(pieces, lambda piece: {"value": _pickled(compute(piece))}):
        yield _unpickled(parts["value"])


def from_first(make: Callable[[], Value]) -> Value:
    """What ``make`` gives in the first process, in all of them; there it works alone, and the others wait."""
    global _apart
    if count() == 1:
        return make()
    if rank() > 0:
        value: Value = _unpickled(exchange({})[0]["value"])
        return value
    _apart = True
    try:
        made = make()
    finally:
        _apart = False
    exchange({"value": _pickled(made)})
    return made


def own(pieces: int) -> range:
    """Which of so many ``pieces`` this process computes in :func:`spread`."""
    return range(rank(), pieces, count())


def shares(pieces: int) -> list[range]:
    """``pieces`` in a row, divided among the processes, in their order, as evenly as they can be."""
    size = count()
    return [range(pieces * each // size, pieces * (each + 1) // size) for each in range(size)]


def dealt(costs: Sequence[float], compute: Callable[[int], torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each piece's number and what ``compute`` makes of it, in any order. Pieces take as long as ``costs`` say: the longest first, each is
    for the process that has the least to do, and what they make is exchanged at once. A single piece every process computes itself."""
    if count() == 1 or len(costs) == 1:
        for piece in range(len(costs)):
            yield piece, compute(piece)
        return
    hands: list[list[int]] = [[] for _ in range(count())]
    for piece in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        min(hands, key=lambda hand: sum(costs[other] for other in hand)).append(piece)
    for parts in exchange({str(piece): compute(piece) for piece in hands[rank()]}):
        yield from ((int(name), part) for name, part in parts.items())


def complete(pieces: Sequence[torch.Tensor]) -> None:
    """Give each of ``pieces``, of which all processes have the same shapes, the values that it has in the one whose :func:`own` it is.

    Each process sends its pieces as one: 60 messages take the host 5 ms.
    """
    if count() == 1:
        return
    arriving = []
    with _heard():
        for process in range(count()):
            theirs = pieces[process :: count()]
            whole = pieces[0].new_empty(sum(piece.numel() for piece in theirs))
            spaces = torch.split(whole, [piece.numel() for piece in theirs])
            parts = [(piece, space.view(piece.shape)) for piece, space in zip(theirs, spaces, strict=True)]
            if process == rank():
                for piece, part in parts:
                    part.copy_(piece)
            if whole.numel():
                arriving.append((process, parts, dist.broadcast(whole, process, async_op=True)))
        for process, parts, sending in arriving:
            assert sending is not None
            sending.wait()
            if process != rank():
                for piece, part in parts:
                    piece.copy_(part)


def exchange(own: Parts) -> list[Parts]:
    """What each process gives, in their order; tensors may differ in names, shapes and types, and arrive on the device of their kind."""
    return list(Sent(own).send())


class Sent:
    """What each process gives, on its way to all: ``own`` is this one's."""

    def __init__(self, own: Parts) -> None:
        self._own = own
        self._described = _telling({name: (value.shape, value.dtype, value.device.type) for name, value in own.items()})
        self._found: list[Parts] = []
        self._sending: list[dist.Work] = []

    def send(self) -> Iterator[Parts]:
        """Begin, when all have said what there is; what comes of it is all of that, in the order of processes, once it is there."""
        described = self._described()
        with _heard():
            for source, names in enumerate(described):
                parts = {}
                for name, (shape, dtype, kind) in names.items():
                    here = source == rank()
                    parts[name] = self._own[name].detach().contiguous() if here else torch.empty(shape, dtype=dtype, device=_device(kind))
                    if parts[name].numel():
                        sending = dist.broadcast(_bytes(parts[name]), source, async_op=True)
                        assert sending is not None
                        self._sending.append(sending)
                self._found.append(parts)
        return self._arrived()

    def _arrived(self) -> Iterator[Parts]:
        with _heard():
            for sending in self._sending:
                sending.wait()
        yield from self._found


def _one_later(values: Iterable[Value]) -> Iterator[Value]:
    """Each of ``values`` when the next one is made."""
    before: list[Value] = []
    for value in values:
        yield from before
        before = [value]
    yield from before


def told(own: Any) -> list[Any]:
    """What each process tells, in their order; anything that can be pickled."""
    return [own] if count() == 1 else _telling(own)()


def _telling(own: Any) -> Callable[[], list[Any]]:
    """:func:`told` on its way: what gives it. Where it fits into a PAGE, one message of known length does: 0.4 ms between two processes
    instead of 1.2 with a message of lengths before it, for every batch that is exchanged."""
    said = pickle.dumps(own)
    page = torch.frombuffer(bytearray(len(said).to_bytes(8, "little") + said).ljust(PAGE)[:PAGE], dtype=torch.uint8)
    pages = list(torch.empty(count(), PAGE, dtype=torch.uint8))
    with _heard():
        sending = dist.all_gather(pages, page, async_op=True)
    assert sending is not None

    def heard() -> list[Any]:
        with _heard():
            sending.wait()
            messages = [each.numpy().tobytes() for each in pages]
            if any(int.from_bytes(each[:8], "little") > PAGE - 8 for each in messages):
                found: list[Any] = [None] * count()
                dist.all_gather_object(found, own)
                return found
        return [pickle.loads(each[8:]) for each in messages]

    return heard


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous ``value``, of whatever type, as one that every backend sends."""
    return value.reshape(-1).view(torch.uint8)


def _pickled(value: object) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> Any:
    """The value, with tensors of another's card on this process's."""
    return torch.load(io.BytesIO(data.numpy().data), map_location=_placed, weights_only=False)


def _placed(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage


@contextmanager
def _heard() -> Iterator[None]:
    """A process that does not answer, as one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch.distributed's errors are of this class, and gloo's have no other
        raise UserError(launch.ENDED) from error
