"""llama-server with several slots on a file with static ranges: prompts in one batch are answered as each one alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.server import Server
from static_files import WORDS, keys, picture, with_keys, write_mmproj, write_plain

TEXT, VISION = 0.5, 1.0  # ranges that cut, so that a row of another class, or of none, is another row
SLOTS = 4
MARKER = "<picture>"  # in place of the one that the server has drawn
LIMIT = 1e-4  # nats; measured: equal bits. Sinks at position 1 in place of 0 change them by 0.055 and more


def test_slots_do_not_change_classes(built: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Three texts and one with a picture, each of more than 64 rows, over a quantised cache of keys."""
    model, mmproj = tmp_path / "model.gguf", write_mmproj(tiny_dir, tmp_path / "mmproj.gguf")
    plain = write_plain(tiny_dir, tmp_path / "plain.gguf").read_bytes()
    image = base64.b64encode(picture(tmp_path, 448).read_bytes()).decode()
    prompts: list[Any] = [f"{word} {WORDS}" for word in ("First", "Then", "Last")]
    prompts.append({"prompt_string": f"{MARKER} What is {WORDS}", "multimodal_data": [image]})
    options = ["--no-ui", "--threads", "1", "--flash-attn", "off", "--parallel", str(SLOTS), "--ctx-size", str(1024 * SLOTS)]
    found = []
    for positions in ([0], [1]):
        model.write_bytes(with_keys(plain, keys(TEXT, VISION, positions=positions)))
        with Server(model, mmproj, [*options, "--cache-type-k", "q8_0", "--metrics"]) as server:
            found.append(answers(server, prompts))
            assert decodes(server) == 1
            if positions == [0]:
                alone = [answers(server, [prompt])[0] for prompt in prompts]
    assert max(map(apart, found[0], alone)) < LIMIT
    assert min(map(apart, found[1], alone)) > 100 * LIMIT


def answers(server: Server, prompts: list[Any]) -> list[dict[str, float]]:
    """The first token's likely candidates with their log probabilities, of prompts that come in one request."""
    marker = lockdown.request("GET", f"{server.url}/props", server.key, 60).json()["media_marker"]
    prompts = json.loads(json.dumps(prompts).replace(MARKER, marker))
    body = {"prompt": prompts, "n_predict": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False}
    reply = lockdown.request("POST", f"{server.url}/completion", server.key, 60, body)
    assert reply.status_code == 200, reply.text
    replies = reply.json()
    replies = replies if isinstance(replies, list) else [replies]
    tops = [each["completion_probabilities"][0]["top_logprobs"] for each in sorted(replies, key=lambda each: each["index"])]
    return [{top["token"] + str(top["id"]): top["logprob"] for top in of} for of in tops]


def decodes(server: Server) -> int:
    """Decode calls so far."""
    found = re.search(
        r"^llamacpp:n_decode_total (\d+)", lockdown.request("GET", f"{server.url}/metrics", server.key, 60).text, re.MULTILINE
    )
    assert found is not None
    return int(found[1])


def apart(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The largest difference of two answers, of what both name."""
    return max(abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys())


def test_ranges_of_sites_that_it_does_not_know_are_said(built: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Of both files, and nothing of those that it knows; such a file answers as one without them."""
    plain, tower = (
        write_plain(tiny_dir, tmp_path / "plain.gguf").read_bytes(),
        write_mmproj(tiny_dir, tmp_path / "mmproj.gguf").read_bytes(),
    )
    found, log = [], tmp_path / "server.log"
    for more in ({}, {"mbq.act.range.delta.text": [1e30]}):
        (tmp_path / "model.gguf").write_bytes(with_keys(plain, keys(TEXT, VISION) | more))
        vision = {"mbq.act.range.qkv.vision": [1.0], **{key.replace("delta", "qkv"): value for key, value in more.items()}}
        (tmp_path / "vision.gguf").write_bytes(with_keys(tower, {"mbq.act.version": 1} | vision))
        with Server(
            tmp_path / "model.gguf", tmp_path / "vision.gguf", ["--no-ui", "--threads", "1", "--ctx-size", "1024"], log_file=log
        ) as server:
            found.append(answers(server, [f"First {WORDS}"]))
        said = re.findall(r"(mbq\.act\.\S+) is of no site or class that this program knows", log.read_text())
        assert said == ["mbq.act.range.delta.text", "mbq.act.range.qkv.text"] * bool(more)
    assert found[0] == found[1]
