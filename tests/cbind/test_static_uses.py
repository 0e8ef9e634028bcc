"""Static ranges combined with other features of a context: a quantised cache, several sequences, an adapter; and experts."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mbq_cbind.model import Model
from mbq_gguf.export.gguf_writer import add_metadata
from mbq_gguf.formats import row_scale
from mbq_gguf.formats.gguf_types import import_gguf
from mbq_gguf.formats.registry import quant_type_for
from static_files import DYNAMIC, LAYERS, Seen, Settled, decode, keys, rows, write_adapter, write_gguf

CUTTING = 0.5  # a range of text that cuts, so that a row of another class is another row


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_in_one_batch_over_a_quantised_cache(unified: bool, static_file: Any, seen: Seen) -> None:
    """Three sequences of 30 tokens, each with its sink; each ends as it does alone, in a batch that is as static."""
    count, parts = 30, 3

    def settle(c: Any, parameters: Any) -> None:
        parameters.n_seq_max, parameters.kv_unified = parts, unified
        parameters.type_k = parameters.type_v = c.GGML_TYPE_Q8_0

    with Settled(static_file(keys(CUTTING, positions=[0])), settle=settle, context=1536, threads=1, observe=seen.watch) as model:
        together = decode(model, list(chain(*(rows(model, count, [count - 1], sequence) for sequence in range(parts)))))
        model._binding.c.llama_memory_clear(model._binding.c.llama_get_memory(model._context), True)
        alone = decode(model, rows(model, 80, [count - 1]))[0]
    assert sorted(seen.classes()[0]) == sorted(parts * [DYNAMIC] + parts * (count - 1) * [CUTTING])
    assert seen.classes()[-1] == [DYNAMIC, *79 * [CUTTING]]
    assert (
        np.abs(together - alone).max() < 1e-3 * np.abs(alone).max()
    )  # attention sums in another order; a sink in another place costs 0.26


def test_an_adapter_makes_it_dynamic(static_plain: bytes, static_file: Any, tmp_path: Path, seen: Seen) -> None:
    """To the bit; and without it the ranges are back."""
    write_adapter(tmp_path / "adapter.gguf")
    (tmp_path / "plain.gguf").write_bytes(static_plain)
    found = []
    for path in (tmp_path / "plain.gguf", static_file(keys(CUTTING))):
        with Model(path, context=128, threads=1, observe=seen.watch) as model:
            ffi, c = model._binding.ffi, model._binding.c
            adapter = c.llama_adapter_lora_init(model._model, str(tmp_path / "adapter.gguf").encode())
            assert adapter != ffi.NULL
            for adapters in ([adapter], []):
                assert c.llama_set_adapters_lora(model._context, adapters, len(adapters), len(adapters) * [1.0]) == 0
                c.llama_memory_clear(c.llama_get_memory(model._context), True)
                found.append(decode(model, rows(model, 80, [79])))
                assert len(seen.rows) == (len(found) == 4)
    with_adapter, plain, static_with_adapter, static = found
    assert np.array_equal(with_adapter, static_with_adapter)
    assert not np.array_equal(with_adapter, plain)
    assert not np.array_equal(plain, static)


def write_experts(path: Path, metadata: dict[str, Any], flagged: bool = True) -> Path:
    """A Qwen3 of experts, width 64, all of its matrices Q4_0 with one scale per row, experts ``flagged`` as such or not."""
    width, ffn, experts, vocabulary = 64, 96, 4, 256
    shapes = {"attn_q": (width, width), "attn_k": (32, width), "attn_v": (32, width), "attn_output": (width, width)}
    of_experts = {"ffn_gate_exps": (experts, ffn, width), "ffn_up_exps": (experts, ffn, width), "ffn_down_exps": (experts, width, ffn)}
    random = np.random.default_rng(0)
    writer = import_gguf().GGUFWriter(path, "qwen3moe")
    numbers = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": width,
        "feed_forward_length": ffn,
        "vocab_size": vocabulary,
    }
    numbers |= {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": ffn}
    numbers |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16}
    for name, number in numbers.items():
        writer.add_uint32(f"qwen3moe.{name}", number)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    names = []
    for layer in range(LAYERS):
        for name, shape in (shapes | of_experts).items():
            values = random.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
            packed = quant_type_for("W4A8", shape[-1]).quantize(values.reshape(-1, shape[-1])).reshape(*shape[:-1], -1)
            writer.add_tensor(f"blk.{layer}.{name}.weight", packed, raw_dtype=import_gguf().GGMLQuantizationType.Q4_0)
            names += [f"blk.{layer}.{name}.weight"] if flagged or name in shapes else []
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", random.normal(size=(experts, width)).astype(np.float32))
        for name, size in (("attn_norm", width), ("ffn_norm", width), ("attn_q_norm", 16), ("attn_k_norm", 16)):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(size, np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", random.normal(size=(vocabulary, width)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for key, value in (row_scale.metadata(names) | metadata).items():
        add_metadata(writer, key, value)
    write_gguf(writer)
    return path


def test_experts_are_dynamic(tmp_path: Path) -> None:
    """Ranges of the sites that experts read, which would cut everything, change no bit of them, flagged or not; attention's do."""
    cut = {f"mbq.act.range.{site}.text": LAYERS * [1e-6] for site in ("gate_up", "down")}
    version = {"mbq.act.version": 1}
    cases = [{}, version | cut, version | {"mbq.act.range.qkv.text": LAYERS * [1e-6]}]
    found = []
    for metadata, flagged in ((cases[0], False), *((case, True) for case in cases)):
        with Model(write_experts(tmp_path / "experts.gguf", metadata, flagged), context=128, threads=1) as model:
            found.append(decode(model, [(token, token, 0, token == 79) for token in range(80)]))
    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[3])
