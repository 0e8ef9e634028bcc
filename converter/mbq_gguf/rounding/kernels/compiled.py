"""The C kernels for CPUs: compiled.c, compiled at first use with the C compiler that building llama.cpp needs anyway.

Rounding a layer of the reference VLM takes 0.72 s of a core instead of 1.44. The library is cached under a hash of its source, flags and
compiler.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cffi
import torch

from mbq_gguf.formats.grid import Grid, Pair, Parameter
from mbq_gguf.llama_cpp.cache import cache_root
from mbq_gguf.llama_cpp.machine import c_compiler
from mbq_gguf.rounding.kernels.group import Group

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Uses the instruction sets that PyTorch has detected, not all that the CPU lists: hypervisors mask some.
INSTRUCTIONS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
TILE = 64  # rows at a time in compiled.c
LARGEST_SYSTEM = 128  # largest system per row that compiled.c factors; for larger ones a library is faster
FP16, ZERO, UNSTEPPED, STEPPED = range(4)
STRUCTURES = """
struct parameter { int32_t kind; float low, high; };
struct grid { int32_t word, plain; float low, high; struct parameter scale, offset; };
"""
FFI = cffi.FFI()
FFI.cdef(STRUCTURES + "".join(f"{head};" for head in re.findall(r"^void [^{]*", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)))


@cache
def library() -> Any | None:
    """The compiled functions, or None if there is no working compiler."""
    compiler = c_compiler()
    if compiler is None:
        return None
    before = os.environ.get("CC", "").split()[1:]  # as in CC="ccache gcc"
    command = [str(compiler), *before, *FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())]
    with suppress(OSError, subprocess.SubprocessError):
        made_of = f"{command} {compiler.stat().st_mtime_ns}".encode() + SOURCE.read_bytes()
        path = cache_root() / "rounding" / f"{hashlib.sha256(made_of).hexdigest()[:24]}.so"
        if not path.is_file():
            _compile(command, path)
        return FFI.dlopen(str(path))
    return None


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:  # if several processes compile at once, the last one wins; all results are the same
        made = Path(folder) / path.name
        subprocess.run([*command, str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True, timeout=120)
        os.replace(made, path)


def search(
    grid: Grid, groups: torch.Tensor, costs: torch.Tensor, steps: torch.Tensor | None, shares: tuple[float, ...], turns: int
) -> Pair:
    """Scale and offset [..., 1] for ``groups`` [..., group]; see :func:`mbq_gguf.rounding.ranges.search_range`. ``costs`` are [group] or
    [n, group] for ``groups`` [..., n, group], ``steps`` are [..., 2]; ``shares`` are the shares of the range to try at either end."""
    flat, costs = groups.reshape(-1, grid.group), costs.contiguous()
    flat_steps = None if steps is None else steps.reshape(-1, 2).contiguous()
    scale, offset = (torch.empty(*groups.shape[:-1], 1) for _ in range(2))
    tried, kinds, given = torch.tensor(shares), costs.numel() // grid.group, _grid(grid, steps is not None)
    pointers = [_floats(each) for each in (flat, costs, flat_steps, tried)]
    found = [_floats(each) for each in (scale, offset)]
    _by_rows(len(flat), "search", given, *pointers, len(shares), turns, *found, kinds, grid.group, *flat.stride())
    return scale, offset


def round_group(group: Group) -> None:
    """GPTQ's loop over the group's columns: :func:`mbq_gguf.rounding.gptq._round_group`."""
    columns, rows = group.work.shape
    line = group.line.contiguous()
    assert group.factor.stride(1) == 1
    pointers = [_floats(each) for each in (group.work, group.factor, line, group.codes, group.errors)]
    stride, start, count = group.factor.stride(0), group.columns.start, len(group.columns)
    _by_rows(rows, "round_group", *pointers, rows, columns, start, count, stride, group.low, group.high)


def descend_columns(
    slope: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """Changes of the weights in one pass of coordinate descent; see :func:`mbq_gguf.rounding.descent._descend_columns`. All are
    [columns, rows] with contiguous rows; updates ``codes`` in place."""
    columns, rows = slope.shape
    changes = torch.empty_like(codes)
    assert matrix.stride(1) == 1
    pointers = [_floats(each) for each in (slope, matrix, scales, codes, changes)]
    _by_rows(rows, "descend_columns", *pointers, rows, columns, matrix.stride(0), low, high)
    return changes


def fill(system: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, groups: int) -> None:
    """The lower triangle of F H F^T; see :func:`mbq_gguf.rounding.refit._fill`."""
    rows, columns = codes.shape
    size = columns // groups
    by_columns = codes.t().contiguous()
    sums = hessian.view(groups, size, columns).sum(dim=1)
    squares = sums.double().view(groups, groups, size).sum(dim=2)
    systems, given = FFI.cast("double *", system.data_ptr()), _floats(by_columns)
    for group in range(groups):
        here = slice(group * size, (group + 1) * size)
        by_scale = hessian[here, here.start :].t() @ by_columns[here]
        pointers = _floats(by_scale), _floats(sums[group]), FFI.cast("double *", squares[group].data_ptr())
        _by_rows(rows, "fill", systems, given, *pointers, rows, columns, groups, group)


def factor(system: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Replace ``system`` [rows, numbers, numbers] by its Cholesky factor L and ``right`` [rows, numbers] by the solution of L y = right, in
    place; returns both and a mask of the rows that have a factor. None if a system is too large."""
    rows, numbers = right.shape
    if numbers > LARGEST_SYSTEM:
        return None
    positive = torch.empty(rows, dtype=torch.bool)
    pointers = [FFI.cast(f"{kind} *", each.data_ptr()) for kind, each in (("double", system), ("double", right), ("uint8_t", positive))]
    _by_rows(rows, "factor", *pointers, numbers)
    return system, right, positive


def take_steps(halfway: torch.Tensor, lower: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, word: bool) -> Pair:
    """Scales and offsets, rounded one after the other; see :func:`mbq_gguf.rounding.refit._take_steps`. ``word``: MBQ3S's scale words
    instead of fp16."""
    rows, groups = scale.shape
    new_scale, new_offset = torch.empty_like(scale), torch.empty_like(offset)
    numbers = [FFI.cast("double *", each.data_ptr()) for each in (halfway, lower)]
    pointers = [_floats(each) for each in (scale, offset, new_scale, new_offset)]
    _by_rows(rows, "take_steps", *numbers, *pointers, groups, *lower.stride(), word)
    return new_scale, new_offset


def _by_rows(rows: int, name: str, *arguments: Any) -> None:
    """Call function ``name`` for all rows, with as many threads as PyTorch uses; rows are independent."""
    function = getattr(library(), name)
    share = math.ceil(rows / TILE / torch.get_num_threads()) * TILE
    firsts = range(0, rows, share)
    if len(firsts) == 1:
        function(*arguments, 0, rows)
        return
    list(_pool(os.getpid()).map(lambda first: function(*arguments, first, min(first + share, rows)), firsts))


@cache
def _pool(_process: int) -> ThreadPoolExecutor:  # one pool per process: threads do not survive a fork
    return ThreadPoolExecutor(os.cpu_count())


def _floats(x: torch.Tensor | None) -> Any:
    assert x is None or x.dtype == torch.float32
    return FFI.NULL if x is None else FFI.cast("float *", x.data_ptr())


@cache
def _grid(grid: Grid, stepped: bool) -> Any:
    """``grid`` as compiled.c's struct, for blocks with or without given steps."""
    parameters = (_parameter(each, stepped) for each in (grid.scale, grid.offset))
    return FFI.new("struct grid *", [grid.held_pair is not None, grid.fit is not None, grid.low, grid.high, *parameters])


def _parameter(parameter: Parameter, stepped: bool) -> list[float]:
    if parameter.low is None or parameter.high is None:
        return [FP16, 0, 0]
    kind = ZERO if parameter.low == parameter.high else STEPPED if stepped else UNSTEPPED
    return [kind, parameter.low, parameter.high]
