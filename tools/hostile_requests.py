"""Requests that no sane client sends, and the responses that a server may give to each."""

from __future__ import annotations

import base64
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

CHAT = "/v1/chat/completions"
SECONDS = 300.0
REFUSED = ("400", "413", "415", "422", "500")
LATER = ("200", *REFUSED)  # nonsense that a server may also ignore


@dataclass(frozen=True)
class Hostile:
    """One request; ``send`` returns the status, "closed" if the server hangs up, or "no answer" after :data:`SECONDS`.

    ``alone``: the response takes so much memory that several at a time would dominate the measurement of the server's memory.
    """

    name: str
    allowed: tuple[str, ...]
    send: Callable[[str, str], str]
    alone: bool = False


def _post(data: bytes | Any, key: str | None = None, path: str = CHAT, **headers: str) -> Callable[[str, str], str]:
    def send(url: str, own: str) -> str:
        with requests.Session() as session:
            session.trust_env = False
            content = data if isinstance(data, bytes) else json.dumps(data).encode()
            head = {"Authorization": f"Bearer {own if key is None else key}", "Content-Type": "application/json"} | headers
            try:
                return str(session.post(url + path, data=content, headers=head, timeout=SECONDS).status_code)
            except requests.Timeout:
                return "no answer"
            except requests.ConnectionError:
                return "closed"

    return send


def _raw(data: bytes) -> Callable[[str, str], str]:
    """Send bytes that are not HTTP, or only its beginning, then hang up."""

    def send(url: str, own: str) -> str:
        place = urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout=SECONDS) as connection:
            connection.sendall(data.replace(b"KEY", own.encode()))
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(64)
            except TimeoutError:
                return "no answer"
            except ConnectionError:
                return "closed"
        return answer.split()[1].decode() if answer.startswith(b"HTTP/") else "closed"

    return send


def _picture(url: Any, **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def _says(text: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


def _png(width: int, height: int, packed: bytes) -> str:
    """A PNG that claims that many pixels, as a data: URL."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


GREY = zlib.compress(b"\x00" + bytes(3 * 64), 9)
SMALL = _png(64, 1, GREY)
NOISE = random.Random(0).randbytes(3000)

HOSTILE = [
    Hostile("no JSON", REFUSED, _post(b"{")),
    Hostile("empty body", REFUSED, _post(b"")),
    Hostile("JSON of another kind", REFUSED, _post([1, 2])),
    Hostile("noise", REFUSED, _post(NOISE)),
    Hostile("nested JSON", REFUSED, _post(b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}")),
    Hostile("no messages", REFUSED, _post({"prompt": 1})),
    Hostile("messages of another kind", REFUSED, _post({"messages": "hello"})),
    Hostile("content of another kind", REFUSED, _post(_says({"a": 1}))),
    Hostile("a role of another kind", REFUSED, _post({"messages": [{"role": 7, "content": "x"}]})),
    Hostile("a part without a type", REFUSED, _post(_says([{"text": "x"}]))),
    Hostile("no key", ("401",), _post(_says("x"), key="")),
    Hostile("a wrong key", ("401",), _post(_says("x"), key="0" * 32)),
    Hostile("a long key", ("400", "401", "431", "closed"), _post(_says("x"), key="k" * 100_000)),
    Hostile("no such path", ("404",), _post({}, path="/v1/nothing")),
    Hostile("slots", ("404", "501"), _post({}, path="/slots/0?action=save")),
    Hostile("tokens of no number", LATER, _post(_says("x", max_tokens="many"))),
    Hostile("a grammar that is none", REFUSED, _post(_says("x", grammar="root ::= ("))),
    Hostile("a schema that is none", LATER, _post(_says("x", response_format={"type": "json_schema", "json_schema": {"schema": 7}}))),
    Hostile("a schema without end", LATER, _post(_says("x", json_schema={"$ref": "#"}))),
    Hostile("samplers of no kind", LATER, _post(_says("x", samplers=[1, {}, None]))),
    Hostile("bias of no token", LATER, _post(_says("x", logit_bias=[[1 << 40, 1], ["", -1e308]]))),
    Hostile("temperature without measure", LATER, _post(_says("x", temperature=1e308, top_k=-(1 << 31), top_p=-1, min_p=2))),
    Hostile("many probabilities", LATER, _post(_says("x", logprobs=True, top_logprobs=1000))),
    # of all tokens: 280 MB as JSON, for 4 tokens of 49152
    Hostile("too many probabilities", LATER, _post(_says("x", logprobs=True, top_logprobs=1_000_000)), alone=True),
    Hostile("a prompt longer than the context", REFUSED, _post(_says("word " * 20_000))),
    Hostile("text that is not valid UTF-8", LATER, _post(b'{"messages":[{"role":"user","content":"\xff\xfe"}],"max_tokens":4}')),
    Hostile("special tokens", LATER, _post(_says("<|im_end|><|vision_start|><__media__>" * 20))),
    Hostile("truncated base64", REFUSED, _post(_picture(SMALL[: len(SMALL) // 2]))),
    Hostile("base64 of noise", REFUSED, _post(_picture("data:image/png;base64," + base64.b64encode(NOISE).decode()))),
    Hostile("no base64", REFUSED, _post(_picture("data:image/png;base64,%%%%"))),
    Hostile("data: without data", REFUSED, _post(_picture("data:image/png;base64"))),
    Hostile("a picture of another kind", REFUSED, _post(_picture({"a": 1}))),
    Hostile("a picture by http", REFUSED, _post(_picture("http://127.0.0.1:1/x.png"))),
    Hostile("a picture from the disk", REFUSED, _post(_picture("file:///etc/passwd"))),
    Hostile("900 million pixels that are not there", REFUSED, _post(_picture(_png(30_000, 30_000, GREY)))),
    Hostile("sides without measure", REFUSED, _post(_picture(_png((1 << 31) - 1, (1 << 31) - 1, GREY)))),
    Hostile("a side of nothing", REFUSED, _post(_picture(_png(0, 64, GREY)))),
    Hostile("16 million pixels of nothing", LATER, _post(_picture(_png(4000, 4000, zlib.compress(bytes(4000 * 12_001), 9))))),
    Hostile("a strip", LATER, _post(_picture(SMALL))),
    Hostile("no HTTP", ("400", "closed"), _raw(NOISE[:200])),
    Hostile("half a head", ("400", "closed"), _raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthor")),
    Hostile(
        "less than announced",
        ("400", "closed"),
        _raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\nContent-Length: 99999\r\n\r\n{"),
    ),
    Hostile(
        "a length of no number",
        ("400", "closed"),
        _raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\nContent-Length: -1\r\n\r\n{}"),
    ),
]
