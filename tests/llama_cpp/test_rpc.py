"""llama.cpp's RPC: two servers on the loopback hold all layers, and the answer about a picture is that of a single process."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.formats import row_scale
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.paths import find_program
from mbq_gguf.llama_cpp.server import Server, data_url
from mbq_gguf.models import LoadedModel
from nearest_files import write_nearest
from owners import started
from tiny_pair import Pair

PICTURES = sorted((Path(__file__).parents[2] / "converter/mbq_gguf/demo/data/eval/images").glob("*.png"))[:2]
LIMIT = 1e-4  # nats; measured: equal bits. A machine whose own memory holds weights in another order may sum in another
RANGES = {
    f"mbq.act.range.{site}.{kind}": [value] * 3
    for site in ("qkv", "o", "gate_up", "down")
    for kind, value in (("text", 2.0), ("vision", 20.0))
}
Answer = list[dict[str, float]]


@pytest.fixture(scope="module")
def endpoints(built_llama: Path) -> Iterator[str]:
    """Two servers, one thread each: what --rpc takes."""
    program, ports = find_program("ggml-rpc-server"), [free_port(), free_port()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as stack:
        children = [stack.enter_context(started(program, "--port", port, "--threads", 1, **quiet)) for port in ports]
        for port in ports:
            wait_for(port)
        yield ",".join(f"127.0.0.1:{port}" for port in ports)
        assert [child.poll() for child in children] == [None, None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("a server does not come up")


def write(tiny: LoadedModel, source: Path, out: Path, kind: str, metadata: dict[str, Any]) -> Path:
    """The tiny VLM with its layers rounded to the nearest of ``kind``."""
    return write_nearest(source, out, kind, metadata=metadata, loaded=tiny)


def ask(model: Path, mmproj: Path, options: Sequence[str] = (), log: Path | None = None) -> Answer:
    """The most likely tokens at each place of the answer to a question between two pictures, with their log probabilities."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in PICTURES]
    content.insert(1, {"type": "text", "text": "What has changed?"})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    own = ["--no-ui", "--threads", "1", "--parallel", "1", "--ctx-size", "512", "--flash-attn", "off", "--fit", "off", "--no-warmup"]
    with Server(model, mmproj, [*own, *options], log_file=log) as server:
        reply = lockdown.request("POST", f"{server.url}/v1/chat/completions", server.key, 60, body)
        reply.raise_for_status()
        places = reply.json()["choices"][0]["logprobs"]["content"]
    return [{top["token"]: top["logprob"] for top in place["top_logprobs"]} for place in places]


def distance(one: Answer, other: Answer) -> float:
    """In nats, over the tokens that both name; infinite where an answer reads otherwise."""
    if [next(iter(place)) for place in one] != [next(iter(place)) for place in other]:
        return float("inf")
    return max(abs(a[token] - b[token]) for a, b in zip(one, other, strict=True) for token in a.keys() & b.keys())


def over_rpc(model: Path, mmproj: Path, endpoints: str, folder: Path) -> Answer:
    """As :func:`ask`, all layers over there."""
    answer = ask(model, mmproj, ["--rpc", endpoints, "--gpu-layers", "99", "--verbose"], folder / "log")
    log = (folder / "log").read_text()
    assert "offloaded 4/4 layers" in log
    assert all(f"[{endpoint}] model buffer size" in log for endpoint in endpoints.split(","))
    return answer


def test_types_of_3_bits(tiny: LoadedModel, tiny_dir: Path, tiny_pair: Pair, endpoints: str, tmp_path: Path) -> None:
    model = write(tiny, tiny_dir, tmp_path / "tiny.gguf", "MBQ3S", {})
    assert distance(over_rpc(model, tiny_pair.mmproj, endpoints, tmp_path), ask(model, tiny_pair.mmproj)) <= LIMIT


def test_one_scale_a_row_and_static_ranges(
    tiny: LoadedModel, tiny_dir: Path, tiny_pair: Pair, endpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag of the weights travels, and the ranges of the activations: without either the answer is another."""
    model = write(tiny, tiny_dir, tmp_path / "tiny.gguf", "W4A8", {"mbq.act.version": 1, **RANGES})
    there = over_rpc(model, tiny_pair.mmproj, endpoints, tmp_path)
    assert distance(there, ask(model, tiny_pair.mmproj)) <= LIMIT
    dynamic = write(tiny, tiny_dir, tmp_path / "dynamic.gguf", "W4A8", {})
    assert distance(there, ask(dynamic, tiny_pair.mmproj)) > 10 * LIMIT
    monkeypatch.setattr(row_scale, "metadata", lambda tensors: {})
    plain = write(tiny, tiny_dir, tmp_path / "plain.gguf", "W4A8", {})
    assert distance(there, ask(plain, tiny_pair.mmproj)) > 10 * LIMIT


def test_one_plan_for_all_micro_batches(tiny_pair: Pair, endpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, text and rows of a picture, rows alone, a token: where the scheduler plans anew it waits for the card first, and told to by
    this variable it ends the process."""
    monkeypatch.setenv("GGML_SCHED_DEBUG_REALLOC", "2")
    options = ["--rpc", endpoints, "--gpu-layers", "99", "--no-mmproj-offload", "--ubatch-size", "24"]
    assert distance(ask(*tiny_pair, options, tmp_path / "log"), ask(*tiny_pair)) <= LIMIT


def test_a_server_without_the_patch_is_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    """It answers the greeting as upstream's does, whose major version is 7."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(UserError):
            ask(*tiny_pair, ["--rpc", f"127.0.0.1:{listener.getsockname()[1]}"], tmp_path / "log")
        thread.join(10)
    assert "RPC server version mismatch: 7.0.0" in (tmp_path / "log").read_text()


def greet(listener: socket.socket) -> None:
    """A command is a byte, its length in eight, and so many; an answer is a length and so many: version, then what the server can."""
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as stream:
        length = int.from_bytes(stream.read(9)[1:], "little")
        answer = bytes([7, 0, 0, 0]) + bytes(len(stream.read(length)))
        connection.sendall(len(answer).to_bytes(8, "little") + answer)
        stream.read(1)
