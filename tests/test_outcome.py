"""Outcomes by name: what a stage records is kept, restored, collected and written without code of its own."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from mbq_gguf import convert as pipeline
from mbq_gguf import quantise as walk
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.outcome import Outcome, QuantiseResult
from mbq_gguf.walk.state import LayerWork
from rich.console import Console


def test_kinds_and_names() -> None:
    outcome = Outcome()
    data = np.arange(6, dtype=np.uint8).reshape(2, 3)
    outcome.put_quantised("a.weight", QuantisedTensor("MBQ3", data, 8))
    outcome.put("loss", "a.weight", 0.5)
    outcome.put("factors", "qkv", torch.ones(2))
    (quantised,) = outcome.quantised.values()
    assert (quantised.type_name, quantised.columns, quantised.data.tolist()) == ("MBQ3", 8, data.tolist())
    assert outcome.facts_of("loss") == {"a.weight": 0.5}
    assert outcome.facts_of("factors") == {}
    assert set(outcome.tensors) == {"quantised/a.weight", "factors/qkv"}


def test_layers_are_collected_by_number_and_metadata_as_arrays() -> None:
    result, layers = QuantiseResult(), [Outcome() for _ in range(11)]
    for index, layer in enumerate(layers):
        layer.put("quantised", "a.weight", torch.full((1,), index))
        layer.put("exponent", "qkv", index / 10)
        layer.put("metadata", "mbq.found", index)
        result.add_layer(index, layer)
    assert result.facts_of("metadata") == {"mbq.found": list(range(11))}
    assert result.exponents["layers.10"] == {"qkv": 1.0}
    assert result.layer(1).tensors == {"quantised/a.weight": torch.ones(1)}
    assert result.layer(1).facts == {"exponent/qkv": 0.1}


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("built_llama")
def test_a_new_stage_needs_no_code_elsewhere(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that changes a norm and finds something of each site: it is in the file, also where the run was stopped in between."""
    runs: list[int] = []

    def invented(work: LayerWork) -> None:
        runs.append(work.layer.index)
        norm = work.layer.part("input_layernorm").weight
        assert isinstance(norm, torch.Tensor)
        norm.data.fill_(2.0)
        work.outcome.put("invented", "inputs", torch.ones(3))
        for site in work.layer.sites:
            work.outcome.put("metadata", f"mbq.invented.{site.name}", work.layer.index + 0.5)

    monkeypatch.setattr(walk, "LAYER", (*walk.LAYER[:4], invented, *walk.LAYER[4:]))
    options = ConvertOptions(tiny_dir, tmp_path / "out.gguf", method="rtn", rounding="nearest")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_files", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            convert(options, Console(file=StringIO()))
    (kept,) = tmp_path.glob("out.gguf.work/*/layer-0001.safetensors")
    kept.unlink()
    convert(options, Console(file=StringIO()))
    assert runs == [0, 1, 2, 1]
    header = read_header(options.out)
    for site in ("qkv", "o", "gate_up", "down"):
        assert header.metadata[f"mbq.invented.{site}"] == [0.5, 1.5, 2.5]
    content = options.out.read_bytes()
    for index in range(3):
        (norm,) = (tensor for tensor in header.tensors if tensor.name == f"blk.{index}.attn_norm.weight")
        assert np.all(np.frombuffer(content, np.float32, norm.elements, header.data_start + norm.offset) == 2.0)
