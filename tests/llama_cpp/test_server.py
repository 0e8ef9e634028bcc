"""The real llama-server: start, questions about pictures, every way to stop, and the messages if it cannot start or answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp.server import LlamaServer
from owners import HOLDER, alive, started
from static_files import with_keys
from tiny_pair import Pair, write_pair

EVAL = Path(__file__).parents[2] / "converter" / "mbq_gguf" / "demo" / "data" / "eval"
PICTURE = EVAL / "images" / "0000.png"
VISION_TOKENS = 64  # a 224x224 picture of the demo's sets


@pytest.fixture(scope="module")
def server(tiny_pair: Pair) -> LlamaServer:
    with LlamaServer(*tiny_pair, threads=2, parallel=2) as running:
        yield running


def test_the_reference_vlm_answers_about_pictures_and_takes_a_seed(built_llama: Path, reference_dir: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (EVAL / "eval.jsonl").read_text().splitlines()[:6]]
    with LlamaServer(*write_pair(reference_dir, tmp_path), threads=2, parallel=2) as server, ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda line: server.ask(EVAL / line["image"], line["turns"][0]["question"], 16), lines)
        right = [answer.text.strip() == line["turns"][0]["answer"] for answer, line in zip(answers, lines, strict=True)]
        texts = [server.ask(None, "Tell me a story.", 16, temperature=2.0, seed=seed).text for seed in (1, 1, 2)]
    assert sum(right) >= 5  # 99 % of the whole set are right in BF16; two wrong of six would be unlike it (p = 0.002)
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_says_what_it_took(server: LlamaServer) -> None:
    answer = server.ask(PICTURE, "What is this?", 3)
    assert answer.prompt_tokens > VISION_TOKENS
    assert (answer.completion_tokens, answer.finish_reason) == (3, "length")
    assert answer.seconds > 0
    text_only = server.ask(None, "What is this?", 3)
    assert answer.prompt_tokens - text_only.prompt_tokens == VISION_TOKENS + 2  # and the marks of its start and end


def test_several_pictures_in_their_order(server: LlamaServer) -> None:
    other = EVAL / "images" / "0001.png"
    one, two, turned = (server.ask(pictures, "What is this?", 8) for pictures in ([PICTURE], [PICTURE, other], [other, PICTURE]))
    assert two.prompt_tokens - one.prompt_tokens == VISION_TOKENS + 2
    assert two.prompt_tokens == turned.prompt_tokens
    assert two.text != turned.text


def test_the_same_question_gets_the_same_answer(server: LlamaServer) -> None:
    first = server.ask(PICTURE, "What is this?", 8)
    server.ask(EVAL / "images" / "0001.png", "How many?", 8)
    assert server.ask(PICTURE, "What is this?", 8).text == first.text


def test_pictures_that_cannot_be_read(server: LlamaServer, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^the image .*broken\.png cannot be read \(.+\): "):
        server.ask(tmp_path / "broken.png", "What is this?")
    with pytest.raises(UsageError, match=r"^the image .*missing\.png cannot be read \(No such file"):
        server.ask(tmp_path / "missing.png", "What is this?")
    assert server.ask(None, "Still there?", 1).completion_tokens == 1


def test_a_picture_for_a_model_without_eyes(tiny_pair: Pair) -> None:
    with LlamaServer(tiny_pair.model, None, threads=2) as server, pytest.raises(UserError, match="refused the question about"):
        server.ask(PICTURE, "What is this?")


def test_it_stops_at_the_end_and_on_an_exception(tiny_pair: Pair, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    seen = []

    def fail_inside() -> None:
        with LlamaServer(tiny_pair.model, None, threads=1, log_file=log) as server:
            seen.append((server.pid, alive(server.pid)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    [(pid, ran)] = seen
    assert ran
    assert not alive(pid)
    assert "model" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_stops_when_its_owner_is_ended(tiny_pair: Pair, number: signal.Signals) -> None:
    # a background job may have handed down that it is ignored
    options = {"stderr": subprocess.PIPE, "preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}
    with started(sys.executable, "-c", HOLDER, tiny_pair.model, **options) as owner:
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.send_signal(number)
        owner.communicate(timeout=30)
    assert owner.returncode != 0
    assert not alive(pid)


def test_a_server_that_dies_while_it_answers(tiny_pair: Pair) -> None:
    with LlamaServer(tiny_pair.model, None, threads=1) as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"^llama-server stopped while answering \("):
            server.ask(None, "Hello?")


def test_files_that_are_no_model(tiny_pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^there is no file .*missing\.gguf"):
        LlamaServer(tmp_path / "missing.gguf", None)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_pair.model.read_bytes()[:4096])
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^llama-server did not start \(") as caught, LlamaServer(broken, None, threads=1):
        pass
    assert time.monotonic() - begin < 60, "an end is noticed at once, not after the time that loading may take"
    assert "\n" not in str(caught.value)


def test_why_a_vision_file_is_refused_is_said(tiny_pair: Pair, tmp_path: Path) -> None:
    spoilt = tmp_path / "mmproj.gguf"
    spoilt.write_bytes(with_keys(tiny_pair.mmproj.read_bytes(), {"mbq.act.version": 2}))
    with pytest.raises(UserError, match=r"mbq\.act\.version is 2: this program knows 1"), LlamaServer(tiny_pair.model, spoilt, threads=1):
        pass
