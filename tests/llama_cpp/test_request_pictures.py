"""The faster handling of a request's pictures gives the same results as before: JSON, base64, SHA-256, files in threads."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mbq_cbind.model import Model
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.bindings import bind
from mbq_gguf.llama_cpp.server import LlamaServer
from test_server import EVAL, PICTURE
from tiny_pair import Pair

LONG = "abcdefgh" * 600  # beyond 4096 bytes a string goes past the parser
PLACES = {
    "a plain one": LONG,
    "quotes": f'{LONG}"{LONG}',
    "backslashes": f"{LONG}\\{LONG}\\\\",
    "a new line": f"{LONG}\n{LONG}",
    "beyond ASCII": f"{LONG}é",
    "nearly long": LONG[:4095],
    "brackets": f"{LONG}]}}:,{{",
}
BROKEN = {
    "no end": b'{"messages": [{"role": "user", "content": "%s}]}' % LONG.encode(),
    "a control": b'{"messages": [{"role": "user", "content": "%s\x01"}]}' % LONG.encode(),
    "no letters": b'{"messages": [{"role": "user", "content": "%s\xff"}]}' % LONG.encode(),
    "no comma": b'{"a": "%s" "b": 1}' % LONG.encode(),
    "a string behind a string": b'{"a": "b""%s"}' % LONG.encode(),
}


@pytest.fixture(scope="module")
def server(tiny_pair: Pair) -> Iterator[LlamaServer]:
    with LlamaServer(*tiny_pair, threads=1) as running:
        yield running


def call(server: LlamaServer, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    reply = lockdown.request("POST", server.url + path, server.key, 60, body)
    return reply.status_code, reply.json()


def about(urls: list[str]) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    question = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
    return {"messages": [question], "max_tokens": 3, "temperature": 0, "cache_prompt": False}


def test_long_strings_arrive_as_they_are(server: LlamaServer) -> None:
    texts = [f"{name}: {text}" for name, text in PLACES.items()]
    body = {"messages": [{"role": "user", "content": text} for text in [*texts, *texts]], LONG: LONG, "deep": [[{"a": [LONG]}]]}
    status, reply = call(server, "/apply-template", body)
    assert status == 200
    at = [reply["prompt"].find(text) for text in texts]
    assert -1 not in at
    assert at == sorted(at)
    assert [reply["prompt"].count(text) for text in texts] == [2] * len(texts)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_json_is_refused_at_the_place_where_it_ends_to_be_json(server: LlamaServer, name: str) -> None:
    reply = lockdown.request("POST", f"{server.url}/apply-template", server.key, 60, BROKEN[name])
    assert reply.status_code in (400, 500)
    place = int(reply.json()["error"]["message"].partition("column ")[2].partition(":")[0])
    assert place > len(LONG)  # of the request as it came


def test_base64_ends_where_it_always_ended(server: LlamaServer) -> None:
    picture = PICTURE.read_bytes()
    letters = [base64.b64encode(picture + bytes(more)).decode() for more in range(3)]  # what follows a PNG is not read
    assert sorted(one.count("=") for one in letters) == [0, 1, 2]
    urls = [f"data:image/png;base64,{one}{end}" for one in letters for end in ("", "=", "\n", "*AAAA")]
    urls += [f"data:image/png;base64,{letters[0].rstrip('=')}", letters[0]]
    answers = [call(server, "/v1/chat/completions", about([url])) for url in urls]
    assert {status for status, _ in answers} == {200}
    assert len({(reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]) for _, reply in answers}) == 1
    for broken in ("", "A", "AB", "*", letters[0][: len(letters[0]) // 2]):
        assert call(server, "/v1/chat/completions", about([f"data:image/png;base64,{broken}"]))[0] in (400, 500)


def test_one_broken_picture_among_several_refuses_them_all(server: LlamaServer) -> None:
    good = [f"data:image/png;base64,{base64.b64encode((EVAL / 'images' / f'000{i}.png').read_bytes()).decode()}" for i in range(4)]
    assert call(server, "/v1/chat/completions", about(good))[0] == 200
    for place in range(5):
        status, reply = call(server, "/v1/chat/completions", about([*good[:place], "data:image/png;base64,AAAA", *good[place:]]))
        assert (status, "load image" in reply["error"]["message"]) in ((400, True), (500, True))
    assert call(server, "/v1/chat/completions", about(good))[0] == 200


def test_a_picture_is_known_by_its_sha256(tiny_pair: Pair, tmp_path: Path) -> None:
    """Lengths about whole blocks of 64 bytes, in the processor's instructions or not."""
    bind()
    picture, file = PICTURE.read_bytes(), tmp_path / "picture"
    fill = -len(picture) % 64
    with Model(*tiny_pair, threads=1, context=64) as model:
        vision = model.vision
        ffi, c = vision._binding.ffi, vision._binding.c
        for more in (0, fill, fill + 1, fill + 55, fill + 56, fill + 63, fill + 64):
            file.write_bytes(picture + b"x" * more)
            loaded = c.mtmd_helper_bitmap_init_from_file(vision._context, os.fsencode(file), False, c.mtmd_helper_init_opt_default())
            bitmap = ffi.gc(loaded.bitmap, c.mtmd_bitmap_free)
            assert ffi.string(c.mtmd_bitmap_get_id(bitmap)).decode() == hashlib.sha256(file.read_bytes()).hexdigest()
