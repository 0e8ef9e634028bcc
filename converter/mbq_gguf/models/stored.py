"""Weights that stay in the checkpoint's files until they are needed, so that no more of a model is in memory than is computed with.

A :class:`Stored` tensor has shape and dtype and no values (it is on torch's meta device). What transformers does to a checkpoint's tensors
while it makes a model's parameters of them, it does to these: an operation on one gives another that knows how it was made. Reading one
reads the tensors that it came from, and repeats the operations on them: experts that a checkpoint keeps one by one are stacked when their
layer is read, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32}
MAPPED = 64 * 10**6  # bytes of a file that are read before it is opened anew, which gives back what is mapped of it
Made = dict[int | Path, Any]  # what has been read already, by the identity of what it came from; and files that are open


class Stored(torch.Tensor):
    """A tensor without values; :meth:`read` gives them."""

    source: Callable[[Made], Any]

    @classmethod
    def of(cls, like: torch.Tensor, source: Callable[[Made], Any]) -> Stored:
        """One with shape and dtype of ``like``, on the meta device, whose values ``source`` gives."""
        made: Stored = torch.Tensor._make_subclass(cls, like)
        made.source = source
        return made

    def read(self, made: Made | None = None) -> torch.Tensor:
        """The values, on the host. They may lie in a mapped file: whoever changes them takes a copy. ``made`` keeps what several read."""
        found = self.source({} if made is None else made)
        assert isinstance(found, torch.Tensor)
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__deepcopy__:
            return args[0]  # it never changes
        if func is torch.Tensor.to:
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            raise TypeError(f"a weight that is still in its file cannot be changed ({name})")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if (args and found is args[0]) or not _tensors(found):
            return found
        call = _Call(func, args, kwargs)
        if isinstance(found, torch.Tensor):
            return cls.of(found, call)
        return type(found)(cls.of(part, _Part(call, place)) for place, part in enumerate(found))


class _Call:
    """An operation on stored tensors, done when its result is read."""

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs

    def __call__(self, made: Made) -> Any:
        if id(self) not in made:
            made[id(self)] = self.func(*_read(self.args, made), **_read(self.kwargs, made))
        return made[id(self)]


class _Part:
    """One of the results of an operation that gives several."""

    def __init__(self, call: _Call, place: int) -> None:
        self.call, self.place = call, place

    def __call__(self, made: Made) -> Any:
        return self.call(made)[self.place]


class InFile:
    """A checkpoint's tensor."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __call__(self, made: Made) -> Any:
        if id(self) in made:
            return made[id(self)]
        opened, mapped = made.pop(self.file, None) or (safe_open(str(self.file), framework="pt"), 0)
        tensor = opened.get_tensor(self.name)
        if mapped + tensor.nbytes <= MAPPED:  # not opened for each: a header tells of all tensors, 10 ms where they are 12288
            made[self.file] = (opened, mapped + tensor.nbytes)
        return tensor


def stored_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Every tensor of safetensors ``files`` by its name; only headers are read."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:  # of a kind that is no weight, and small
                    found[name] = opened.get_tensor(name)
                else:
                    found[name] = Stored.of(torch.empty(part.get_shape(), dtype=dtype, device="meta"), InFile(file, name))
    return found


def read_into(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, left: Sequence[nn.Module] = (), made: Made | None = None
) -> None:
    """Give ``module``, in place, the values of all that it still has in files, and put everything on ``device``, floating point in
    ``dtype`` (None: as stored); modules ``left`` stay as they are, with all that is in them. What is in ``made`` is not read again."""
    made = {} if made is None else made
    placed: dict[int, torch.Tensor] = {}  # a tensor that two modules share stays one
    skipped = {id(inner) for outer in left for inner in outer.modules()}
    for owner, name, value in tensors_of(module):
        if id(owner) in skipped:
            continue
        if id(value) not in placed:
            placed[id(value)] = read_to(value, device, dtype, made)
        put(owner, name, placed[id(value)])


def leaves(value: Any) -> Iterator[InFile]:
    """The checkpoint's tensors that ``value``, or what is in it, is made of."""
    match value.source if isinstance(value, Stored) else value:
        case InFile() as leaf:
            yield leaf
        case _Part() as part:
            yield from leaves(part.call)
        case _Call() as call:
            yield from leaves([*call.args, *call.kwargs.values()])
        case list() | tuple() as several:
            for each in several:
                yield from leaves(each)


def put(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give ``owner`` ``value`` as its parameter or buffer ``name``."""
    if isinstance(value, nn.Parameter):
        owner._parameters[name] = value
    else:
        owner._buffers[name] = value


def read_to(value: torch.Tensor, device: torch.device, dtype: torch.dtype | None, made: Made) -> torch.Tensor:
    """``value`` on ``device`` in ``dtype``, read where it still is in a file; a parameter stays one."""
    found = value.read(made) if isinstance(value, Stored) else value.detach()
    found = found.to(device, non_blocking=found.is_pinned())  # before it grows: a checkpoint's 16 bits travel, not 32
    found = found.to(dtype) if dtype is not None and found.is_floating_point() else found
    if isinstance(value, Stored) and device.type == "cpu" and found.dtype == value.dtype:
        found = found.clone()  # out of the mapped file
    return nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Every parameter and buffer with its owner and its name there; those that have several owners come once for each."""
    for owner in module.modules():
        for name, value in (*owner._parameters.items(), *owner._buffers.items()):
            if value is not None:
                yield owner, name, value


def _tensors(found: Any) -> bool:
    if isinstance(found, tuple | list):
        return bool(found) and all(isinstance(part, torch.Tensor) for part in found)
    return isinstance(found, torch.Tensor)


def _read(value: Any, made: Made) -> Any:
    """``value`` with the stored tensors in it read."""
    if isinstance(value, Stored):
        return value.read(made)
    if isinstance(value, Mapping):
        return {key: _read(item, made) for key, item in value.items()}
    return type(value)(_read(item, made) for item in value) if type(value) in (list, tuple) else value
