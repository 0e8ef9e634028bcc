"""The CUDA kernels without a GPU: they compile within their limits of registers and spills (slow: 12 to 50 seconds per file and GPU), and
divide their work as planned.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_compiler import HERE, SOURCE, nvcc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mbq_gguf.llama_cpp import paths

ROW_SCALE = SOURCE.with_name("mbq-w4a8.cu")
ATTENTION = SOURCE.with_name("mbq-attention.cu")
# Architecture -> the most registers and bytes of spills that any kernel may take; none of these lies in the loop over weights. 65536
# registers are shared by 16 warps of mbq_mmv, which makes 128 for a thread, and by 12 of mbq_gemm, 168.
BOUNDS: dict[str, dict[str, int]] = json.loads((HERE / "cuda_resources.json").read_text())
LARGEST_WORD = 0x3DF << 6 | 63  # the largest finite scale and zero point
FUNCTION = re.compile(
    r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+.*?Used (\d+) registers"
)


def compile_kernels(architecture: str, work: Path, source: Path = SOURCE) -> str:
    """What the assembler says of each kernel."""
    options = ["-O3", "-use_fast_math", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    return nvcc(*options, "-cubin", "-o", str(work / "mbq.cubin"), str(source))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BOUNDS)
def test_kernels_keep_within_registers(architecture: str, tmp_path: Path) -> None:
    said = compile_kernels(architecture, tmp_path)
    assert "serialized" not in said, "wgmma waits for registers after every instruction"
    kernels = FUNCTION.findall(said)
    products = [kernel for kernel in kernels if "mbq_mmv" in kernel[0]]
    assert len(products) == 32, "four types times one and up to 8, 16 and 32 columns, with and without the tensor memory accelerator"
    for name, stores, loads, registers in kernels:
        assert int(registers) <= BOUNDS[architecture]["gemm_registers" if "mbq_gemm" in name else "registers"], name
        assert int(stores) + int(loads) <= BOUNDS[architecture]["spill_bytes"], name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BOUNDS)
def test_row_scale_kernels_keep_within_registers(architecture: str, tmp_path: Path) -> None:
    said = compile_kernels(architecture, tmp_path, ROW_SCALE)
    assert "serialized" not in said, "wgmma waits for registers after every instruction"
    kernels = FUNCTION.findall(said)
    products = sum("mbq_w4a8_gemm" in kernel[0] for kernel in kernels)
    assert products == 2 * (8 + 4 + 4), "4 and 8 bits; eight shapes, and those four of 64 rows that write int8, or heads for attention"
    for name, stores, loads, registers in kernels:
        assert int(registers) <= BOUNDS[architecture]["gemm_registers" if "mbq_w4a8_gemm" in name else "registers"], name
        assert int(stores) + int(loads) <= BOUNDS[architecture]["spill_bytes"], name


@pytest.mark.slow
def test_attention_keeps_within_registers(tmp_path: Path) -> None:
    """Twelve warps begin with 168 registers a thread; setmaxnreg makes 240 of the consumers'."""
    said = compile_kernels("90a", tmp_path, ATTENTION)
    assert "serialized" not in said, "wgmma waits for registers after every instruction"
    kernels = [kernel for kernel in FUNCTION.findall(said) if "mbq_attentionILi" in kernel[0]]
    assert len(kernels) == 8, "heads of 64, 72, 80 and 128, with and without a mask"
    assert {registers for *_, registers in kernels} == {"168"}
    assert max(int(stores) + int(loads) for _, stores, loads, _ in kernels) <= 32, "4 registers, outside of the loop"


def host_program(source: str, work: Path) -> Path:
    """A program of this folder; it needs no GPU, and with -O1 nothing of ggml."""
    program = work / source.removesuffix(".cu")
    nvcc("-O1", "-arch=sm_90a", "-Xlinker", "--unresolved-symbols=ignore-all", "-o", str(program), str(HERE / source))
    return program


def test_scale_words(tmp_path: Path) -> None:
    """Scale and zero point of every scale word that quantisation can write (docs/format.md), exactly, in either half of 32 bits."""
    said = subprocess.run([host_program("mbq_scale_words.cu", tmp_path)], capture_output=True, text=True, check=True).stdout
    found = np.array([[float.fromhex(word) for word in line.split()] for line in said.splitlines()])
    words = np.arange(LARGEST_WORD + 1, dtype=np.uint16)
    scale, zero = (words >> 6 << 5).view(np.float16).astype(np.float64), (words & 63) / 8
    assert np.array_equal(found[: LARGEST_WORD + 1], np.stack([scale, -zero, scale, -zero], axis=1))


@pytest.fixture(scope="module")
def stream_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that prints how mbq_gemm's work is shared out."""
    return host_program("mbq_stream_k.cu", tmp_path_factory.mktemp("stream_k"))


def parts(stream_k: Path, *case: int) -> tuple[list[int], list[list[int]]]:
    """The plan (cluster, workers, streamk_tiles, converters, early), and each part: worker, tile, first step, last step + 1."""
    lines = subprocess.run([stream_k, *map(str, case)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(word) for word in lines[0].split()[1:]], [[int(word) for word in line.split()] for line in lines[1:]]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 260), st.integers(1, 16), st.integers(1, 240), st.sampled_from([4, 66, 114, 132]))
def test_workers_cover_every_tile_once(stream_k: Path, rows: int, columns: int, steps: int, multiprocessors: int) -> None:
    """Each step of each tile belongs to one part; only a worker's first part may begin within a tile, for those sums are left early."""
    (cluster, count, _, converters, early), found = parts(stream_k, rows, columns, 128 * steps, multiprocessors)
    assert 1 <= count <= (multiprocessors - converters) // cluster
    assert converters % cluster == 0
    assert 0 < early < 2 * steps if converters else early == 2 * steps
    tiles = -(-rows // cluster) * -(-columns // cluster)
    covered = sorted((tile, first, last) for _, tile, first, last in found)
    expected = 0
    for tile, first, last in covered:
        assert tile * steps + first == expected
        assert first < last <= steps
        expected = tile * steps + last
    assert expected == tiles * steps
    begun: set[int] = set()
    for worker, _, first, _ in found:
        assert first == 0 or worker not in begun
        begun.add(worker)
    assert begun == set(range(count))  # nobody is idle


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ((32, 4, 14336), (2, 64, 32, 4, 151)),  # 4096 x 14336 by 512: 97 us, 102 without converters, 110 in 128 tiles of 128 columns
        ((28, 4, 18944), (1, 112, 0, 20, 16)),  # 3584 x 18944: 120 us, 137 in 132 shares, 124 in 66 clusters
        ((64, 4, 29568), (2, 64, 0, 4, 112)),  # 8192 x 29568: 337 us, 364 without converters
        ((12, 4, 8960), (1, 132, 48, 0, 140)),  # 1536 x 8960: 40 us, 47 in 66 clusters
    ],
)
def test_measured_plans(stream_k: Path, shape: tuple[int, int, int], plan: tuple[int, int, int]) -> None:
    assert tuple(parts(stream_k, *shape, 132)[0]) == plan


@pytest.fixture(scope="module")
def w4a8_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that prints how the products of weights with one scale per row are shared out."""
    return host_program("mbq_w4a8_plan.cu", tmp_path_factory.mktemp("w4a8_plan"))


def plan_of(program: Path, kind: str, *case: int) -> list[int]:
    """What the program prints for a case."""
    return [
        int(word) for word in subprocess.run([program, kind, *map(str, case)], capture_output=True, text=True, check=True).stdout.split()
    ]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 30000),
    st.integers(1, 5000),
    st.integers(1, 128),
    st.sampled_from([(4, 0), (4, 1), (66, 16), (114, 26), (132, 32)]),
    st.sampled_from(["dense", "dense, in turns", "not dense"]),
    st.sampled_from([4, 8]),
)
def test_row_scale_plans_cover_all_tiles(
    w4a8_plan: Path, rows: int, columns: int, steps: int, device: tuple[int, int], kind: str, bits: int
) -> None:
    """Tiles cover rows and columns; a cut tile has all its workers at once, and never more parts than steps."""
    dense, in_turns = kind.startswith("dense"), kind.endswith("turns")
    multiprocessors, fours = device
    shape, height, width, cluster, m_tiles, n_tiles, workers, parts = plan_of(
        w4a8_plan, "gemm", rows, columns, steps, *device, int(dense), bits, int(in_turns)
    )
    assert (shape == 7) == (not dense)
    assert not in_turns or height == 64
    assert cluster < 4 or workers <= fours
    assert (m_tiles - 1) * height * cluster < rows <= m_tiles * height * cluster
    assert (n_tiles - 1) * width < columns <= n_tiles * width
    assert 1 <= parts <= steps
    assert workers * cluster <= multiprocessors
    assert workers == parts * m_tiles * n_tiles if parts > 1 else 1 <= workers <= m_tiles * n_tiles


@pytest.mark.parametrize(
    ("bits", "case", "plan"),
    [  # microseconds of an H100 (4096 x 14336, 512 x 3584), else of an H200, which runs 30 clusters of four
        (4, (4096, 512, 56), (1, 64, 1)),  # 59 with the quantising
        (4, (512, 512, 14), (0, 64, 2)),  # 12, with 128 columns in two parts 14
        (4, (37888, 512, 14), (5, 66, 1)),  # 111, with 128 columns 117
        (4, (4608, 512, 14), (3, 54, 1)),  # 23.5, with 256 columns 27
        (4, (18944, 1060, 14), (2, 65, 1)),  # 116, with 256 columns 135
        (4, (37888, 300, 14), (2, 60, 1)),  # 75, with 256 columns 111
        (4, (3584, 300, 74), (2, 56, 2)),  # 43, with 128 columns 59
        (8, (3840, 4096, 5), (6, 30, 1)),  # 45, by two 47
        (8, (1280, 4096, 20), (6, 27, 1)),  # 56, by two 58
        (8, (1280, 4096, 5), (2, 65, 1)),  # 25.6, with 256 columns 27.8
        (8, (5120, 4096, 5), (5, 64, 1)),  # 58, by four 60
        (8, (1280, 1024, 5), (4, 30, 1)),  # 11.3, and by two
        (8, (1280, 1024, 20), (4, 30, 1)),  # 19.2, by two 20.7
        (8, (5120, 1024, 5), (6, 27, 1)),  # 20.9, with 176 columns 21.8
    ],
)
def test_measured_row_scale_plans(w4a8_plan: Path, bits: int, case: tuple[int, int, int], plan: tuple[int, int, int]) -> None:
    found = plan_of(w4a8_plan, "gemm", *case, 132, 30, 1, bits, 0)
    assert (found[0], *found[6:]) == plan


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        ((4096, 56), (8, 2)),  # 14.0 us, 14.1 with 16 warps a tile
        ((3584, 74), (16, 1)),  # 16.3 us, 17.7 with 8
        ((18944, 14), (5, 3)),  # 15.7 us, 16.2 with 8, 18.3 with 14
    ],
)
def test_measured_row_scale_plans_of_one_column(w4a8_plan: Path, case: tuple[int, int], plan: tuple[int, int]) -> None:
    rows, pieces = case
    kw, groups, ctas, stages = plan_of(w4a8_plan, "mmv", rows, pieces, 16 * pieces, 4, 16 * 144, 132, 231296)
    assert (kw, groups) == plan
    assert ctas <= 132
    assert kw * groups * (1024 + stages * 16 * 144) + 256 * pieces <= 231296


@pytest.fixture(scope="module")
def w4a8_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that decides on random graphs, and on a layer as llama.cpp builds it, what products share."""
    folder = paths.find_library("ggml-base").parent
    program = tmp_path_factory.mktemp("w4a8_graphs") / "graphs"
    libraries = [f"-L{folder}", "-lggml-base", "-Xlinker", f"-rpath={folder}", "-Xlinker", "--unresolved-symbols=ignore-all"]
    nvcc("-O1", "-arch=sm_90a", str(HERE / "mbq_w4a8_graphs.cu"), *libraries, "-o", str(program))
    return program


def decided(program: Path, *arguments: object) -> list[int]:
    """The numbers that it prints."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return [int(word) for word in done.stdout.split()]


def test_what_a_product_finds_is_what_its_activations_are(w4a8_graphs: Path) -> None:
    """4000 random graphs whose tensors lie over one another, each run twice: nothing stale is found, nothing held outlives its graph."""
    products, found, made = decided(w4a8_graphs, "inputs", 4000)
    assert products > found > made > 5000


def test_products_of_one_column_run_before_their_turn(w4a8_graphs: Path) -> None:
    """1500 random graphs whose tensors lie over one another: each node gives what it gives in order, whatever CTA runs first."""
    launches, early, added = decided(w4a8_graphs, "column", 1500)
    assert added > early > launches > 800


@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize("bias", [0, 1])
def test_q_k_and_v_of_a_layer_are_one_kernel(w4a8_graphs: Path, bias: int, norm: int) -> None:
    """With places kept as CUDA asks the scheduler; without, v and k would lie where q is still read (they share one kernel at v)."""
    assert decided(w4a8_graphs, "layer", bias, norm, 1) == [3, 1]
    assert decided(w4a8_graphs, "layer", bias, norm, 0) == [1, 2, 1]
