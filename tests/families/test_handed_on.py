"""Keys and values that layers pass to later ones (Gemma 4's E2B and E4B), and per-token inputs of layers, layer by layer.

No llama.cpp runs, but for the last test; about nine seconds of processor time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mbq_gguf.calibration import generate
from mbq_gguf.calibration.batches import batches
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.gradient_sums import CLASSES
from mbq_gguf.calibration.moments import Replay
from mbq_gguf.calibration.sensitivity import measure
from mbq_gguf.calibration.stream import advance, capture, takes_others, working_layer
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import uniform
from mbq_gguf.export.checkpoint import names_of
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.models import LoadedModel
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.file_rows import FileRows
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from recipe import Recipe
from recipes import RECIPES
from small import ANSWER, QUESTION, Small, compare

NAME = "Gemma 4 (E2B, E4B)"
BOUND = 1e-4  # relative; float32 in another order of operations


def changed(folder: Path, **text: object) -> Small:
    """The family's small model with other settings of its language model, without a picture that sees itself."""
    small, recipe = Small(NAME, folder), RECIPES[NAME]
    config = recipe.config | {"text_config": recipe.config["text_config"] | {"use_bidirectional_attention": None} | text}
    small.recipe = Recipe(**{**vars(recipe), "config": config})
    return small


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Of either kind two layers that take others', and windows that hold every sample, so that samples can be joined."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention", "full_attention"] * 2
    return changed(tmp_path_factory.mktemp("handed"), num_hidden_layers=7, num_kv_shared_layers=4, layer_types=kinds, sliding_window=512)


@pytest.fixture(scope="module")
def streams(small: Small) -> list[Streamed]:
    return list(capture(small.loaded, [Sample(small.picture, ((QUESTION, ANSWER),)), Sample(small.picture, (("Another?", "Blue."),))]))


def passed(loaded: LoadedModel, streams: list[Streamed], upto: int) -> list[Streamed]:
    running = [replace(stream) for stream in streams]
    for index in range(upto):
        advance(working_layer(loaded, index), running)
    return running


def test_samples_that_are_joined_keep_their_own(small: Small, streams: list[Streamed]) -> None:
    layers = len(small.loaded.decoder.layers)
    assert [len(batch) for batch in batches(streams, working_layer(small.loaded, layers - 1))] == [2]
    joined = passed(small.loaded, streams, layers)
    for stream, other in zip(joined, (passed(small.loaded, [stream], layers)[0] for stream in streams), strict=True):
        torch.testing.assert_close(stream.hidden, other.hidden, rtol=BOUND, atol=BOUND)
    assert {kind: pair.shape[:2] for kind, pair in (joined[0].handed or {}).items()} == dict.fromkeys(
        ("sliding_attention", "full_attention"), (2, 1)
    )
    assert streams[0].handed == {}


def test_a_replay_hands_on_what_the_rounded_layer_makes(small: Small, streams: list[Streamed]) -> None:
    """Attention is not run again once its output's input is kept; its keys and values are still there."""
    index = next(number for number, layer in enumerate(small.loaded.decoder.layers) if takes_others(layer)) - 1
    entered = passed(small.loaded, streams, index)
    layer = working_layer(small.loaded, index)
    replay = Replay(layer, [replace(stream) for stream in entered])
    for site in layer.sites:
        replay.moments(site, uniform)
        for name in site.readers:
            layer.linear(name).weight.data.mul_(1.1)  # as rounding changes it
    replay.advance()
    advance(layer, entered)
    for ours, theirs in zip(replay.streams, entered, strict=True):
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=BOUND, atol=BOUND)
        for kind, pair in (theirs.handed or {}).items():
            torch.testing.assert_close((ours.handed or {})[kind], pair, rtol=BOUND, atol=BOUND)


def test_gradients_flow_back_to_the_layer_that_handed_on(small: Small, streams: list[Streamed]) -> None:
    """As one backward pass through the whole model has them."""
    loaded = small.loaded
    found = measure(loaded, streams[:1], fisher=True)
    encoded = loaded.encode(small.picture, [(QUESTION, ANSWER)])
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(loaded.decoder.layers):
        for branch in loaded.decoder.layout.branches:
            watched = layer.get_submodule(branch.writer)
            keep = lambda _module, _inputs, grads, key=(index, branch.name): seen.__setitem__(key, grads[0][0])  # noqa: E731
            handles.append(watched.register_full_backward_hook(keep))
    embedding = loaded.decoder.embed_tokens.weight.requires_grad_()
    labels = torch.where(encoded.answer, encoded.ids, -100)[None]
    loaded.model(**encoded.inputs, labels=labels, use_cache=False).loss.backward()
    embedding.requires_grad_(False)
    for handle in handles:
        handle.remove()
    for branch in loaded.decoder.layout.branches:
        for name in CLASSES:
            wanted = [float(seen[index, branch.name].abs().mean(1)[getattr(streams[0], name)].mean()) for index in range(7)]
            torch.testing.assert_close(found.mean[branch.name][name], torch.tensor(wanted).double(), rtol=BOUND, atol=0)
    for reader in ("self_attn.k_proj", "self_attn.v_proj"):  # which the last layers have not
        assert [bool(value) for value in found.fisher[reader]] == [True] * 3 + [False] * 4


@pytest.mark.parametrize("settings", [{"token_weights": "token"}, {"method": "mbq", "rounding": "nearest"}, {"learn_scales": 1}], ids=str)
def test_every_way_to_quantise_goes_through(small: Small, settings: dict[str, object]) -> None:
    common = QuantiseSettings(type_name="MBQ3S", synthetic=0, refits=0, clip=False, search_samples=1)
    result = quantise(small.loaded, small.samples, replace(common, **settings))  # type: ignore[arg-type]
    assert len(result.quantised) == len(list(small.loaded.decoder.linears()))


def test_texts_are_written_in_the_stored_type(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: layers in bfloat16, the rest in float32."""
    monkeypatch.setattr(generate, "_writing_dtype", lambda _: torch.bfloat16)
    texts = generate.written_texts(small.loaded, 2, 6, 1.0, 0, lambda done, total: None)
    assert texts.shape == (2, 6)


def test_the_table_of_layer_inputs_stays_in_its_file(small: Small) -> None:
    table = small.loaded.decoder.module.get_submodule("embed_tokens_per_layer")
    assert isinstance(table, FileRows)
    assert table.weight.dtype == torch.bfloat16  # as stored, where everything else is float32
    with Path("/proc/self/maps").open() as maps:
        mapped = [line for line in maps if str(small.directory) in line]
    start = table.weight.data_ptr()
    assert any(int(low, 16) <= start < int(high, 16) for low, _, high in (line.split()[0].partition("-") for line in mapped))


def test_ears_stay_out_of_memory_and_in_the_file(small: Small) -> None:
    """As upstream's conversion writes them."""
    assert any(name.startswith("model.audio_tower.") for name in names_of(weight_files(small.directory)))
    assert not [name for name, _ in small.loaded.model.named_parameters() if "audio" in name]
    assert any(entry.name.startswith("a.blk.0.") for entry in read_header(small.mmproj).tensors)


@pytest.fixture
def wide(tmp_path: Path) -> Small:
    return changed(tmp_path, hidden_size=1536)


def test_pictures_of_its_width_do_not_see_themselves(wide: Small) -> None:
    """By the width of E2B the runtime tells, as upstream's does; transformers by a setting."""
    top1, difference = compare(wide.ours(wide.written("f32", base_type="F32")), wide.theirs())
    assert top1 >= 0.97
    assert difference <= 0.01  # measured: 0.0037 at most, with keys and values in F16
