"""The CUDA kernels' own source, run on the CPU: which lane's sums meet which scale, and the inputs of Hopper's tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "ggml_patch" / "src" / "ggml" / "src" / "ggml-cuda"
MMA = "{ emulated_mma(d, a, b, MBQ_MAGIC); }\n"
REGISTERS = """#pragma once
#include "mbq-block.cuh"
inline const uint8_t * emulated_shared;
inline uint32_t mbq_load_shared(uint32_t address) { uint32_t v; memcpy(&v, emulated_shared + address, 4); return v; }
"""


def read(name: str) -> str:
    return (SOURCE / name).read_text(encoding="utf-8")


def replaced(pattern: str, new: str, text: str) -> str:
    """The one match of a pattern (dots match newlines) replaced: instructions of the card that C++ has no word for."""
    done, times = re.subn(pattern, lambda _: new, text, flags=re.DOTALL)
    assert times == 1, pattern
    return done


def between(text: str, begin: str, end: str) -> str:
    return text[text.index(begin) : text.index(end)]


def run_emulated(name: str, sources: Mapping[str, str], work: Path) -> None:
    """emulation/NAME.cpp, which includes ``sources``, compiled as C++ with the types of CUDA, and run. Skips where there is no nvcc."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    for file, text in sources.items():
        (work / file).write_text(text, encoding="utf-8")
    options = ["-x", "c++", "-std=c++17", "-O1", "-Xcompiler", "-fno-strict-aliasing,-ffp-contract=off,-w", f"-I{work}"]
    command = [compiler, *options, str(HERE / "emulation" / f"{name}.cpp"), "-o", str(work / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = subprocess.run([work / name], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout


def test_kernels_on_the_cpu(tmp_path: Path) -> None:
    sources = {name: read(name) for name in ("mbq-block.cuh", "mbq-activations-q8.cuh", "mbq-plan.cuh", "mbq-tile.cuh", "mbq-gemv.cuh")}
    sources["mbq-block.cuh"] = replaced(r"(?<=const int \(&b\)\[2\]\) )\{.*?\n\}\n", MMA, sources["mbq-block.cuh"])
    sources["mbq-tile.cuh"] = replaced(r'asm volatile\("bar\.sync[^;]*;[^;]*;', "wait_for(group + 1, KW*32);", sources["mbq-tile.cuh"])
    sources["registers.cuh"] = REGISTERS + between(read("mbq-wgmma.cuh"), "// 64 or 128 weights of a row", "#endif // MBQ_WGMMA")
    sources["dequantize.cuh"] = between(read("mbq.cu"), "template <typename L>\n", "template <typename T> static __device__")
    run_emulated("kernels", sources, tmp_path)


CAST = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cstdint>
struct dim3_ { int x; } blockIdx, blockDim, threadIdx;
struct half2 { float x, y; };
struct float4 { float x, y, z, w; };
#define __global__
static void ggml_cuda_pdl_lc() {}
static void ggml_cuda_pdl_sync() {}
static half2 __floats2half2_rn(float x, float y) { return { x, y }; }
KERNEL
int main() { // a view whose heads and columns have changed places, as keys have: [8, 5 columns, 3 heads, 2 pictures], columns apart
    enum { D = 8, N = 5, H = 3, B = 2, PITCH = D*H + 4 };
    static float x[B*N*PITCH], y[B*H*N*D];
    for (int i = 0; i < B*N*PITCH; ++i) { x[i] = i; }
    const mbq_cast_args args = { (const char *) x, (half2 *) y, B*H*N*D/4, D/4, N, H, PITCH*4, D*4, N*PITCH*4 };
    blockDim.x = 32;
    for (blockIdx.x = 0; blockIdx.x < (args.quads + 31)/32; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x) { mbq_cast(args); }
    }
    for (int i = 0; i < B*H*N*D; ++i) {
        const int d = i % D, n = i/D % N, h = i/D/N % H, b = i/D/N/H;
        if (y[i] != x[(b*N + n)*PITCH + h*D + d]) { printf("%d\\n", i); return 1; }
    }
    return 0;
}
"""


def test_keys_and_values_change_places(tmp_path: Path) -> None:
    """mbq_cast's own source with floats in the place of halves: every number where the permuted view has it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "cast.cpp").write_text(
        CAST.replace("KERNEL", between(read("mbq-cast.cuh"), "struct mbq_cast_args", "static bool mbq_cast_takes"))
    )
    subprocess.run([compiler, "-std=c++17", "-O1", str(tmp_path / "cast.cpp"), "-o", str(tmp_path / "cast")], check=True)
    ran = subprocess.run([tmp_path / "cast"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_behind_a_product_on_the_cpu(tmp_path: Path) -> None:
    """Bias, residual stream and function behind a product of F16 weights: every number where it belongs, floats and F16."""
    source = between(read("mbq-f16.cuh"), "struct mbq_f16_end_args", "// See ggml_cuda_mul_mat_cublas_impl")
    run_emulated("behind", {"behind.cuh": source}, tmp_path)


def test_layer_norm_of_a_warp_on_the_cpu(tmp_path: Path) -> None:
    """Each column's floats, int8 codes and scale, of widths that fill a warp's registers or do not, with a bias and without."""
    quantize = read("mbq-w4a8-quantize.cuh")
    norm = replaced(r"__shared__ __align__\(16\) int codes", "static int codes", read("mbq-w4a8-layer-norm.cuh"))
    parts = [
        between(quantize, "template <bool tiled>", "// The maximum over a CTA"),
        between(quantize, "// 127 / amax", "// The rows of a product's src[2]"),
        between(read("mbq-w4a8-norm.cuh"), "struct mbq_w4a8_fused_args", "// Quantises a column of `padded` floats"),
        between(norm, "static constexpr int MBQ_LAYER_NORM_WARPS", "template <int R>\nstatic void"),
    ]
    run_emulated("layer_norm", {"layer_norm.cuh": "".join(parts)}, tmp_path)


def test_sums_become_int8_on_the_cpu(tmp_path: Path) -> None:
    """Tiles of several shapes: each sum's function as the quantiser would round and place it, the scales, and which rows a tile has."""
    quantize, sums = read("mbq-w4a8-quantize.cuh"), read("mbq-w4a8-sums.cuh")
    sums = replaced(r'asm volatile\("bar\.sync[^;]*;[^;]*;', "wait_for(group + 1, 128);", sums)
    sums = replaced(r"__shared__ mbq_w4a8_meeting", "static mbq_w4a8_meeting", sums)
    gelu, tiles = read("mbq-w4a8-gelu.cuh"), read("mbq-w4a8-wgmma.cuh")
    parts = [
        between(quantize, "template <bool tiled>", "// The maximum over a CTA"),
        between(quantize, "// 127 / amax", "// Static ranges, one per column"),
        between(gelu, "enum mbq_w4a8_function", "// The node's function"),
        between(read("mbq-w4a8-codes.cuh"), "// Codes of columns", "// Where to store the result"),
        "struct mbq_w4a8_args { mbq_gemm_args gemm; const float * scale; mbq_w4a8_codes codes; };\n",
        between(tiles, "// Which rows of weights a thread multiplies", "#endif // MBQ_WGMMA"),
        between(sums, "// Converts a sum to the stored value", "// Stores two rows of a column"),
        between(sums, "// The codes of f", "#endif // MBQ_WGMMA"),
    ]
    run_emulated("codes", {"codes.cuh": "".join(parts)}, tmp_path)


def test_q_k_and_v_ready_for_attention_on_the_cpu(tmp_path: Path) -> None:
    """One kernel's F16 of all three is that of rotary embeddings, casts and attention's scaling one by one; q lies where its floats did."""
    angles = ("extern __shared__ __align__(16) float mbq_angles[];", "")
    parts = [
        between(read("mbq-cast.cuh"), "struct mbq_cast_args", "static bool mbq_cast_takes"),
        between(read("mbq-rope.cuh"), "struct mbq_rope_angles", "static bool mbq_rope_takes").replace(*angles),
        between(read("mbq-qkv.cuh"), "struct mbq_qkv_args", "// The nodes of a tower's attention").replace(*angles),
    ]
    run_emulated("qkv", {"qkv.cuh": "".join(parts)}, tmp_path)


def test_heads_turn_behind_their_product_on_the_cpu(tmp_path: Path) -> None:
    """Tiles of q, k and v: the F16 of biases, rotary embeddings and scaling one by one, where attention reads it, and nothing else."""
    sums, heads = read("mbq-w4a8-sums.cuh"), read("mbq-w4a8-heads.cuh")
    heads = replaced(r'asm volatile\("bar\.sync[^;]*;[^;]*;', "wait_for(1 + at.warp/4, 128);", heads)
    heads = replaced(r"__shared__ mbq_w4a8_heads", "static mbq_w4a8_heads", heads)
    parts = [
        between(read("mbq-rope.cuh"), "struct mbq_rope_angles", "static __device__ __forceinline__ void mbq_rope_turn(float4"),
        "struct mbq_w4a8_args { mbq_gemm_args gemm; const float * scale; mbq_rope_angles angles; };\n",
        between(read("mbq-w4a8-wgmma.cuh"), "// Which rows of weights a thread multiplies", "#endif // MBQ_WGMMA"),
        between(sums, "// Converts a sum to the stored value", "// Stores two rows of a column"),
        between(heads, "// Shared memory of a group of four warps", "// Stores four 8 x 8 matrices"),
        between(heads, "// Copies `columns` of a tile", "#endif // MBQ_WGMMA"),
    ]
    run_emulated("heads", {"heads.cuh": "".join(parts)}, tmp_path)


def test_patches_of_a_picture_on_the_cpu(tmp_path: Path) -> None:
    """Bytes and floats, raster order and groups of 2 x 2, several patches per block: every number in its place, with the CPU's bits."""
    header = (SOURCE.parents[1] / "include" / "ggml-patches.h").read_text(encoding="utf-8")
    kernel = replaced("__shared__ T table", "static T table", read("mbq-patches.cu"))
    parts = [
        between(header, "struct ggml_patches_params", "static constexpr uint32_t"),
        between(header, "struct ggml_patch_place", "template <typename T, typename F>"),
        between(kernel, "struct mbq_patches_args", "void ggml_cuda_mbq_patches"),
    ]
    run_emulated("patches", {"patches.cuh": "".join(parts)}, tmp_path)
