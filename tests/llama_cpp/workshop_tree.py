"""A tiny replacement for the llama.cpp tree and a tiny source package: real CMake, compiler, git and pip, in a cache below tmp_path."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from mbq_gguf.llama_cpp.build import PROGRAMS
from rich.console import Console

CMAKE = f"""
cmake_minimum_required(VERSION 3.14)
project(tiny C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
add_library(ggml-cpu SHARED kernel.c)
target_compile_definitions(ggml-cpu PRIVATE NATIVE=$<BOOL:${{GGML_NATIVE}}>)
foreach(program {" ".join(PROGRAMS)})
    add_executable(${{program}} main.c)
    target_link_libraries(${{program}} PRIVATE ggml-cpu)
endforeach()
"""
KERNEL = "int kernel(void) {\n    return 7;\n}\n"
MAIN = "int kernel(void);\nint main(void) { return kernel() == 42 ? 0 : 1; }\n"
# The patch makes the final check pass: unpatched, main() returns 1.
PATCH = """The answer.
--- a/kernel.c
+++ b/kernel.c
@@ -1,3 +1,4 @@
+#include "mbq-answer.h"
 int kernel(void) {
-    return 7;
+    return MBQ_ANSWER;
 }
"""
# Stands in for kernel_check.py: loads the tiny library and runs its one kernel.
PROOF = """
import ctypes, sys
print("the one kernel", flush=True)
sys.exit(0 if ctypes.CDLL(sys.argv[1] + "/libggml-cpu.so").kernel() == 42 else 1)
"""
# What setuptools runs to say a source package's name and version; whoever runs it before its checksum was compared, or at all, is seen.
SETUP = """
import pathlib, setuptools
pathlib.Path({witness!r}).touch()
setuptools.setup(name="tinyllama", version="1.0")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "setuptools.build_meta"\n[project]\nname = "tinyllama"\nversion = "1.0"\n'
FILES = {
    "tree/CMakeLists.txt": CMAKE,
    "tree/ggml/CMakeLists.txt": "",
    "tree/kernel.c": KERNEL,
    "tree/main.c": MAIN,
    "ggml_patch/patches/0001-answer.patch": PATCH,
    "ggml_patch/src/mbq-answer.h": "#define MBQ_ANSWER 42\n",
    "proof.py": PROOF,
}


@dataclass
class Workshop:
    """One test's own cache, patch folder, tree and package index."""

    root: Path
    console: Console

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def patch(self) -> Path:
        return self.root / "ggml_patch"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def witness(self) -> Path:
        """The file that the source package writes as soon as any code of it runs."""
        return self.root / "the package ran"

    def printed(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()

    def builds(self) -> list[str]:
        folder = self.cache / "builds"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def write_pin(self, sha256: str) -> None:
        text = f"# a comment\npackage = tinyllama\nversion = 1.0\nsha256 = {sha256}\nsubdirectory = vendor/llama.cpp\n"
        (self.patch / "PIN").write_text(text)

    def make_package(self) -> Path:
        """The source package tinyllama 1.0 with the tree in vendor/llama.cpp; the pin is set to its checksum."""
        inside = self.root / "tinyllama-1.0"
        (inside / "elsewhere").mkdir(parents=True)
        (inside / "elsewhere" / "not-wanted").write_text("")
        for name, text in (
            ("setup.py", SETUP.format(witness=str(self.witness))),
            ("pyproject.toml", PYPROJECT),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: tinyllama\nVersion: 1.0\n"),
        ):
            (inside / name).write_text(text)
        shutil.copytree(self.tree, inside / "vendor" / "llama.cpp")
        (inside / "vendor" / "llama.cpp" / ".git").write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
        package = self.root / "index" / "tinyllama-1.0.tar.gz"
        package.parent.mkdir()
        with tarfile.open(package, "w:gz") as archive:
            archive.add(inside, arcname=inside.name)
        self.write_pin(hashlib.sha256(package.read_bytes()).hexdigest())
        return package
