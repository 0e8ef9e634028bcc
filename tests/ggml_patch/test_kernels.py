"""The CPU kernels of each instruction set that this processor supports: any number of rows, columns, threads and batches."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mbq_gguf.llama_cpp import paths

# Both sides add the same exact integers times the same scales; only the order of the float additions differs. As a share of the sum
# of |w * x|; the worst of 600 cases was 4.5e-7.
ROUNDING = 2e-6

TESTS = Path(__file__).parents[1]
AVX2 = ("-mavx2", "-mfma", "-mf16c")
SETS = {
    "as built": None,
    "avx2": AVX2,
    "avx2 with vnni": (*AVX2, "-mavxvnni"),
    "scalar": (),
}
FLAGS_NEEDED: dict[str, set[str]] = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx2 with vnni": {"avx2", "fma", "f16c", "avx_vnni"},
}


def processor_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} to compile the test program with")
    return found


def includes(tree: Path) -> list[str]:
    return [f"-I{tree / 'ggml' / folder}" for folder in ("include", "src", "src/ggml-cpu")]


@pytest.fixture(scope="module")
def products(built_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program mbq_products, linked with the built libraries."""
    program = tmp_path_factory.mktemp("kernels") / "mbq_products"
    libraries = paths.find_library("ggml-cpu").parent
    command = [compiler("cc"), "-O1", *includes(built_llama), Path(__file__).parent / "mbq_products.c", "-o", program]
    command += [f"-L{libraries}", "-lggml-cpu", "-lggml-base", "-lm", f"-Wl,-rpath,{libraries}"]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module", params=SETS)
def environment(request: pytest.FixtureRequest, built_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the patch's CPU kernels are those of one instruction set: compiled for it, and loaded over the built ones."""
    if platform.machine() != "x86_64":
        pytest.skip("the other instruction sets are those of x86")
    if missing := FLAGS_NEEDED.get(request.param, set()) - processor_flags():
        pytest.skip(f"this processor has no {' '.join(sorted(missing))}")
    own = os.environ | {"OMP_WAIT_POLICY": "passive"}
    if (flags := SETS[request.param]) is None:
        return own
    sources, library = built_llama / "ggml" / "src" / "ggml-cpu" / "mbq", tmp_path_factory.mktemp("kernels") / "kernels.so"
    command = [compiler("c++"), "-O2", "-fPIC", "-shared", "-std=gnu++17", "-D_GNU_SOURCE", "-w", *flags, *includes(built_llama)]
    built = paths.find_library("ggml-cpu").parent
    command += [*(sources / name for name in ("mbq-vec.cpp", "mbq.cpp", "row-scale.cpp")), "-o", library]
    subprocess.run([*command, f"-L{built}", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{built}"], check=True)
    return own | {"LD_PRELOAD": str(library)}


def test_products_agree(products: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([products, "200"], env=environment, capture_output=True, text=True, check=True)
    product, dot = map(float, done.stdout.split())
    assert product <= ROUNDING
    assert dot <= ROUNDING


def test_one_scale_a_row_and_cuts_of_a_batch(environment: dict[str, str]) -> None:
    """The bindings' own tests once more: products with one scale per row are the contract's, and cuts of a batch change nothing."""
    if "LD_PRELOAD" not in environment:
        pytest.skip("they run by themselves as it is built")
    files = [TESTS / "cbind" / name for name in ("test_row_scale_product.py", "test_batch_cuts.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
