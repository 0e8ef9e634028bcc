"""Weights that stay in the checkpoint's files until they are needed, so that memory holds only the part of a model that is being computed.

A :class:`LazyTensor` has a shape and a dtype but no values (it is on torch's meta device). While transformers turns a checkpoint's tensors
into a model's parameters, its operations are recorded: an operation on a lazy tensor gives another one that knows how it was made. Reading
it reads the tensors that it came from and repeats the operations. Experts that a checkpoint stores one by one, for example, are stacked
only when their layer is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32}
MAPPED = 64 * 10**6  # bytes to read from a file before it is reopened, which releases the mapped pages
Staged = dict[int, torch.Tensor]  # tensors that were read ahead, by the id of their FileTensor


class ReadCache:
    """Results of sources (:class:`FileTensor`, operations) until their last use, and open files.

    ``values`` is what will be read: it determines how often each source is used. Anything else is read without being kept. ``staged`` is
    not read again, and is emptied as it is used. Without this, a layer with 64 experts that a GPU stacks takes 9.3 bytes per weight, not
    6, while it becomes float32.
    """

    def __init__(self, values: Iterable[torch.Tensor] = (), staged: Staged | None = None) -> None:
        self.files: dict[Path, tuple[Any, int]] = {}  # open files, and the bytes mapped from each
        self._results: dict[int, Any] = {} if staged is None else staged
        self._uses: Counter[int] = Counter()
        for value in values:
            self._count(value)

    def result_of(self, source: object, make: Callable[[], Any]) -> Any:
        """The result of ``source``, by ``make`` if it is not here."""
        key = id(source)
        found = self._results.pop(key) if key in self._results else make()
        self._uses[key] -= 1
        if self._uses[key] > 0:
            self._results[key] = found
        return found

    def _count(self, value: Any) -> None:
        for source in _sources(value):
            self._uses[id(source)] += 1
            if self._uses[id(source)] == 1 and isinstance(source, _Call):  # is executed once
                self._count((source.args, source.kwargs))


class LazyTensor(torch.Tensor):
    """A tensor without values; :meth:`read` gives them."""

    source: Callable[[ReadCache], Any]

    @classmethod
    def of(cls, like: torch.Tensor, source: Callable[[ReadCache], Any]) -> LazyTensor:
        """A tensor with shape and dtype of ``like``, on the meta device, whose values come from ``source``."""
        made: LazyTensor = torch.Tensor._make_subclass(cls, like)
        made.source = source
        return made

    def read(self, made: ReadCache | None = None) -> torch.Tensor:
        """The values, on the host, or on the device of what ``made`` has of them. They may be in a mapped file, so copy them before
        changing them."""
        found = self.source(ReadCache([self]) if made is None else made)
        assert isinstance(found, torch.Tensor)
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__deepcopy__:
            return args[0]  # immutable
        if func is torch.Tensor.to:
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            raise TypeError(f"a lazy tensor cannot be changed in place ({name})")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if (args and found is args[0]) or not _tensors(found):
            return found
        call = _Call(func, args, kwargs)
        if isinstance(found, torch.Tensor):
            return cls.of(found, call)
        return type(found)(cls.of(part, _Part(call, place)) for place, part in enumerate(found))


class _Call:
    """An operation on lazy tensors, executed when its result is read."""

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs

    def __call__(self, made: ReadCache) -> Any:
        return made.result_of(self, lambda: self.func(*_read(self.args, made), **_read(self.kwargs, made)))


class _Part:
    """One result of an operation with several."""

    def __init__(self, call: _Call, place: int) -> None:
        self.call, self.place = call, place

    def __call__(self, made: ReadCache) -> Any:
        return self.call(made)[self.place]


class FileTensor:
    """A tensor of a checkpoint file."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __call__(self, made: ReadCache) -> Any:
        return made.result_of(self, lambda: self._read(made.files))

    def _read(self, files: dict[Path, tuple[Any, int]]) -> torch.Tensor:
        opened, mapped = files.pop(self.file, None) or (safe_open(str(self.file), framework="pt"), 0)
        tensor: torch.Tensor = opened.get_tensor(self.name)
        if mapped + tensor.nbytes <= MAPPED:  # keep it open: parsing a header of 12288 tensors takes 10 ms
            files[self.file] = (opened, mapped + tensor.nbytes)
        return tensor


def lazy_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """All tensors of safetensors ``files`` by name; reads only the headers."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:  # not a weight dtype, and small
                    found[name] = opened.get_tensor(name)
                else:
                    found[name] = LazyTensor.of(torch.empty(part.get_shape(), dtype=dtype, device="meta"), FileTensor(file, name))
    return found


def materialise(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, left: Sequence[nn.Module] = (), staged: Staged | None = None
) -> None:
    """Read all lazy tensors of ``module`` in place, and move everything to ``device``, floating point to ``dtype`` (None: as stored).

    Modules ``left`` and their submodules stay as they are. What is ``staged`` is not read again, and released when it has been used."""
    skipped = {id(inner) for outer in left for inner in outer.modules()}
    found = [(owner, name, value) for owner, name, value in tensors_of(module) if id(owner) not in skipped]
    made = ReadCache({id(value): value for _, _, value in found}.values(), staged)
    placed: dict[int, torch.Tensor] = {}  # a tensor that two modules share stays shared
    for owner, name, value in found:
        if id(value) not in placed:
            placed[id(value)] = materialised(value, device, dtype, made)
        set_tensor(owner, name, placed[id(value)])


def file_tensors(value: Any, seen: set[int] | None = None) -> Iterator[FileTensor]:
    """The checkpoint tensors that ``value``, or the values in it, are made from, each once; those ``seen`` (by identity) are left out."""
    seen = set() if seen is None else seen
    for source in _sources(value):
        if id(source) in seen:
            continue
        seen.add(id(source))
        if isinstance(source, _Call):
            yield from file_tensors((source.args, source.kwargs), seen)
        else:
            yield source


def _sources(value: Any) -> Iterator[FileTensor | _Call]:
    """What ``value``, or the values in it, are read from directly."""
    match value.source if isinstance(value, LazyTensor) else value:
        case FileTensor() | _Call() as source:
            yield source
        case _Part() as part:
            yield part.call
        case list() | tuple() as several:
            for each in several:
                yield from _sources(each)
        case Mapping() as named:
            yield from _sources(list(named.values()))


def set_tensor(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set parameter or buffer ``name`` of ``owner`` to ``value``."""
    if isinstance(value, nn.Parameter):
        owner._parameters[name] = value
    else:
        owner._buffers[name] = value


def materialised(value: torch.Tensor, device: torch.device, dtype: torch.dtype | None, made: ReadCache) -> torch.Tensor:
    """``value`` on ``device`` in ``dtype``, read from its file if it is lazy; a parameter stays a parameter."""
    found = value.read(made) if isinstance(value, LazyTensor) else value.detach()
    found = found.to(device, non_blocking=found.is_pinned())  # before the conversion: transfer the checkpoint's 16 bits, not 32
    found = found.to(dtype) if dtype is not None and found.is_floating_point() else found
    if isinstance(value, LazyTensor) and device.type == "cpu" and found.dtype == value.dtype:
        found = found.clone()  # do not keep the file mapped
    return nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Every parameter and buffer with its owner and its name there; a shared one appears once per owner."""
    for owner in module.modules():
        for name, value in (*owner._parameters.items(), *owner._buffers.items()):
            if value is not None:
                yield owner, name, value


def _tensors(found: Any) -> bool:
    if isinstance(found, tuple | list):
        return bool(found) and all(isinstance(part, torch.Tensor) for part in found)
    return isinstance(found, torch.Tensor)


def _read(value: Any, made: ReadCache) -> Any:
    """``value`` with all lazy tensors in it read."""
    if isinstance(value, LazyTensor):
        return value.read(made)
    if isinstance(value, Mapping):
        return {key: _read(item, made) for key, item in value.items()}
    return type(value)(_read(item, made) for item in value) if type(value) in (list, tuple) else value
