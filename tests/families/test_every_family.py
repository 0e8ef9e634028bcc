"""Every family, from a small random checkpoint to logits in llama.cpp, against Hugging Face in float32.

Costs about three seconds of processor time a family.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mbq_cbind.model import Model
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.stream import advance, capture, capture_encoded, logits, working_layer
from mbq_gguf.errors import UsageError
from mbq_gguf.export.checkpoint import names_of, shapes
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.export.gguf_writer import write_mmproj_gguf
from mbq_gguf.export.rehearsal import rehearse
from mbq_gguf.llama_cpp.server import LlamaServer
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.decoder import find_decoder
from mbq_gguf.models.families import family_of
from mbq_gguf.models.tower import Tower, joined
from mbq_gguf.models.towers import find_tower
from mbq_gguf.quantise import quantise
from mbq_gguf.quantise_tower import TowerSettings, quantise_tower
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.transforms.tower import centre_tower, rotate_tower
from PIL import Image
from quirks import QUIRKS
from safetensors.torch import load_file, save_file
from small import QUESTION, Small, compare, moved, unpacked

# Of the answer's tokens that Hugging Face decides by LEAD of the range or more. Activations rounded to bfloat16 may turn the others, of
# which random models have one in seven, at most one in four (DECIDED in small.py). With AVX-512's, 13 tokens of 18 families turned, 12 of
# them such.
TOP1, LEAD = 0.97, 0.005
# The largest difference over the range of the logits. llama.cpp rounds activations to bfloat16 before products with bfloat16 weights.
BF16 = 0.03
FEATURES = 0.005  # of a picture in float32, in root mean square; measured: 0.0024 at most
# Activations of quantised products are rounded to int8, in blocks of 32 or a whole row: llama.cpp may move the logits little further than
# the same rounding does in Hugging Face. Largest differences of few tokens, of which delta nets make more than attention does.
ROUNDING = 1.5  # times that; measured: 1.3 at most
BLOCKS = {"MBQ3S": 32, "W4A8": None}
# Q8_0 by rounding to nearest, weights and activations.
INT8 = 0.04
SETTINGS = QuantiseSettings(type_name="MBQ3S", synthetic=0, refits=0, clip=False)


def test_prompt_is_what_libmtmd_makes(small: Small) -> None:
    encoded = small.encoded
    prompt = encoded.ids[: len(encoded.ids) - int(encoded.answer.sum())].tolist()
    with Model(*small.written("prompt"), context=512, threads=1) as model:
        ours = model.prompt_tokens(model.prompt(QUESTION), [model.vision.encode(small.picture)])
        assert ours.count(None) > 0
        assert ours == [None if token in small.picture_ids else token for token in prompt]
        for size in small.recipe.sizes:
            longer = small.loaded.encode(Image.new("RGB", size), [(QUESTION, "")])
            assert model.vision.tokens(*size) - model.vision.tokens(*small.recipe.size) == len(longer.ids) - len(prompt), size


def test_both_files_take_every_tensor(small: Small) -> None:
    rehearse(small.directory, weight_files(small.directory), "BF16")
    family = family_of(small.loaded.architecture)
    assert family is not None
    assert family.name == small.name
    assert read_header(small.written("header")[0]).metadata["general.architecture"] == family.gguf


def test_bf16_is_hugging_faces(small: Small) -> None:
    """In float32 where rounded activations might choose a token another expert."""
    exact = bool(small.loaded.decoder.layout.stacks)
    text, mmproj = small.written("bf16", base_type="F32" if exact else "BF16")
    top1, difference = compare(small.ours((text, small.exact_mmproj if exact else mmproj)), small.theirs(), LEAD)
    assert top1 >= TOP1
    assert difference <= BF16


def test_an_answer_over_http_is_that_of_the_bindings(small: Small) -> None:
    """About a picture and about none: llama-server renders the template, takes the picture and cuts the prompt itself."""
    files = small.written("bf16")
    with Model(*files, context=512, threads=1) as model:
        pictures = [[], [model.vision.encode(small.picture)]]
        prompts = [model.prompt(QUESTION, images=len(found)) for found in pictures]
        counts = [len(model.prompt_tokens(prompt, found)) for prompt, found in zip(prompts, pictures, strict=True)]
        texts = [model.text(model.generate(prompt, found, limit=12)) for prompt, found in zip(prompts, pictures, strict=True)]
    with LlamaServer(*files, threads=1, ctx=512) as server:
        answers = [server.ask(path, QUESTION, 12) for path in (None, small.picture)]
    assert [answer.prompt_tokens for answer in answers] == counts
    for answer, text in zip(answers, texts, strict=True):  # a random model may end in half a character, which is not sent
        assert answer.text.rstrip("\ufffd") == text.rstrip("\ufffd")
    assert answers[0].text != answers[1].text


def test_a_picture_is_what_hugging_face_sees(small: Small) -> None:
    assert moved(small.our_features(), small.features()) <= FEATURES


def test_a_quirk_ignored_would_show(small: Small) -> None:
    """By more than one of the bounds above, which so hold both sides to it."""
    if small.name not in QUIRKS:
        pytest.skip("no quirk is listed")
    expected, features = small.theirs(), small.features()
    for quirk in QUIRKS[small.name]:
        with quirk.ignored(small):
            _, difference = compare(small.theirs(), expected)
            seen = moved(small.features(), features)
        assert difference > BF16 or seen > FEATURES, quirk.name
    assert np.array_equal(small.theirs(), expected)


def test_a_tied_head_is_written_once(small: Small) -> None:
    names = {entry.name for entry in read_header(small.written("header")[0]).tensors}
    assert ("output.weight" in names) != small.loaded.tied


@torch.no_grad()
def test_layer_by_layer_is_the_whole_model(small: Small) -> None:
    """With another sample before it, which attention, or a delta net's state, must not see."""
    other = Sample(small.picture, (("Another one?", "It stands before."),))
    streams = list(capture(small.loaded, [other, *small.samples]))
    for index in range(len(small.loaded.decoder.layers)):
        advance(working_layer(small.loaded, index), streams)
    stream = streams[-1]
    found = logits(small.loaded, stream.hidden)[0, -int(small.encoded.answer.sum()) - 1 : -1]
    _, difference = compare(found.numpy(), small.theirs())
    assert difference < 1e-4


@pytest.mark.parametrize("type_name", BLOCKS)
def test_quantised_is_hugging_face_with_those_weights(small: Small, type_name: str) -> None:
    """Where there are experts, with all of them chosen: a rounded activation would choose others for some token of any random model."""
    result = quantise(small.loaded, small.samples, replace(SETTINGS, type_name=type_name))
    assert len(result.quantised) == len(list(small.loaded.decoder.linears()))
    weights = unpacked(result)
    with small.all_chosen() as directory:
        exact = small.theirs(weights)
        with small.rounded_inputs(result.quantised, BLOCKS[type_name]):
            _, rounding = compare(small.theirs(weights), exact)
        files = small.written(type_name, result, directory)
        _, difference = compare(small.ours(files), exact)
    assert difference <= ROUNDING * rounding


def test_types_whose_blocks_are_wider_than_a_head_are_refused(small: Small) -> None:
    """Where llama.cpp moves columns by heads: before calibration, since the file could not be written after it."""
    moved = [site for site in small.loaded.decoder.layout.sites if site.heads]
    if not moved:
        pytest.skip("no columns are moved")
    with pytest.raises(UsageError, match=r"by heads of 128, which are not whole blocks of 256 \(Q4_K\)"):
        quantise(small.loaded, small.samples, replace(SETTINGS, type_name="Q4_K"))
    with pytest.raises(UsageError, match="give one --type"):
        quantise(small.loaded, small.samples, replace(SETTINGS, target_bpw=5.0))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_bpw": 5.0}, "no --target-bpw"),
        ({"type_name": "W4A8", "activations": "static"}, "leave out --activations static"),
        ({"method": "mbq", "token_weights": "token"}, "give other --token-weights"),
    ],
)
def test_what_experts_do_not_take_is_refused(small: Small, settings: dict[str, Any], why: str) -> None:
    if not small.loaded.decoder.layout.stacks:
        pytest.skip("no experts")
    with pytest.raises(UsageError, match=why):
        quantise(small.loaded, small.samples, replace(SETTINGS, **settings))


def test_rotated_is_hugging_faces(small: Small) -> None:
    """Q8_0 by rounding to nearest: whatever the rotation forgets is larger than its error."""
    if small.loaded.decoder.layout.no_rotation():
        pytest.skip("it is refused")
    result = quantise(small.loaded, small.samples, replace(SETTINGS, type_name="Q8_0", rotate="offline", rounding="nearest"))
    _, difference = compare(small.ours(small.written("rotated", result)), small.theirs())
    assert difference <= INT8


@torch.no_grad()
def test_a_changed_tower_gives_the_same_features(small: Small) -> None:
    """In float64: gains folded and the stream rotated, then LayerNorm as RMSNorm; where one is refused, it says why."""
    model = copy.deepcopy(small.loaded.model).double()
    exact_norms(model)
    decoder = find_decoder(model, small.loaded.architecture)
    assert decoder
    loaded = replace(small.loaded, model=model, decoder=decoder, dtype=torch.float64)
    tower = find_tower(loaded)
    assert tower
    encoded = loaded.encode(small.picture, [(QUESTION, "")])

    def features() -> torch.Tensor:
        stream = capture_encoded(loaded, encoded)
        return torch.cat([stream.hidden, *stream.added.values()])

    plain = features()
    changes = [(tower.no_rotation(), partial(rotate_tower, tower, 0)), (tower.no_centring(), partial(centre_as_rms, tower))]
    assert not all(reason for reason, _ in changes) or small.name in UNTURNED
    for reason, change in changes:
        if reason:
            with pytest.raises(UsageError, match=re.escape(reason)):
                change()
        else:
            change()
            assert float((features() - plain).abs().max() / plain.abs().max()) < 1e-10


UNTURNED = (
    "LLaVA-1.5",
    "LLaVA-NeXT",
    "PaddleOCR-VL",
    "dots.ocr",
    "Gemma 3",
    "Gemma 4",
    "Gemma 4 (experts)",
    "Gemma 4 (E2B, E4B)",
    "MiniCPM-V 4.6",
    "Mistral 3",
    "Pixtral",
    "GLM-4.1V",
    "GLM-4.5V",
    "Llama 4",
)  # norms stand where no matrix takes their gain


def exact_norms(model: torch.nn.Module) -> None:
    """RMSNorms of transformers compute in float32: PyTorch's own in their place."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__.endswith("RMSNorm") and "Gemma" not in type(norm).__name__:
                eps = getattr(norm, "variance_epsilon", None) or norm.eps
                other = torch.nn.RMSNorm(norm.weight.shape, eps=eps, dtype=torch.float64)
                other.weight.data.copy_(norm.weight)
                setattr(module, name, other)


class BiasedRms(torch.nn.Module):
    """RMSNorm with the gain and bias of ``norm``, a LayerNorm."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.eps) + self.norm.bias


def centre_as_rms(tower: Tower) -> None:
    centre_tower(tower)
    ends = (tower.holder.get_submodule(joined(name, place.norm)) for place, name, _ in tower.exits() if place.norm)
    read = {*tower.module.modules(), *ends}  # a projector may have other norms behind the stream's end
    for module in list(tower.holder.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, torch.nn.LayerNorm) and norm in read:
                setattr(module, name, BiasedRms(norm))


TOWER = 2.0  # scales of rows and tokens in place of scales of 32; measured: 1.2 to 1.6


def test_a_tower_in_w8a8_gives_nearly_the_same(small: Small, tmp_path: Path) -> None:
    """Every family's matrices find their place in the file, padded where they must be, and their products theirs in its graph."""
    loaded = replace(small.loaded, model=copy.deepcopy(small.loaded.model))
    result = quantise_tower(loaded, TowerSettings("W8A8", rotate=False), [])
    content = {"quantised": result.quantised, "replaced": result.replaced, "metadata": result.metadata}
    write_mmproj_gguf(small.directory, tmp_path / "W8A8.gguf", mmproj_type="W8A8", **content)
    found = read_header(tmp_path / "W8A8.gguf")
    assert len(found.metadata["mbq.row_scale"]) >= len(result.quantised)  # type: ignore[arg-type]
    tower = find_tower(loaded)
    assert tower
    assert found.metadata["clip.vision.feed_forward_length"] % 32 == 0  # type: ignore[operator]
    for other in ("F16", "Q8_0"):
        write_mmproj_gguf(small.directory, tmp_path / f"{other}.gguf", mmproj_type=other)
    text, features = small.written("towers")[0], {}
    for name in ("F16", "Q8_0", "W8A8"):
        with Model(text, tmp_path / f"{name}.gguf", context=512, threads=1) as model:
            features[name] = np.concatenate(model.vision.encode(small.picture).embeddings)
    moved = {name: np.linalg.norm(found - features["F16"]) / np.linalg.norm(features["F16"]) for name, found in features.items()}
    print(f"features moved by {moved['W8A8']:.4f}, Q8_0's by {moved['Q8_0']:.4f}")
    assert moved["W8A8"] < TOWER * moved["Q8_0"]


def test_other_names_give_the_same_files(small: Small, tmp_path: Path) -> None:
    recipe = small.recipe
    if recipe.other_names is None and recipe.other_form is None:
        pytest.skip("all checkpoints have the names that transformers saves")
    (weights,) = weight_files(small.directory)
    for file in small.directory.iterdir():
        if file != weights:
            (tmp_path / file.name).symlink_to(file)
    rename, reform = recipe.other_names or str, recipe.other_form or dict
    save_file(reform({rename(name): tensor for name, tensor in load_file(weights).items()}), tmp_path / weights.name, {"format": "pt"})
    assert list(zip(names_of(weight_files(tmp_path)), shapes([tmp_path / weights.name]), strict=True)) != list(
        zip(names_of([weights]), shapes([weights]), strict=True)
    )
    rehearse(tmp_path, weight_files(tmp_path), "BF16")
    older = Small(small.name, tmp_path / "files")
    older.folder.mkdir()
    older.__dict__["directory"] = tmp_path
    for ours, theirs in zip(older.written("bf16"), small.written("bf16"), strict=True):
        assert tensors(ours) == tensors(theirs)
    torch.testing.assert_close(older.loaded.model.state_dict(), small.loaded.model.state_dict(), rtol=0, atol=0)


def tensors(path: Path) -> dict[str, Any]:
    """The bytes of every tensor of a file."""
    header, data = read_header(path), path.read_bytes()
    return {entry.name: data[header.data_start + entry.offset :][: entry.nbytes] for entry in header.tensors}
