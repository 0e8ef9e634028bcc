"""Models by name: downloaded from a local hub by huggingface_hub's own client; every refusal has its own message."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, REPO, TOKEN, Hub, served
from mbq_gguf.errors import UsageError
from mbq_gguf.export.gguf_header import read_header
from mbq_gguf.hub import model_directory
from mbq_gguf.snapshot import Snapshot, named_link, snapshot_of, source_keys
from rich.console import Console


@pytest.fixture
def hub(tiny_dir: Path, tmp_path: Path) -> Iterator[Hub]:
    """The tiny VLM on a hub, beside what nobody should fetch."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_dir, folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with served(folder) as hub:
        yield hub


def run(hub_url: str, cache: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``mbq-gguf``."""
    return start(["-m", "mbq_gguf", *map(str, arguments)], hub_url, cache, environment)


def start(arguments: list[str], hub_url: str, cache: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Python as a process of its own, since huggingface_hub reads its variables once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    variables = {**kept, "HF_ENDPOINT": hub_url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home"), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, check=False)


FETCH = """
import sys
from mbq_gguf.hub import model_directory
from rich.console import Console
print(model_directory(sys.argv[1], None, Console(stderr=True)))
"""


def fetched(hub_url: str, cache: Path, **environment: str) -> Path:
    """The directory that a command would go on with; nothing that computes is imported for it."""
    ended = start(["-c", FETCH, REPO], hub_url, cache, environment)
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.strip())


def sentence(ended: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line of a run that was refused."""
    assert ended.returncode == code, ended.stderr
    [line] = ended.stderr.strip().splitlines()
    return line


def test_a_name_is_fetched_and_converted_under_its_own_name(hub: Hub, tmp_path: Path, built_llama: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out.gguf"
    ended = run(hub.url, cache, "convert", REPO, out, "--type", "BF16", "--revision", "v1")
    assert ended.returncode == 0, ended.stderr
    assert f"{REPO} at commit {COMMIT}" in ended.stdout
    snapshot = cache / "models--acme--Tiny-VL-2B-Instruct" / "snapshots" / COMMIT
    names = {path.name for path in snapshot.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not names & {"modeling_evil.py", "pytorch_model.bin"}
    for file in (out, tmp_path / "mmproj-out.gguf"):
        found = read_header(file).metadata
        expected = {
            "general.name": "Tiny VL 2B Instruct",
            "general.basename": "Tiny-VL",
            "general.finetune": "2b-Instruct",
        }  # 2B is no size of so few weights
        expected |= {"general.license": "apache-2.0", "general.source.repo_url": f"{hub.url}/{REPO}"}
        expected |= {"general.source.url": f"{hub.url}/{REPO}/tree/{COMMIT}"}
        assert {key: found[key] for key in expected} == expected
    asked = len(hub.requests)
    again = run(hub.url, cache, "imatrix", REPO, out, "--device", "no-device", "--revision", "v1", HF_HUB_OFFLINE="1")
    assert "torch cannot compute on no-device" in sentence(again, 2)  # the model is there
    assert len(hub.requests) == asked


def test_code_is_fetched_where_it_is_trusted(hub: Hub, tmp_path: Path) -> None:
    ended = run(hub.url, tmp_path / "cache", "imatrix", REPO, tmp_path / "out.gguf", "--device", "no-device", "--trust-remote-code")
    assert "torch cannot compute on no-device" in sentence(ended, 2)
    [snapshot] = (tmp_path / "cache").glob("models--*/snapshots/*")
    assert (snapshot / "modeling_evil.py").is_file()
    assert not (snapshot / "pytorch_model.bin").exists()


def test_gated(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    for token in ({}, {"HF_TOKEN": "hf_wrong"}):
        said = sentence(run(hub.url, tmp_path / "cache", "convert", REPO, tmp_path / "out.gguf", **token))
        assert f"{REPO} is gated: accept its terms on {hub.url}/{REPO}, then log in" in said
        assert "hf_wrong" not in said
    assert (fetched(hub.url, tmp_path / "cache", HF_TOKEN=TOKEN) / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["convert", "imatrix"])
def test_missing_model_and_revision(hub: Hub, tmp_path: Path, command: str) -> None:
    said = sentence(run(hub.url, tmp_path / "cache", command, "acme/nothing", tmp_path / "out.gguf"))
    assert f"there is no directory acme/nothing here and no model of that name on {hub.url}: check the name" in said
    said = sentence(run(hub.url, tmp_path / "cache", command, REPO, tmp_path / "out.gguf", "--revision", "v9"))
    assert f"{REPO} has no revision v9: give --revision a branch" in said


def test_no_network_and_offline(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        said = sentence(run(url, tmp_path, "convert", REPO, tmp_path / "out.gguf"))
        assert f"{url} cannot be reached for {REPO}" in said
        said = sentence(run(url, tmp_path, "convert", REPO, tmp_path / "out.gguf", HF_HUB_OFFLINE="1"))
        assert "HF_HUB_OFFLINE forbids downloading it: unset HF_HUB_OFFLINE once" in said


def test_an_interrupted_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.broken_after = 1000
    said = sentence(run(hub.url, tmp_path / "cache", "convert", REPO, tmp_path / "out.gguf"))
    assert f"downloading {REPO} into {tmp_path / 'cache'} stopped" in said
    assert "repeat the same command" in said
    hub.broken_after, hub.cut = None, False
    weights = fetched(hub.url, tmp_path / "cache") / "model.safetensors"
    assert weights.read_bytes() == (hub.folder / "model.safetensors").read_bytes()


def test_a_model_that_is_refused_is_refused_before_its_weights(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in sentence(run(hub.url, tmp_path / "cache", "convert", REPO, tmp_path / "out.gguf"))
    assert not any("safetensors" in request for request in hub.requests)


def test_an_output_that_cannot_be_is_refused_before_the_hub_is_asked(hub: Hub, tmp_path: Path) -> None:
    assert "does not exist" in sentence(run(hub.url, tmp_path / "cache", "convert", REPO, tmp_path / "no" / "out.gguf"), 2)
    assert not hub.requests


def test_a_directory_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_directory("acme/model", None, Console()) == Path("acme/model")
    with pytest.raises(UsageError, match="--revision is for models on the hub"):
        model_directory("acme/model", "main", Console())


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/nowhere/model", "../model", "a/..", "a--b/c", "a/b c"])
def test_what_cannot_be_a_name_is_no_directory(name: str) -> None:
    with pytest.raises(UsageError, match="is not a directory, nor a name such as"):
        model_directory(name, None, Console())


def test_a_directory_of_the_cache_knows_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    folder = tmp_path / "models--Qwen--Qwen2-VL-2B-Instruct" / "snapshots" / "895c3a4"
    folder.mkdir(parents=True)
    assert snapshot_of(folder) == Snapshot("Qwen/Qwen2-VL-2B-Instruct", "895c3a4")
    assert source_keys(folder)["general.source.repo_url"] == "https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct"
    with named_link(folder) as named:
        assert named.name == "Qwen2-VL-2B-Instruct"
        assert named.samefile(folder)
    assert not named.exists()
    assert snapshot_of(tmp_path) is None
    assert source_keys(tmp_path) == {}
    with named_link(tmp_path) as named:
        assert named == tmp_path
