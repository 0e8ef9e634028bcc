"""Every invalid input gives one sentence, exit code 1 or 2, and no files under the final names."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mbq_gguf.cli import main
from mbq_gguf.demo.assemble import DATA
from safetensors.torch import load_file, save_file

LOADING = importlib.import_module("mbq_gguf.models.load")  # the package gives its function this name
RTN = ("--method", "rtn", "--rounding", "nearest")  # needs no calibration, so the fault met is the one under test


@pytest.fixture(autouse=True)
def _needs_llama(built_llama: Path) -> None:
    """Every conversion goes through the conversion package of the built tree."""


@pytest.fixture(autouse=True)
def _before_the_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a fault of the weights themselves is found after they were read."""
    if "weights" not in request.node.name:

        def read(*_: object) -> None:
            pytest.fail("the weights were read first")

        monkeypatch.setattr(LOADING, "_load_weights", read)


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny VLM to be spoilt."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the file would go; afterwards nothing may lie there."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "model.gguf"
    assert not list(folder.iterdir())


def refused(*arguments: str | Path) -> str:
    """Run the command, check that it ends as a refusal should, and return its sentence."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception  # anything else would be a traceback
    assert "Traceback" not in result.output
    sentence = result.stderr.strip()
    assert sentence.startswith("error: ")
    assert len(sentence.splitlines()) == 1
    return sentence


def configure(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change config.json in ``folder``."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_no_directory(tmp_path: Path, out: Path) -> None:
    assert "nowhere is not a directory" in refused("convert", tmp_path / "nowhere", out)


def test_directory_without_a_model(tmp_path: Path, out: Path) -> None:
    assert "no config.json" in refused("convert", tmp_path, out)


def test_config_that_is_no_json(model: Path, out: Path) -> None:
    (model / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused("convert", model, out)


def test_unknown_architecture(model: Path, out: Path) -> None:
    configure(model, lambda config: config.update(architectures=["NewVisionForAnything"], model_type="new_vision"))
    sentence = refused("convert", model, out)
    assert "NewVisionForAnything is not supported" in sentence
    assert "Qwen2-VL" in sentence  # names what is


def test_architecture_that_llama_cpp_does_not_convert(model: Path, out: Path) -> None:
    def change(config: dict[str, object]) -> None:
        config.update(architectures=["Blip2ForConditionalGeneration"], model_type="blip-2")

    configure(model, change)
    sentence = refused("convert", model, out)
    assert "Blip2ForConditionalGeneration" in sentence
    assert "Qwen2VLForConditionalGeneration" in sentence


def test_text_only_model(model: Path, out: Path) -> None:
    def change(config: dict[str, object]) -> None:
        config.pop("vision_config")
        config.update(architectures=["Qwen2ForCausalLM"], model_type="qwen2")

    configure(model, change)
    assert "Qwen2ForCausalLM is a text-only model" in refused("convert", model, out)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantised_already(part: str | None, model: Path, out: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}

    def change(config: dict[str, object]) -> None:
        config.update({"quantization_config": settings} if part is None else {part: {"quantization_config": settings}})

    configure(model, change)
    assert "is already quantised (gptq): give the model that it was made from" in refused("convert", model, out)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json"])
def test_quantised_as_a_file_beside_says(file: str, model: Path, out: Path) -> None:
    (model / file).write_text("{}")
    assert f"is already quantised (it has a {file})" in refused("convert", model, out)


def test_quantised_as_its_tensors_say(model: Path, out: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert f"is already quantised ({name} is of F8_E4M3)" in refused("convert", model, out)


def test_an_adapter_alone(model: Path, out: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")
    assert "is an adapter (LoRA) and not a model" in refused("convert", model, out)


def test_an_adapter_beside_the_model(model: Path, out: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    assert "merge it into the model first" in refused("convert", model, out)


@pytest.mark.parametrize("command", ["convert", "imatrix"])
def test_without_the_settings_of_pictures(command: str, model: Path, out: Path) -> None:
    (model / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(command, model, out)


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("content", ["{", "[1]", "7", NESTED], ids=["cut", "list", "number", "nested"])
@pytest.mark.parametrize(
    "file", ["config.json", "preprocessor_config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json"]
)
def test_configuration_that_is_none(file: str, content: str, model: Path, out: Path) -> None:
    (model / file).write_text(content)
    sentence = refused("convert", model, out)
    assert f"{file} cannot be read as JSON" in sentence or f"{file} is not a model configuration" in sentence


@pytest.mark.parametrize(
    "change",
    [{"architectures": "Qwen"}, {"architectures": {"a": 1}}, {"model_type": ["qwen2_vl"]}, {"vision_config": 3}, {"text_config": [1]}],
    ids=str,
)
def test_odd_configuration(change: dict[str, object], model: Path, out: Path) -> None:
    configure(model, lambda config: config.update(change))
    refused("convert", model, out, *RTN, "--type", "Q9_9")  # whatever else, no traceback


@pytest.mark.parametrize("tokens", [10**9, "more"], ids=str)
def test_more_tokens_than_embeddings(tokens: int | str, model: Path, out: Path) -> None:
    """llama.cpp's conversion makes up a name for each of a billion."""
    configure(model, lambda config: config["text_config"].update(vocab_size=tokens))  # type: ignore[attr-defined]
    assert "vocab_size in" in refused("convert", model, out)


ODD_SETTINGS: list[tuple[str, dict[str, object], str]] = [
    ("preprocessor_config.json", {"merge_size": 0}, "image processor cannot take a picture"),
    ("preprocessor_config.json", {"patch_size": "x"}, "image processor cannot take a picture"),
    ("preprocessor_config.json", {"image_mean": [1]}, "preprocessor_config.json"),
    ("generation_config.json", {"eos_token_id": "x"}, "cannot be used"),
    ("generation_config.json", {"temperature": "hot"}, "general.sampling.temp cannot be 'hot'"),
    ("tokenizer_config.json", {"model_max_length": "x"}, "tokenizer"),
]


@pytest.mark.parametrize(("file", "change", "words"), ODD_SETTINGS, ids=str)
def test_odd_settings(file: str, change: dict[str, object], words: str, model: Path, out: Path) -> None:
    settings = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**settings, **change}))
    assert words in refused("convert", model, out)


def test_template_that_leaves_out_what_is_said(model: Path, out: Path) -> None:
    said = "{% for m in messages %}{{ m.role }}: {{ m.content | replace('What', 'Where') }}<|im_end|>{% endfor %}"
    (model / "chat_template.jinja").write_text(said + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert "leaves out the message" in refused("convert", model, out)


def test_weights_missing(model: Path, out: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has no *.safetensors files" in refused("convert", model, out)


def test_weights_of_another_kind_of_file(model: Path, out: Path) -> None:
    """The sentence ends with a command that makes safetensors of them, which are taken."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model-00001-of-00001.bin")
    _, _, command = refused("convert", model, out).replace("\n", " ").partition("To convert them: ")
    subprocess.run(command.replace("python", sys.executable, 1), cwd=model, shell=True, check=True)
    assert (model / "model-00001-of-00001.safetensors").is_file()
    result = CliRunner().invoke(main, ["convert", str(model), str(out), "--dry-run", "--type", "BF16"])
    assert result.exit_code == 0, result.output


def test_weights_that_the_index_names_missing(model: Path, out: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in refused("convert", model, out)


@pytest.mark.parametrize("keep", [4, 500, 1_000_000], ids=["in the length", "in the header", "in the data"])
def test_weights_truncated(keep: int, model: Path, out: Path) -> None:
    weights = model / "model.safetensors"
    weights.chmod(0o600)
    os.truncate(weights, keep)
    assert "is truncated or damaged" in refused("convert", model, out)


@pytest.mark.parametrize("arguments", [RTN, ("--type", "BF16")], ids=["quantised", "reference"])
def test_nan_weights(arguments: tuple[str, ...], model: Path, out: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    sentence = refused("convert", model, out, *arguments)
    assert "layers.1.mlp.up_proj.weight" in sentence
    assert "NaN" in sentence


def test_tensor_missing_from_the_weights(model: Path, out: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "layers.1.mlp.up_proj.weight" in refused("convert", model, out, *RTN)


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "no JSON", "empty"])
def test_tokenizer_damaged(content: str | None, model: Path, out: Path) -> None:
    (model / "tokenizer.json").unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    assert "tokenizer" in refused("convert", model, out, "--type", "BF16")


def write_set(folder: Path, image: str) -> Path:
    """A calibration set of one question about ``image``."""
    path = folder / "set.jsonl"
    path.write_text(json.dumps({"image": image, "turns": [{"question": "What is it?", "answer": "A cat."}]}) + "\n")
    return path


@pytest.mark.parametrize(
    "content", [None, b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(30)], ids=["missing", "empty", "text", "cut"]
)
def test_image_that_cannot_be_read(content: bytes | None, tiny_dir: Path, tmp_path: Path, out: Path) -> None:
    if content is not None:
        (tmp_path / "cat.png").write_bytes(content)
    sentence = refused("convert", tiny_dir, out, "--calib", write_set(tmp_path, "cat.png"))
    assert "cat.png cannot be read" in sentence


def test_calibration_set_empty(tiny_dir: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "set.jsonl").write_text("\n")
    (tmp_path / "pictures").mkdir()
    for calib, words in (("set.jsonl", "is empty"), ("pictures", "has no image in it")):
        assert words in refused("convert", tiny_dir, out, "--calib", tmp_path / calib)


def test_calibration_set_missing(tiny_dir: Path, tmp_path: Path, out: Path) -> None:
    assert "does not exist" in refused("convert", tiny_dir, out, "--calib", tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("line", ["nonsense", '{"image": "a.png", "turns": []}'])
def test_calibration_line_of_another_kind(line: str, tiny_dir: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "set.jsonl").write_text(line)
    assert "set.jsonl, line 1" in refused("convert", tiny_dir, out, "--calib", tmp_path / "set.jsonl")


@pytest.mark.parametrize(
    ("option", "known"), [("--type", "MBQ3_64"), ("--embedding-type", "MBQ3_64"), ("--mmproj-type", "Q8_0"), ("--device", "--device cpu")]
)
def test_unknown_choice_names_the_known_ones(option: str, known: str, tiny_dir: Path, out: Path) -> None:
    sentence = refused("convert", tiny_dir, out, option, "Q9_X")
    assert "Q9_X" in sentence
    assert known in sentence


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--embedding-type", "W4A8", "give --embedding-type Q4_0 in the place of W4A8"),
        ("--device", "meta", "torch cannot compute on meta"),
        ("--type", "Q4_K_M", "no type Q4_K_M (in llama-quantize this name is a mixture of types, mainly Q4_K"),
    ],
)
def test_choice_that_is_none_here(option: str, value: str, words: str, tiny_dir: Path, out: Path) -> None:
    assert words in refused("convert", tiny_dir, out, option, value)


@pytest.mark.parametrize(("option", "value"), [("--rotate", "offline"), ("--method", "awq")])
def test_a_reference_type_takes_no_method(option: str, value: str, tiny_dir: Path, out: Path) -> None:
    for kind in ("BF16", "F16", "F32"):
        assert f"--type {kind} keeps the checkpoint as it is" in refused("convert", tiny_dir, out, "--type", kind, option, value)


def test_two_ways_to_choose_types(tiny_dir: Path, out: Path) -> None:
    assert "give --type or --target-bpw" in refused("convert", tiny_dir, out, "--type", "Q4_0", "--target-bpw", "4")


def test_output_in_a_folder_that_is_not_there(tiny_dir: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("convert", tiny_dir, tmp_path / "missing" / "model.gguf")


def test_output_that_is_a_folder(tiny_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(tiny_dir), str(tmp_path)])
    assert result.exit_code == 2
    assert "is a directory" in result.stderr.splitlines()[-1]  # click's own refusal, after a line on usage


@pytest.mark.parametrize("command", ["convert", "imatrix"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_output_that_is_a_file_of_the_model(command: str, file: str, model: Path) -> None:
    before = (model / file).read_bytes()
    assert f"{file} exists and is not a GGUF file" in refused(command, model, model / file)
    assert (model / file).read_bytes() == before


def test_output_where_nothing_can_be_written(tiny_dir: Path) -> None:
    assert "cannot write in /proc" in refused("convert", tiny_dir, "/proc/model.gguf")


def test_disk_too_small(tiny_dir: Path, disk: Path) -> None:
    """4 MB for a file of 15 MB."""
    assert "4.2 MB free" in refused("convert", tiny_dir, disk / "model.gguf", "--type", "BF16")
    assert not list(disk.iterdir())


def test_no_room_for_temporary_files(tiny_dir: Path, disk: Path, tmp_path: Path) -> None:
    """Where the headers of a dry run are written: they take more than the 64 KB that are left of 4 MB."""
    (disk / "full").write_bytes(bytes((4 << 20) - 65536))
    command = [sys.executable, "-m", "mbq_gguf", "convert", str(tiny_dir), str(tmp_path / "out.gguf"), "--dry-run"]
    result = subprocess.run(command, env={**os.environ, "TMPDIR": str(disk)}, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: no space is left in {disk}: free some, or choose another disk (TMPDIR is ")
    assert "Traceback" not in result.stderr


def test_disk_that_fills_while_writing(tiny_dir: Path, out: Path) -> None:
    """A limit on the size of files stops the writer in the middle, as a disk does that another program fills."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))

    command = [sys.executable, "-m", "mbq_gguf", "convert", str(tiny_dir), str(out), "--type", "BF16"]
    result = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("ask", "{}", "cat.png", "What?"), ("inspect", "{}"), ("convert", "{}", "out.gguf")], ids=" ".join)
def test_a_path_that_no_file_system_takes(arguments: tuple[str, ...]) -> None:
    assert "too long" in (said := refused(*(argument.format("a" * 300) for argument in arguments))) or "longer than" in said


def test_inspect_of_another_file() -> None:
    assert "is not a GGUF file" in refused("inspect", DATA / "tokenizer.json")


def test_demo_model_into_a_folder_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "has other contents" in refused("demo-model", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
