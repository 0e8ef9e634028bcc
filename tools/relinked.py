"""Relinks a library of the build with one of its files replaced, for experiments that are not options of the product.

The build itself is unchanged; programs use the other library through LD_LIBRARY_PATH. Needs a build by ninja, which can list its commands.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.machine import find_tool

HERE = Path(__file__).parent
LAUNCHES = ("cudaLaunchKernel", "__cudaLaunchKernel", "cudaLaunchKernelExC")


def relink(build: Path, library: str, folder: Path, replaced: Path | None = None, more: Sequence[str | Path] = ()) -> dict[str, str]:
    """Link ``library`` (``ggml-cpu``) of the tree in ``build`` into ``folder``; returns the environment in which programs use it.

    ``replaced`` is compiled in place of the file with its name, which it may include as MBQ_REPLACED; ``more`` objects and options are
    passed to the linker. Raises UserError if the build is not as expected, or a compiler fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = _link_command(build, library)
    soname = re.search(r"-soname,(\S+)", command)
    output = re.search(r"-o (\S+)", command)
    if soname is None or output is None:
        raise UserError(f"{build} links {library} in an unknown way: build with ninja, by `mbq-gguf build`")
    command = command.replace(f"-o {output[1]}", f"-o {folder / soname[1]} {' '.join(map(str, more))}")
    if replaced is not None:
        object_file = folder.parent / f"{replaced.name}.o"  # once for all libraries beside each other
        old = _compile(build, replaced, object_file)
        if old not in command:
            raise UserError(f"{library} has no {replaced.name}: build with ninja, by `mbq-gguf build`")
        command = command.replace(old, str(object_file))
    _run(command, build)
    return os.environ | {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def counting(build: Path, folder: Path, replaced: Path | None = None) -> dict[str, str]:
    """A CUDA library that prints the number of launched kernels on stderr when it ends: ``launches N``."""
    folder.mkdir(parents=True, exist_ok=True)
    counter = folder / "count_launches.o"
    _run(f"cc -O2 -fPIC -c {HERE / 'count_launches.c'} -o {counter}", build)
    return relink(build, "ggml-cuda", folder, replaced, [counter, *(f"-Wl,--wrap={name}" for name in LAUNCHES)])


def _compile(build: Path, replaced: Path, to: Path) -> str:
    """Compile ``replaced`` with the command for the file of that name; also the build's own object file."""
    known = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    (entry,) = [entry for entry in known if Path(entry["file"]).name == replaced.name]
    output = re.search(r"-o (\S+)", entry["command"])
    assert output is not None
    original = Path(entry["file"])
    own = f"""-I{original.parent} -DMBQ_REPLACED='"{original}"' -c {replaced.absolute()}"""
    command = entry["command"].replace(f"-o {output[1]}", f"-o {to}").replace(f"-c {original}", own)
    if not to.is_file():
        _run(command, Path(entry["directory"]))
    return output[1]


def _link_command(build: Path, library: str) -> str:
    ninja = find_tool("ninja", "ninja-build")  # whichever there is: that of a build in the cache may have gone with its environment
    if ninja is None or not (build / "build.ninja").is_file():
        raise UserError(f"{build} was not made by ninja, or there is none: install it and run `mbq-gguf build` again")
    said = _run(f"{ninja} -t commands bin/lib{library}.so", build)
    return [line for line in said.splitlines() if "-Wl,-soname" in line and f"lib{library}.so" in line][-1]


def _run(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"a command of the build failed ({done.stderr.strip()[-600:]}): run it by hand: {command[:2000]}")
    return done.stdout
