"""A server started by mbq-gguf answers nobody else, contacts nobody else, and does not outlive its owner."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.server import LlamaServer, Server
from owners import HOLDER, THREAD_HOLDER, alive, started
from test_server import PICTURE
from tiny_pair import Pair

CONFIGURATION = "[*]\nslots = true\nmetrics = true\napi-key = everybody\n"


class Witness(ThreadingHTTPServer):
    """A host that counts what it is asked; as a proxy it would see questions and pictures."""

    def __init__(self) -> None:
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked.append(handler.requestline)
                handler.send_response(200)
                handler.end_headers()
                handler.wfile.write(PICTURE.read_bytes())

            do_POST = do_GET

            def log_message(handler, *arguments: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def witness() -> Iterator[Witness]:
    with Witness() as host:
        yield host
        host.shutdown()


@pytest.fixture(scope="module")
def running(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """Started where the environment and the user's configuration would open it, and where another key is known."""
    home = tmp_path_factory.mktemp("home")
    (home / "llama.cpp").mkdir()
    (home / "llama.cpp" / "config.ini").write_text(CONFIGURATION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home))
        for name, value in {"ARG_ENDPOINT_METRICS": "1", "ARG_ENDPOINT_PROPS": "1", "ARG_CTX_SIZE": "64", "API_KEY": "everybody"}.items():
            patch.setenv(f"LLAMA_{name}", value)
        patch.setenv("AIP_MODE", "PREDICTION")
        with LlamaServer(*tiny_pair, threads=2) as server:
            yield server


def status(server: LlamaServer, method: str, path: str, key: str | None = None, body: dict[str, object] | None = None) -> int:
    return lockdown.request(method, server.url + path, key, 30, body).status_code


def test_a_proxy_sees_nothing(running: LlamaServer, witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, witness.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    requests.get(f"{running.url}/health", timeout=30)
    assert len(witness.asked) == 1, "a plain request goes to it, or this test shows nothing"
    assert running.ask(PICTURE, "What is this?", 1).completion_tokens == 1
    assert len(witness.asked) == 1


def test_only_the_key_opens_it(running: LlamaServer) -> None:
    ask = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 1}
    for key in (None, "", "everybody", "0" * 32):
        assert status(running, "POST", "/v1/chat/completions", key, ask) == 401
        assert status(running, "GET", "/props", key) == 401
        assert status(running, "GET", "/v1/models", key) == 401
    assert status(running, "POST", "/v1/chat/completions", running.key, ask) == 200
    assert running.key not in Path(f"/proc/{running.pid}/cmdline").read_text()


def test_what_the_environment_would_open_is_closed(running: LlamaServer) -> None:
    closed_paths = (("GET", "/slots"), ("GET", "/metrics"), ("POST", "/props"))
    assert [status(running, method, path, running.key, {}) for method, path in closed_paths] == [501, 501, 501]
    assert lockdown.request("GET", f"{running.url}/props", running.key, 30).json()["default_generation_settings"]["n_ctx"] == 2048


@pytest.mark.parametrize(("origin", "allowed"), [("http://localhost:1234", True), ("https://elsewhere.example", False)])
def test_pages_of_other_origins_get_no_answer(running: LlamaServer, origin: str, allowed: bool) -> None:
    reply = requests.get(f"{running.url}/health", headers={"Origin": origin}, timeout=30)
    assert reply.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)


def test_pictures_from_elsewhere_are_not_fetched(
    running: LlamaServer, tiny_pair: Pair, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [{"type": "image_url", "image_url": {"url": f"{witness.url}/a.png"}}, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    reply = lockdown.request("POST", f"{running.url}/v1/chat/completions", running.key, 60, body)
    assert (reply.status_code, witness.asked) == (400, [])
    assert "--offline" in reply.json()["error"]["message"]
    monkeypatch.setattr(lockdown, "OPTIONS", ())
    with LlamaServer(*tiny_pair, threads=2) as opened:
        assert status(opened, "POST", "/v1/chat/completions", opened.key, body) == 200
    assert len(witness.asked) == 1, "without --offline it fetches, or this test shows nothing"


def test_what_is_no_picture_is_handed_to_nobody(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server asks ffprobe about it, wherever that lies on the path: here a script that says that it was called."""
    called = tmp_path / "called"
    program = tmp_path / "ffprobe"
    program.write_text(f"#!/bin/sh\ntouch {called}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90aGluZw=="}}, {"type": "text", "text": "What is this?"}]
    body: dict[str, object] = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    for options, found in (([], False), (["--video-ffmpeg-dir", str(tmp_path)], True)):
        with Server(*tiny_pair, ["--no-ui", "--threads", "1", "--ctx-size", "512", *options]) as server:
            assert lockdown.request("POST", f"{server.url}/v1/chat/completions", server.key, 60, body).status_code == 400
        assert called.exists() == found


@pytest.mark.parametrize("holder", [HOLDER, THREAD_HOLDER])
def test_it_ends_when_its_owner_is_killed(tiny_pair: Pair, holder: str) -> None:
    with started(sys.executable, "-c", holder, tiny_pair.model) as owner:
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.send_signal(signal.SIGKILL)
        owner.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_one_that_a_thread_started_lives_on_after_the_thread(tiny_pair: Pair) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        server = LlamaServer(tiny_pair.model, None, threads=1)
        pool.submit(stack.enter_context, server).result()
        pool.shutdown()
        assert server.ask(None, "Still there?", 1).completion_tokens == 1
        with pytest.raises(RuntimeError, match="started before"), server:
            pass
    assert not alive(server.pid)


def test_options_of_the_user_come_last(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "everybody")
    opened = Server(*tiny_pair, ["--slots", "--api-key", "", "--port", "8193", "--threads", "1", "-c", "512"], port=8192)
    with opened as server:
        assert (server.key, server.url) == (None, "http://127.0.0.1:8193")
        assert status(server, "GET", "/slots") == 200
        with pytest.raises(UserError, match=r"^port 8193 is in use by another program: "), Server(*tiny_pair, [], port=8193):
            pass


def test_one_heap_for_all_threads_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one per thread the server's memory grew by 280 MB with every large answer (docs/log.md)."""
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert lockdown.environment(None, Path("/nowhere"))["MALLOC_ARENA_MAX"] == "1"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert lockdown.environment(None, Path("/nowhere"))["MALLOC_ARENA_MAX"] == "4"


def test_the_environment_of_the_caller_stays_as_it_is() -> None:
    before = dict(os.environ)
    lockdown.environment("key", Path("/nowhere"))
    assert dict(os.environ) == before
