"""Text and pictures in one pass, in llama-server and llama-mtmd-cli: the number of decode calls, and the answers of separate decodes."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from mbq_gguf.export.gguf_writer import write_mmproj_gguf, write_text_gguf
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.paths import find_program
from mbq_gguf.llama_cpp.server import Server, data_url
from static_files import write_adapter
from tiny_pair import Pair

PICTURES = sorted((Path(__file__).parents[2] / "converter/mbq_gguf/demo/data/eval/images").glob("*.png"))[:8]
TOKENS = 4  # of an answer
BATCH, UBATCH, SLOTS = 100, 48, 4
LIMIT = 1e-4  # nats; measured: 1e-6 at most, and mostly equal bits
P = PICTURES
PROMPTS: dict[str, list[Path | str]] = {
    "text": ["What?"],
    "first": [P[0], "What is this?"],
    "middle": ["Look at", P[1], "please"],
    "last": ["This:", P[2]],
    "three": ["a", P[0], "b", P[1], P[2], "c"],
    "long": [P[3], "and so on " * 60, P[4], "to the end"],
}
APART = "aifs: text and pictures are decoded one after the other"


def said(log: Path) -> str:
    """What a program has written; random weights answer with any bytes."""
    return log.read_text(encoding="utf-8", errors="replace")


@dataclass
class Asked:
    """A server and what is asked of it."""

    server: Server
    log: Path
    answers: dict[str, Any] = field(default_factory=dict)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        reply = lockdown.request(method, self.server.url + path, self.server.key, 60, body)
        reply.raise_for_status()
        return reply

    def decodes(self) -> int:
        """Decode calls so far; those of pictures in turns are not among them."""
        return int(re.search(r"^llamacpp:n_decode_total (\d+)", self.call("GET", "/metrics").text, re.MULTILINE)[1])

    def ask(self, parts: list[Path | str], *, cache: bool = False, slot: int = -1) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """The most likely tokens at each place of the answer with their log probabilities, and what the server says of its work."""
        body = {"max_tokens": TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": 5, "cache_prompt": cache, "id_slot": slot}
        reply = self.call("POST", "/v1/chat/completions", {"messages": messages(parts), **body}).json()
        places = reply["choices"][0]["logprobs"]["content"]
        return [{top["token"]: top["logprob"] for top in place["top_logprobs"]} for place in places], reply["timings"]


def messages(parts: list[Path | str]) -> list[dict[str, Any]]:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(part)}} if isinstance(part, Path) else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert [next(iter(place)) for place in ours] == [next(iter(place)) for place in theirs]
    assert max(abs(a[token] - b[token]) for a, b in zip(ours, theirs, strict=True) for token in a) <= LIMIT


@pytest.fixture(scope="module")
def exact(tiny_dir: Path, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The tiny VLM in F32."""
    folder = tmp_path_factory.mktemp("exact")
    pair = Pair(folder / "model.gguf", folder / "mmproj-model.gguf")
    common = {"replaced": {}, "base_type": "F32", "embedding_type": "F32", "metadata": {}, "file_type": None}
    write_text_gguf(tiny_dir, pair.model, quantised={}, **common)
    write_mmproj_gguf(tiny_dir, pair.mmproj, mmproj_type="F32")
    return pair


def start(exact: Pair, log: Path, *options: str) -> Iterator[Asked]:
    own = ["--no-ui", "--metrics", "--threads", "1", "--flash-attn", "off", "-b", str(BATCH), "-ub", str(UBATCH)]
    with Server(*exact, [*own, "--parallel", str(SLOTS), "--ctx-size", str(1024 * SLOTS), *options], log_file=log) as server:
        yield Asked(server, log)


@pytest.fixture(scope="module")
def in_turns(exact: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    yield from start(exact, tmp_path_factory.mktemp("off") / "log", "--aifs", "off")


@pytest.fixture(scope="module", params=["on --kv-unified", "on --no-kv-unified", "reorder --no-kv-unified"])
def at_once(request: pytest.FixtureRequest, exact: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    yield from start(exact, tmp_path_factory.mktemp("on") / "log", "--aifs", *request.param.split())


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_as_few_decode_calls_as_batches(name: str, in_turns: Asked, at_once: Asked) -> None:
    before = at_once.decodes()
    ours, timings = at_once.ask(PROMPTS[name])
    assert at_once.decodes() - before == math.ceil(timings["prompt_n"] / BATCH) + len(ours) - 1
    same(ours, in_turns.ask(PROMPTS[name])[0])


def test_a_second_turn_finds_its_pictures(in_turns: Asked, at_once: Asked) -> None:
    for asked in (in_turns, at_once):
        asked.ask(PROMPTS["three"], cache=True, slot=1)
    ours, theirs = (asked.ask([*PROMPTS["three"], "and this?", P[5]], cache=True, slot=1) for asked in (at_once, in_turns))
    assert ours[1]["cache_n"] == theirs[1]["cache_n"] > 3 * 64
    same(ours[0], theirs[0])


def test_slots_share_batches(in_turns: Asked, at_once: Asked) -> None:
    names = [*PROMPTS, *PROMPTS]
    theirs = {name: in_turns.ask(PROMPTS[name])[0] for name in PROMPTS}
    with ThreadPoolExecutor(SLOTS) as pool:
        for name, (ours, _) in zip(names, pool.map(lambda name: at_once.ask(PROMPTS[name]), names), strict=True):
            same(ours, theirs[name])


@pytest.mark.parametrize("batches", [1, 3])
def test_cancelled_within_a_picture(batches: int, in_turns: Asked, at_once: Asked) -> None:
    """The client leaves after some batches, which end within pictures; the slot's next prompt goes on from what is whole."""
    eight: list[Path | str] = [*P[batches:], *P[:batches], "How many?"]  # which no slot has seen
    body = {"messages": messages(eight), "max_tokens": 1, "stream": True, "return_progress": True, "cache_prompt": True, "id_slot": 2}
    at_once.ask(["other"], slot=2)
    headers = {"Authorization": f"Bearer {at_once.server.key}"}
    with requests.post(at_once.server.url + "/v1/chat/completions", json=body, headers=headers, stream=True, timeout=60) as reply:
        lines = (line for line in reply.iter_lines() if b"prompt_progress" in line)
        seen = [json.loads(next(lines)[6:])["prompt_progress"]["processed"] for _ in range(batches + 1)]
    assert seen[0] < seen[-1] < 8 * 64
    ours, timings = at_once.ask(eight, cache=True, slot=2)
    print(f"cancelled at {seen}, {timings['cache_n']} tokens were kept")
    same(ours, in_turns.ask(eight)[0])
    same(at_once.ask(PROMPTS["three"])[0], in_turns.ask(PROMPTS["three"])[0])


def steps(asked: Asked, parts: list[Path | str], slot: int) -> list[int]:
    """How many tokens of a prompt are done after each of its batches."""
    body = {"messages": messages(parts), "max_tokens": 1, "stream": True, "return_progress": True, "cache_prompt": False, "id_slot": slot}
    headers = {"Authorization": f"Bearer {asked.server.key}"}
    with requests.post(asked.server.url + "/v1/chat/completions", json=body, headers=headers, stream=True, timeout=60) as reply:
        lines = [json.loads(line[6:])["prompt_progress"] for line in reply.iter_lines() if b"prompt_progress" in line]
    return sorted({line["processed"] for line in lines} - {0})


def whose_picture(prompts: list[tuple[int, int, int]]) -> list[int]:
    """The request whose picture comes next, of those that have a prompt left: slot, number and how many of its tokens are done.

    Between two tokens the server takes the slots in their order. It is the oldest request whose next token is a picture, so one of which
    nothing is done yet has to read its text first. A request has its number before it is in the queue, so that one may be older than all
    at a picture: if its slot comes before theirs, its text is read, they wait for its picture, and that comes after the next token."""
    at_pictures = sorted((task, slot) for slot, task, done in prompts if done)[:1]
    return [task for task, slot in at_pictures if not any(not done and other < task and turn < slot for turn, other, done in prompts)]


def test_who_waits_for_a_token_waits_for_one_picture(exact: Pair, tmp_path: Path) -> None:
    """Batches are full as long as nobody is answered. Then a prompt takes the steps that it takes in turns, and however many prompts have
    pictures, one is encoded and one decode call made between two tokens: pictures of the oldest request first."""
    prompt: list[Path | str] = [*P[:3], "What are these?"]
    # 300 times as many tokens as are listened to while pictures come, which a server makes alone in some 20 s of processor time
    body = {"messages": messages(["A story"]), "max_tokens": 12000, "ignore_eos": True, "stream": True, "id_slot": 0}
    found = {}
    for mode in ("off", "on"):
        for asked in start(exact, tmp_path / mode, "--aifs", mode, "-b", "512", "-lv", "5", "--ctx-size", str(16384 * SLOTS)):
            assert len(steps(asked, prompt, 1)) == (1 if mode == "on" else 4)
            headers = {"Authorization": f"Bearer {asked.server.key}"}
            with requests.post(asked.server.url + "/v1/chat/completions", json=body, headers=headers, stream=True, timeout=60) as listening:
                lines = listening.iter_lines()
                next(lines)
                found[mode] = steps(asked, prompt, 1)
                for _ in range(3):  # mostly the oldest request is in the last slot
                    with ThreadPoolExecutor(3) as pool:
                        together = [pool.submit(steps, asked, prompt, slot) for slot in (3, 2, 1)]
                    assert [one.result() for one in together] == [found[mode]] * 3
                steps(asked, ["Thanks"], 1)  # so that a token follows the last picture before the story is left
    assert found["on"] == found["off"]
    between = re.split(r"id  0 \|.* slot decode token", said(tmp_path / "on"))[1:-1]
    assert {part.count("decode: n_batch") for part in between} == {1}
    assert "".join(between).count("encoding mtmd batch") == 10 * 3
    for part in between:
        prompts = [tuple(map(int, numbers)) for numbers in re.findall(r"id  (\d) \| task (\d+) \| cached n_tokens = (\d+)", part)]
        assert [int(task) for task in re.findall(r"task (\d+) \| encoding mtmd batch", part)] == whose_picture(prompts)


def test_what_keeps_the_old_path_says_so_once(exact: Pair, in_turns: Asked, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter.gguf")
    cases = {
        "speculative decoding": ("--spec-type", "ngram-simple"),
        "an active adapter": ("--lora", str(tmp_path / "adapter.gguf")),
    }
    for reason, options in cases.items():
        for asked in start(exact, tmp_path / "log", *options):
            asked.ask(PROMPTS["text"])
            assert APART not in said(asked.log)
            answers = [asked.ask(PROMPTS["first"])[0] for _ in range(2)]
            same(*answers)
            if "--lora" not in options:
                same(answers[0], in_turns.ask(PROMPTS["first"])[0])
        assert said(asked.log).count(f"{APART} ({reason})") == 1


def test_the_command_line_program(exact: Pair, tmp_path: Path) -> None:
    command = [
        find_program("llama-mtmd-cli"),
        "-m",
        exact.model,
        "--mmproj",
        exact.mmproj,
        "--flash-attn",
        "off",
        "-t",
        "1",
        "-b",
        str(BATCH),
    ]
    command += ["-ub", str(UBATCH), "-c", "1024", "-n", "4", "--temp", "0", "-v", "--image", P[0], "--image", P[1], "-p", "What are these?"]
    answers = []
    for mode in ("on", "off", "reorder"):
        log = tmp_path / mode
        done = subprocess.run([*command, "--aifs", mode, "--log-file", log], capture_output=True, text=True, check=True)
        calls = [int(n) for n in re.findall(r"aifs: (\d+) tokens decoded", said(log))]
        answers.append((re.sub(r"^[0-9.]+ [A-Z] .*\n", "", done.stdout, flags=re.MULTILINE).strip(), calls))
    assert answers[0] == answers[2]
    assert answers[0][0] == answers[1][0] != ""
    assert answers[1][1] == []
    assert all(n == BATCH for n in answers[0][1][:-1])
    assert len(answers[0][1]) == math.ceil(sum(answers[0][1]) / BATCH) == 2
