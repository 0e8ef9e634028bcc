"""A layer of many experts takes the memory that is estimated, by the bytes of tensors that are alive on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import working_layer
from mbq_gguf.cost import work_of
from mbq_gguf.memory_estimate import estimate_memory
from mbq_gguf.models import LoadedModel, load
from mbq_gguf.models.lazy import ReadCache, Staged, file_tensors, tensors_of
from mbq_gguf.models.read_ahead import ReadAhead
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from PIL import Image
from recipe import write
from recipes import RECIPES
from safetensors.torch import load_file, save_file

EXPERTS = {"num_experts": 48, "num_experts_per_tok": 2, "hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}

SAMPLES, TOKENS = 16, 88  # of each sample


def experts(name: str, published: bool, folder: Path, device: str = "cpu") -> LoadedModel:
    """A small model of family ``name`` whose layers are nearly all experts: as transformers saves it, or as it is published."""
    recipe = RECIPES[name]
    config = copy.deepcopy(recipe.config)
    config["text_config"] |= EXPERTS
    config["vision_config"] |= {"out_hidden_size": 256}
    directory = write(replace(recipe, config=config), folder / "checkpoint")
    if published and recipe.other_form:
        (file,) = directory.glob("*.safetensors")
        save_file(recipe.other_form(load_file(file)), file, metadata={"format": "pt"})
    return load(directory, device)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return experts("Qwen3-VL-MoE", False, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Nothing runs ahead, as on a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights_of(model: LoadedModel) -> int:
    return sum(parameter.numel() for parameter in model.decoder.layers[0].parameters())


def staged_of(model: LoadedModel) -> Staged:
    """All of layer 0, as it is copied to a GPU."""
    values = [value for _, _, value in tensors_of(model.decoder.layers[0])]
    return {id(leaf): leaf(ReadCache()).clone() for leaf in file_tensors(values)}


@pytest.mark.parametrize(
    ("name", "published"),
    [("Qwen3-VL-MoE", False), ("Qwen3-VL-MoE", True), ("Qwen3.5-MoE", False)],
    ids=["stacked", "stacked and transposed", "one by one"],
)
def test_what_was_read_ahead_is_released_as_it_is_used(name: str, published: bool, tmp_path: Path) -> None:
    """6 bytes per weight at most while a layer becomes float32, and 4 afterwards, though the caller holds ``staged``. With all
    results kept until the end it is 7.4 bytes for stacks that are transposed, 9.3 for experts that are stored one by one."""
    model = experts(name, published, tmp_path)
    weights = weights_of(model)
    with LiveBytes() as live:
        staged = staged_of(model)
        assert live.now >= 2 * weights
        layer = working_layer(model, 0, staged)
    assert live.most <= 6.1 * weights
    assert live.now <= 4.1 * weights
    assert staged == {}
    assert all(parameter.dtype == torch.float32 for parameter in layer.module.parameters())


@pytest.mark.gpu
def test_a_card_releases_it_too(tmp_path: Path) -> None:
    """The same bound for the bytes that PyTorch hands out on a GPU."""
    model = experts("Qwen3-VL-MoE", True, tmp_path, "cuda")
    ahead = ReadAhead(model.decoder.layers[0], model.device)
    ahead.wait()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    working_layer(model, 0, ahead.taken())
    assert torch.cuda.max_memory_allocated() - before <= 6.1 * weights_of(model)


STEPS = {
    "default": (QuantiseSettings(synthetic=0), 12.2, TOKENS),
    "nearest": (QuantiseSettings(synthetic=0, rounding="nearest"), 5.6, 0),
    "learned": (QuantiseSettings(synthetic=0, learn_scales=2), 14.6, TOKENS),
    "mbq": (QuantiseSettings(synthetic=0, method="mbq"), 16.3, TOKENS),
    "original inputs": (QuantiseSettings(synthetic=0, propagate_error=False), 16.0, TOKENS),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("settings", "measured", "tokens"), STEPS.values(), ids=STEPS)
def test_rounding_takes_what_is_estimated(
    loaded: LoadedModel, tmp_path: Path, settings: QuantiseSettings, measured: float, tokens: int
) -> None:
    """Of a GPU, which has no packed bytes; ``measured`` bytes per weight, which may grow by a twentieth. By default it is 22 if codes are
    wider than int8, values are copies of the layer's, and experts' inputs and sums are kept until the last; with MBQ 26 if all experts'
    inputs are there twice, as they are and weighted. To nearest it is what reading the layer takes, 6 at most."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (256, 256), (200, 30, 30)).save(path)
    with LiveBytes() as live:
        result = quantise(loaded, [Sample(path, [("What?", "A red square.")])] * SAMPLES, settings)
    taken = live.most - sum(tensor.data.nbytes for tensor in result.quantised.values())
    work = work_of(loaded, checkpoint=0, files=0, samples=SAMPLES, sample_tokens=tokens, texts=0)
    estimated = estimate_memory(work, "cuda", settings=settings).card
    assert 0.75 * estimated <= taken <= estimated
    assert taken <= 1.05 * measured * weights_of(loaded)
