#!/usr/bin/env python3
"""Runs eight clients against one llama-server, with pictures, cancels and hostile input, and compares with one client at a time.

    python tools/soak_server.py FILE.gguf                 500 requests; the table goes to the terminal
    python tools/soak_server.py FILE.gguf --write         and into docs/results.md
    python tools/soak_server.py FILE.gguf --gpu-layers 99     on a GPU; its memory is watched too

Warms up with every hostile request, one at a time, and then with as many requests by all clients as are counted later, in another order.
Fails (exit code 1) if an answer differs, hostile input is not refused, the server dies, or its memory or the GPU's grows by 1 % or more.
"""

from __future__ import annotations

import platform
import queue
import random
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import requests
from hostile_requests import HOSTILE, Hostile
from mbq_gguf.errors import USER_ERRORS
from mbq_gguf.evaluate.exact_match import SHIPPED, Question, load_questions
from mbq_gguf.llama_cpp import lockdown
from mbq_gguf.llama_cpp.server import LlamaServer, data_url
from server_memory import growth, on_card, resident

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- soak table: tools/soak_server.py -->", "<!-- end of soak table -->"
TOKENS = 16  # per answer, at most
CONTEXT = 1024  # per slot: three pictures, question and answer
SHARES = {"text": 0.25, "one picture": 0.25, "three pictures": 0.15, "cancelled": 0.15, "hostile": 0.2}
PICTURES = {"text": 0, "one picture": 1, "three pictures": 3}
DISTINCT = 8  # questions of each kind
GROWTH_LIMIT = 0.01
EVERY = 10  # requests between two readings of GPU memory
Ask = tuple[str, tuple[Path, ...], str]  # kind, pictures, question


@dataclass
class Tally:
    """The results so far; threads update it under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)  # bytes after each request
    card: list[int] | None = None  # bytes in use on the GPU, every few requests; None without one
    differing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def plan(questions: list[Question], requests_count: int, draw: random.Random) -> tuple[list[Ask], list[Ask | Hostile | str]]:
    """The distinct questions, and all requests in order: a question, a question to be cancelled, or hostile input."""
    distinct: list[Ask] = []
    for kind, pictures in PICTURES.items():
        for index in range(DISTINCT):
            chosen = questions[index * 3 : index * 3 + max(1, pictures)]
            distinct.append((kind, tuple(question.image for question in chosen[:pictures]), chosen[0].question))
    tasks: list[Ask | Hostile | str] = []
    for kind, share in SHARES.items():
        pool: list[Any] = (
            [one for one in HOSTILE if not one.alone]
            if kind == "hostile"
            else ["cancelled"]
            if kind == "cancelled"
            else [a for a in distinct if a[0] == kind]
        )
        tasks += [pool[index % len(pool)] for index in range(round(share * requests_count))]
    draw.shuffle(tasks)
    return distinct, tasks


def body(ask: Ask) -> dict[str, Any]:
    """The request for a question, as `LlamaServer.ask` sends it."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in ask[1]]
    content.append({"type": "text", "text": ask[2]})
    return {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0.0, "cache_prompt": False}


def cancel(server: LlamaServer, ask: Ask, seconds: float) -> None:
    """Start a stream and hang up after ``seconds``."""
    with requests.Session() as session, suppress(requests.RequestException):
        session.trust_env = False
        headers = {"Authorization": f"Bearer {server.key}"}
        url, data = f"{server.url}/v1/chat/completions", body(ask) | {"stream": True}
        with session.post(url, json=data, headers=headers, stream=True, timeout=(60, seconds)) as response:
            next(response.iter_lines(), None)


def serve_one(
    server: LlamaServer, task: Ask | Hostile | str, distinct: list[Ask], expected: dict[Ask, str], seed: int, tally: Tally
) -> None:
    """Send one request of one client."""
    draw, began = random.Random(seed), time.monotonic()
    kind, wrong, differing, status = "cancelled", "", "", ""
    if isinstance(task, Hostile):
        kind = "hostile"
        status = task.send(server.url, server.key or "")
        if status not in task.allowed:
            wrong = f"{task.name}: {status} where {' or '.join(task.allowed)} was expected"
    elif isinstance(task, str):
        cancel(server, draw.choice(distinct), draw.uniform(0.01, 3))
    else:
        kind = task[0]
        given = server.ask(task[1], task[2], TOKENS).text
        if given != expected[task]:
            differing = f"{task[2]!r} ({kind}): {expected[task]!r} alone, {given!r} among others"
    seconds = time.monotonic() - began
    with tally.lock:
        tally.seconds[kind].append(seconds)
        tally.memory.append(resident(server.pid))
        tally.statuses[status] += bool(status)
        tally.differing += [differing] if differing else []
        tally.wrong += [wrong] if wrong else []
        if len(tally.memory) % 50 == 0:
            click.echo(f"{len(tally.memory)} requests, {len(tally.differing)} answers that differ, {tally.memory[-1] / 1e6:.0f} MB")
        look = tally.card is not None and len(tally.memory) % EVERY == 0
    if look and tally.card is not None:
        tally.card.append(on_card())


def soak(
    server: LlamaServer, clients: int, distinct: list[Ask], tasks: list[Any], expected: dict[Ask, str], *, card: bool = False
) -> Tally:
    """Send all of ``tasks``, ``clients`` at a time; with ``card``, GPU memory is watched."""
    tally, waiting = Tally(card=[] if card else None), queue.SimpleQueue[tuple[int, Any]]()
    for item in enumerate(tasks):
        waiting.put(item)

    def client(_: int) -> None:
        with suppress(queue.Empty):
            while True:
                index, task = waiting.get_nowait()
                serve_one(server, task, distinct, expected, index, tally)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return tally


def table(tally: Tally, file: Path, asked_by: str) -> str:
    """The result as a table for docs/results.md."""
    early, late = growth(tally.memory)
    asked = sum(len(tally.seconds[kind]) for kind in PICTURES)
    lines = [
        f"{len(tally.memory)} requests by {asked_by}, `{file.name}` ({file.stat().st_size / 1e6:.0f} MB), {machine()},",
        f"{datetime.now(UTC):%Y-%m-%d}; `python tools/soak_server.py FILE.gguf --write`.",
        "",
        "| requests | how many | as expected | seconds, median | 95th percentile |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in SHARES:
        seconds = sorted(tally.seconds[kind]) or [0.0]
        failed = sum(f"({kind})" in words for words in tally.differing) if kind in PICTURES else len(tally.wrong) * (kind == "hostile")
        right = "" if kind == "cancelled" else str(len(tally.seconds[kind]) - failed)
        high = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
        lines.append(f"| {kind} | {len(tally.seconds[kind])} | {right} | {statistics.median(seconds):.2f} | {high:.2f} |")
    lines += [
        "",
        f"{asked - len(tally.differing)} of {asked} answers are those that the same server gave to one client. Hostile requests got",
        f"{', '.join(f'{count} x {status}' for status, count in sorted(tally.statuses.items()) if count)}.",
        f"Memory: {early / 1e6:.1f} MB after as many requests that warmed up, {late / 1e6:.1f} MB at the end "
        f"({100 * (late / early - 1):+.2f} %).",
    ]
    if tally.card:
        early, late = growth(tally.card)
        lines.append(f"In use on the card: {early / 1e6:.1f} MB, {late / 1e6:.1f} MB at the end ({100 * (late / early - 1):+.2f} %).")
    return "\n".join(lines)


def machine() -> str:
    """The processor's name."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(found)} cores of {found[0].partition(':')[2].strip() if found else platform.processor()}"


def write(text: str) -> None:
    """Put the table between its markers in docs/results.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--mmproj", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The vision file (default: mmproj-FILE).")
@click.option("--requests", "count", default=500, show_default=True, type=click.IntRange(min=20))
@click.option("--clients", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--gpu-layers", default=0, show_default=True, type=click.IntRange(min=0), help="Layers on the GPU; needs a CUDA build.")
@click.option("--seed", default=0, show_default=True, help="Seed of the order.")
@click.option("--write", "into_page", is_flag=True, help="Put the table into docs/results.md.")
def main(file: Path, mmproj: Path | None, count: int, clients: int, threads: int, gpu_layers: int, seed: int, into_page: bool) -> None:
    """Soak a llama-server with FILE."""
    questions = load_questions(SHIPPED)
    (distinct, tasks), (_, first) = plan(questions, count, random.Random(seed)), plan(questions, count, random.Random(seed + 1))
    try:
        options: dict[str, Any] = {"threads": threads, "ctx": CONTEXT, "parallel": clients, "gpu_layers": gpu_layers}
        with LlamaServer(file, mmproj or file.with_name(f"mmproj-{file.name}"), **options) as server:
            click.echo(f"{len(distinct)} questions and {len(HOSTILE)} hostile requests one at a time")
            expected = {ask: server.ask(ask[1], ask[2], TOKENS).text for ask in distinct}
            for one in HOSTILE:  # the largest of them sets the memory that the server needs
                one.send(server.url, server.key or "")
            warmed = soak(server, clients, distinct, first, expected)
            click.echo("warm: from here on all is counted")
            began = time.monotonic()
            tally = soak(server, clients, distinct, tasks, expected, card=gpu_layers > 0)
            wall = time.monotonic() - began
            if lockdown.request("GET", f"{server.url}/v1/models", server.key, 60).status_code != 200:
                raise click.ClickException("the server answers no more: see its log")
    except USER_ERRORS as error:
        raise click.ClickException(str(error)) from error
    for words in (failed := warmed.differing + warmed.wrong + tally.differing + tally.wrong):
        click.echo(words)
    text = table(tally, file, f"{clients} clients in {wall:.0f} s, {threads} threads{', on a card' if gpu_layers else ''}")
    click.echo(text)
    if into_page:
        write(text)
    grown = any(late / early - 1 >= GROWTH_LIMIT for early, late in map(growth, filter(None, (tally.memory, tally.card))))
    sys.exit(1 if failed or grown else 0)


if __name__ == "__main__":
    main()
