"""Token generation and prompt processing of quantised types on this CPU, in one run of llama-bench on random weights."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.gguf_writer import add_metadata
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.llama_cpp import paths
from rich.console import Console
from rich.table import Table

# Name in the table -> file type of llama-quantize. All are written with --pure: every matrix of the layers has the one type.
FILE_TYPES = {
    "F16": "F16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_K": "Q4_K_S",
    "IQ3_S": "IQ3_S",
    "Q3_K": "Q3_K_S",
    "MBQ3": "MBQ3",
    "MBQ3_64": "MBQ3_64",
    "MBQ3S": "MBQ3S",
    "MBQ3S_64": "MBQ3S_64",
    "W4A8": "Q4_0",  # its blocks, with one scale a row
    "W8A8": "Q8_0",
}
BASELINE = "Q3_K"

# Layer shapes of Qwen2-VL-2B (its config.json); the vocabulary is cut so that the layers, not the output head, are what is timed.
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1536, 8960, 12, 2, 128, 1024


@dataclass(frozen=True)
class Row:
    """What was measured of one type. Tokens a second are medians over the rounds; so are the ratios, each taken within one round."""

    name: str
    bits_per_weight: float  # of the layers' matrices
    model_bytes: int
    generation: float
    generation_ratio: float | None  # to the baseline; None where that was not measured
    generation_spread: float  # (largest - smallest) / median over the rounds
    prompt: float
    prompt_ratio: float | None
    prompt_spread: float
    bandwidth_share: float  # bytes of weights read a second in generation / measured bandwidth


Tensors = dict[str, tuple[Any, Any]]  # name -> values or packed rows, ggml type


def random_layer(seed: int) -> Tensors:
    """Embedding, output norm and one layer of a Qwen2-VL decoder with random weights, matrices in F16."""
    gguf = import_gguf()
    random = np.random.default_rng(seed)
    kinds = gguf.GGMLQuantizationType
    tensors: Tensors = {"output_norm.weight": (np.ones(HIDDEN, np.float32), kinds.F32)}
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM)}
    for name, size in (("attn_q", HEADS * HEAD_DIM), ("attn_k", KV_HEADS * HEAD_DIM), ("attn_v", KV_HEADS * HEAD_DIM)):
        shapes[f"blk.0.{name}"] = (size, HIDDEN)
        tensors[f"blk.0.{name}.bias"] = (np.zeros(size, np.float32), kinds.F32)
    shapes |= {"blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN)}
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{name}.weight"] = (np.ones(HIDDEN, np.float32), kinds.F32)
    for name, (rows, columns) in shapes.items():
        values = random.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
        tensors[f"{name}.weight"] = (values.astype(np.float16), kinds.F16)
    return tensors


def with_row_scales(tensors: Tensors) -> Tensors:
    """The same with each block of the layer's matrices at the scale of its row's first block: other weights, and as fast as any."""
    gguf = import_gguf()
    changed: Tensors = {}
    for name, (values, kind) in tensors.items():
        if name.startswith("blk.") and values.dtype == np.uint8:
            _, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = np.array(values).reshape(len(values), -1, size)
            blocks[:, :, :2] = blocks[:, :1, :2]
            values = blocks.reshape(len(values), -1)
        changed[name] = (values, kind)
    return changed


def write_model(path: Path, tensors: Tensors, layers: int, row_scales: bool = False) -> None:
    """Write a GGUF without a tokenizer in which each of ``layers`` layers is a copy of ``blk.0``; `path` appears when it is whole."""
    gguf = import_gguf()
    partial = path.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "qwen2vl")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_sections([16, 24, 24, 0])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    for layer in range(layers):
        for name, (values, kind) in tensors.items():
            if name.startswith("blk.0."):
                writer.add_tensor(name.replace("blk.0.", f"blk.{layer}."), values, raw_dtype=kind)
            elif layer == 0:
                writer.add_tensor(name, values, raw_dtype=kind)
    if row_scales:
        matrices = [name for name, (values, _) in tensors.items() if name.startswith("blk.") and values.dtype == np.uint8]
        names = [name.replace("blk.0.", f"blk.{layer}.") for layer in range(layers) for name in matrices]
        for key, value in row_scale.metadata(names).items():
            add_metadata(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def prepare_models(folder: Path, names: Sequence[str], layers: int, threads: int, console: Console) -> dict[str, Path]:
    """The GGUF files of ``names`` in ``folder``; those that are missing are made. Only one layer is quantised, then copied."""
    gguf = import_gguf()
    models = {name: folder / f"random-{layers}-{name}.gguf" for name in names}
    missing = {name: model for name, model in models.items() if not model.exists()}
    if not missing:
        return models
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source, packed = Path(temporary, "source.gguf"), Path(temporary, "packed.gguf")
        write_model(source, random_layer(seed=0), layers=1)
        for name, model in missing.items():
            console.print(f"quantising to {name}")
            command: list[str | Path] = [paths.find_program("llama-quantize"), "--pure"]
            command += ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
            _run([*command, source, packed, FILE_TYPES[name], str(threads)])
            reader = gguf.GGUFReader(packed)
            tensors: Tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
            one_scale = name in row_scale.ROW_SCALES
            write_model(model, with_row_scales(tensors) if one_scale else tensors, layers, one_scale)
    return models


def bits_per_weight(model: Path) -> float:
    """Bits of one weight of the layers' matrices, scales included."""
    gguf = import_gguf()
    tensors = [tensor for tensor in gguf.GGUFReader(model).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    return float(8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors))


def memory_bandwidth(threads: int, megabytes: int = 512, passes: int = 15) -> float:
    """Bytes a second that ``threads`` threads together read from arrays far larger than the caches (the best of ``passes``)."""
    arrays = [np.ones(megabytes * 2**20 // threads // 8, np.int64) for _ in range(threads)]
    start = threading.Barrier(threads)
    times = np.empty((threads, passes, 2))

    def read(thread: int) -> None:
        for number in range(passes):
            start.wait()
            times[thread, number, 0] = time.perf_counter()
            np.maximum.reduce(arrays[thread])  # numpy lets go of the interpreter lock here, and has vector code for it
            times[thread, number, 1] = time.perf_counter()

    workers = [threading.Thread(target=read, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    durations = times[:, :, 1].max(axis=0) - times[:, :, 0].min(axis=0)
    return float(sum(array.nbytes for array in arrays) / durations.min())


def measure(models: dict[str, Path], prompt: int, generate: int, rounds: int, threads: int, console: Console) -> list[dict[str, Any]]:
    """Every result of ``rounds`` runs of llama-bench, each of which goes through all models in turn."""
    command: list[str | Path] = [paths.find_program("llama-bench"), "-o", "json", "-t", str(threads), "-r", "1", "-ngl", "0"]
    command += ["-p", str(prompt), "-n", str(generate)]
    for model in models.values():
        command += ["-m", model]
    names = {str(model): name for name, model in models.items()}
    results = []
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}")
        for result in json.loads(_run(command)):
            results.append({"name": names[result["model_filename"]], "round": number, **result})
    return results


def tabulate(models: dict[str, Path], results: Sequence[dict[str, Any]], bandwidth: float) -> list[Row]:
    """One row a type from the results of :func:`measure`."""

    def speeds(name: str, count: str) -> list[float]:
        return [result["avg_ts"] for result in results if result["name"] == name and result[count]]

    def ratio(name: str, count: str) -> float | None:
        pairs = zip(speeds(name, count), speeds(BASELINE, count), strict=False)
        return statistics.median(mine / base for mine, base in pairs) if BASELINE in models else None

    rows = []
    for name, model in models.items():
        generation, prompt = speeds(name, "n_gen"), speeds(name, "n_prompt")
        size = next(result["model_size"] for result in results if result["name"] == name)
        rows.append(
            Row(
                name=name,
                bits_per_weight=bits_per_weight(model),
                model_bytes=size,
                generation=statistics.median(generation),
                generation_ratio=ratio(name, "n_gen"),
                generation_spread=_spread(generation),
                prompt=statistics.median(prompt),
                prompt_ratio=ratio(name, "n_prompt"),
                prompt_spread=_spread(prompt),
                bandwidth_share=statistics.median(generation) * size / bandwidth,
            )
        )
    return rows


def print_table(rows: Sequence[Row], title: str, console: Console) -> None:
    """The rows; a spread far above the difference of two types says that the machine was not quiet."""
    table = Table(title=title)
    for heading in ("type", "bits/weight", "tg t/s", f"/ {BASELINE}", "spread", "pp t/s", f"/ {BASELINE}", "spread", "bandwidth"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for row in rows:
        ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in (row.generation_ratio, row.prompt_ratio)]
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.2f}",
            f"{row.generation:.1f}",
            ratios[0],
            f"{row.generation_spread:.0%}",
            f"{row.prompt:.0f}",
            ratios[1],
            f"{row.prompt_spread:.0%}",
            f"{row.bandwidth_share:.0%}",
        )
    console.print(table)


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{Path(command[0]).name} failed ({last}): run it by hand to see more: {' '.join(str(part) for part in command)}")
    return done.stdout


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def _chosen(types: str) -> list[str]:
    names = [name.strip() for name in types.split(",") if name.strip()]
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        raise UsageError(f"--types knows {', '.join(FILE_TYPES)}: leave out {', '.join(unknown) or 'nothing, but name one'}")
    return names


@click.command(context_settings={"show_default": True})
@click.option("--types", default=",".join(FILE_TYPES), help="Types to compare, with commas between them.")
@click.option("--layers", default=8, type=click.IntRange(1), help="Layers of the random model. 8 take 750 MB as F16, 160 MB as MBQ3.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="How often all types are measured in turn; medians are shown.")
@click.option("--prompt", default=512, type=click.IntRange(1), help="Tokens of the prompt (pp).")
@click.option("--generate", default=64, type=click.IntRange(1), help="Tokens generated (tg).")
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(1), help="Threads of llama-bench.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps the models between runs. [default: a temporary one]")
@click.option("--out", type=click.Path(path_type=Path), help="Write everything that was measured to this JSON file.")
def main(types: str, layers: int, rounds: int, prompt: int, generate: int, threads: int, work: Path | None, out: Path | None) -> None:
    """Compare the speed of quantised types on this CPU.

    Writes a decoder with Qwen2-VL-2B's layer shapes and random weights, quantises it to each type with llama-quantize and times them with
    llama-bench: tg is one token after the other (each reads all weights once), pp a prompt processed in one batch. "bandwidth" is the
    share of the memory bandwidth, measured first, that reading the weights takes in tg: near 100 % no kernel can be faster.

    Compare the ratios, not the tokens a second of different days: other work on the machine slows all types alike, and a large spread
    says that there was some.

    \b
    Example: python tools/bench_cpu.py --types Q3_K,MBQ3,MBQ3_64 --rounds 9 --work /tmp/bench --out bench.json
    """
    console = Console()
    try:
        names = _chosen(types)
        with tempfile.TemporaryDirectory() as temporary:
            folder = work or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            models = prepare_models(folder, names, layers, threads, console)
            bandwidth = memory_bandwidth(threads)
            results = measure(models, prompt, generate, rounds, threads, console)
            rows = tabulate(models, results, bandwidth)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{processor()}, {threads} threads, {bandwidth / 1e9:.1f} GB/s, pp{prompt} tg{generate}, {layers} layers, {date}"
    print_table(rows, title, console)
    if out is not None:
        facts = {"date": date, "processor": processor(), "threads": threads, "bandwidth": bandwidth, "layers": layers}
        out.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows], "results": results}, indent=1))


if __name__ == "__main__":
    main()
