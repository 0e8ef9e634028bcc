"""``mbq-gguf serve`` and ``mbq-gguf ask`` as a user calls them."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mbq_gguf.cli import serve as serve_command
from mbq_gguf.llama_cpp import lockdown
from owners import alive, started
from test_server import PICTURE
from tiny_pair import Pair

COMMAND = [sys.executable, "-m", "mbq_gguf"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def test_serve_prints_address_and_key_and_ends_with_ctrl_c(tiny_pair: Pair) -> None:
    port = free_port()
    command = [*COMMAND, "serve", str(tiny_pair.model), "--port", str(port), "--", "--threads", "1", "--ctx-size", "512"]
    with started(*command, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as user:
        assert user.stdout.readline() == f"http://127.0.0.1:{port}\n"
        key = re.match(r"key: (\w{32}) ", user.stdout.readline())
        assert key is not None
        reply = lockdown.request("GET", f"http://127.0.0.1:{port}/props", key[1], 30).json()
        assert reply["modalities"]["vision"], "the vision file beside it was found"
        listed = lockdown.request("GET", f"http://127.0.0.1:{port}/v1/models", key[1], 30).text
        assert json.loads(listed)["data"][0]["id"] == tiny_pair.model.stem
        assert str(tiny_pair.model.parent) not in listed
        [server] = server_of(user.pid)
        user.send_signal(signal.SIGINT)
        assert user.communicate(timeout=30)[1] == "stopped\n"
    assert user.returncode == 130
    assert not alive(server)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_shell_line_of_the_help_asks_about_a_picture(tiny_pair: Pair) -> None:
    assert serve_command.help is not None
    line = serve_command.help.partition("From a shell, with the key:")[2].replace("\b", "").strip()
    port = free_port()
    with started(*COMMAND, "serve", tiny_pair.model, "--port", port, "--", "--threads", "1", "--ctx-size", "512", "-n", "4") as user:
        assert user.stdout.readline() == f"http://127.0.0.1:{port}\n"
        key = user.stdout.readline().split()[1]
        for placeholder, value in (("cat.png", shlex.quote(str(PICTURE))), ("8080", str(port)), ("KEY", key), ("curl", "curl --silent")):
            assert line.count(placeholder) == 1
            line = line.replace(placeholder, value)
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4


def test_why_a_server_ended_by_itself_is_said(tiny_pair: Pair) -> None:
    command = [*COMMAND, "serve", str(tiny_pair.model), "--port", str(free_port()), "--", "--threads", "1", "--ctx-size", "512"]
    with started(*command, stderr=subprocess.PIPE) as user:
        for _ in range(3):
            user.stdout.readline()
        [server] = server_of(user.pid)
        os.kill(server, signal.SIGKILL)
        said = user.communicate(timeout=30)[1]
    assert user.returncode == 1
    assert re.match(r"error: llama-server ended by itself with signal 9 \(.+\): start it again", said)


def server_of(pid: int) -> list[int]:
    """The children of a process, whichever of its threads has started them."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def test_ask_prints_one_answer(tiny_pair: Pair) -> None:
    done = run("ask", tiny_pair.model, PICTURE, PICTURE, "What is this?", "--max-tokens", 4, "--ctx", 512)
    assert done.returncode == 0, done.stderr
    assert "cut off after 4 tokens: --max-tokens allows more" in done.stderr
    assert run("ask", tiny_pair.model, "What is this?", "--max-tokens", 4).stdout != done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "missing.gguf", "Hello?"], "there is no file missing.gguf"),
        (["ask", "missing.gguf", PICTURE, "What?"], "there is no file missing.gguf"),
        (["ask", "alone.gguf", PICTURE, "What?"], "there is no vision file mmproj-alone.gguf: put it there, or name it with --mmproj"),
        (["ask", "model.gguf", "missing.png", "What?"], "the image missing.png cannot be read"),
        (["serve", "missing.gguf"], "there is no file missing.gguf"),
        (["serve", "model.gguf", "--slots"], "No such option"),
    ],
)
def test_wrong_calls_are_one_sentence(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], says: str
) -> None:
    for file in tiny_pair:
        (tmp_path / file.name).symlink_to(file)
    shutil.copy(tiny_pair.model, tmp_path / "alone.gguf")
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--no-such-option"], "llama-server refuses an option (error: invalid argument: --no-such-option"),
        (["--threads"], "llama-server refuses an option (error while handling argument"),
        (["-c", "many"], 'llama-server refuses an option (error while handling argument "-c"'),
        (["-c", "-5"], "-c -5 is too small: give 0 or more"),
        (["-b", "0"], "-b 0 is too small: give 1 or more"),
    ],
    ids=" ".join,
)
def test_an_option_that_llama_server_does_not_take(tiny_pair: Pair, options: list[str], says: str) -> None:
    done = run("serve", tiny_pair.model, "--port", free_port(), "--", *options)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize("port", ["99999", "http", "-1"])
def test_a_port_that_is_none(tiny_pair: Pair, port: str) -> None:
    done = run("serve", tiny_pair.model, "--", "--port", port)
    assert done.returncode == 2
    assert done.stderr == f"error: --port {port} is not a port: give a number from 1 to 65535\n"


def test_a_context_that_is_too_large_is_said_with_its_cause(tiny_pair: Pair) -> None:
    """13 GB of keys and values where a process may have 8."""
    options = ["--", "--threads", "1", "--fit", "off", "--ctx-size", str(1 << 24)]
    command = [*COMMAND, "serve", str(tiny_pair.model), "--port", str(free_port()), *options]
    limit = (8 << 30, 8 << 30)
    done = subprocess.run(
        command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "failed to allocate buffer for kv cache" in done.stderr


def test_a_context_that_is_too_small_is_said(tiny_pair: Pair) -> None:
    done = run("ask", tiny_pair.model, *[PICTURE] * 6, "What is this?", "--ctx", 256)
    assert done.returncode == 1
    assert "llama-server refused the question about" in done.stderr
    assert "context" in done.stderr
