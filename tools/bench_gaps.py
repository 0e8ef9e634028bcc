#!/usr/bin/env python3
"""Measures the longest gap between the tokens that clients receive while others ask about pictures: --aifs on against off.

    python tools/bench_gaps.py --model FILE.gguf --mmproj MMPROJ.gguf

Starts two servers with eight slots. In each round, half of the clients stream a long answer from one of them, and the others ask it about
one and three pictures until the streams end; then the same with the other server. The order alternates between rounds. Gaps are measured in
wall time and in the server's own processor time, which other work on the machine disturbs less (Linux, without a GPU). The longest of a few
hundred gaps is a single event, so the 99th percentile is printed too, and each ratio has a 95 % interval of its median.
"""

from __future__ import annotations

import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
import requests
from mbq_gguf.errors import USER_ERRORS
from mbq_gguf.evaluate.exact_match import SHIPPED, load_questions
from mbq_gguf.llama_cpp.server import Server
from rich.console import Console
from rich.progress import track

MODES = ("off", "on")
CONTEXT = 1024  # of a slot
COUNTED = ("longest gap, clock", "longest gap, processor", "99th percentile, clock")
TEXT = "Tell me a long story about a red circle."


@dataclass(frozen=True)
class Round:
    """What one server did in one round: seconds of each client, as in `COUNTED`, and the number of picture questions answered meanwhile."""

    gaps: tuple[tuple[float, ...], ...]
    asked: int

    def middle(self, by: int) -> float:
        """The median over the clients."""
        return statistics.median(gap[by] for gap in self.gaps)


def processor_seconds(pid: int) -> float:
    """Processor time of all threads of a process, including ended ones: its clock on Linux (clock_getcpuclockid)."""
    return time.clock_gettime(~pid << 3 | 2)


def gaps_of(server: Server, tokens: int) -> tuple[float, ...]:
    """Stream an answer of that many tokens; the seconds between tokens, as in `COUNTED`."""
    body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body["cache_prompt"] = False
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Authorization": f"Bearer {server.key}"}
        with session.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, stream=True, timeout=600) as reply:
            reply.raise_for_status()
            lines = (line for line in reply.iter_lines() if b'"delta"' in line)
            times = [(time.perf_counter(), processor_seconds(server.pid)) for _ in lines]
    gaps = [(later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in pairwise(times)]
    if len(gaps) < tokens // 2:
        raise click.ClickException(f"only {len(times)} of {tokens} tokens came: give a model that says something")
    clock = sorted(gap[0] for gap in gaps)
    return clock[-1], max(gap[1] for gap in gaps), clock[int(0.99 * len(clock))]


def one_round(server: Server, clients: int, tokens: int, prompts: list[tuple[list[Path], str]]) -> Round:
    """Half of the clients stream an answer, half ask questions until the streams end."""
    done, asked = threading.Event(), []

    def ask(number: int) -> None:
        while not done.is_set():
            pictures, question = prompts[(number + len(asked)) % len(prompts)]
            server.ask(pictures, question, 2)
            asked.append(number)

    listeners = clients // 2
    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, number) for number in range(clients - listeners)]
        try:
            gaps = tuple(pool.map(lambda _: gaps_of(server, tokens), range(listeners)))
        finally:
            done.set()
        for one in asking:
            one.result()
    return Round(gaps, len(asked))


def interleaved(rounds: int, run: Callable[[str], Round]) -> list[dict[str, Round]]:
    """Results of each mode in each round; the first round warms up and is dropped."""
    found = []
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        found.append({mode: run(mode) for mode in (MODES if number % 2 else MODES[::-1])})
    return found[1:]


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median (order statistics); the whole range if there are few values."""
    ordered, cut, outside = sorted(values), 0, 0.0
    while 2 * (outside + math.comb(len(values), cut) / 2 ** len(values)) <= 0.05:
        outside += math.comb(len(values), cut) / 2 ** len(values)
        cut += 1
    cut = max(0, cut - 1)
    return ordered[cut], ordered[-1 - cut]


def summary(rounds: list[dict[str, Round]]) -> str:
    """The figures as text."""
    lines = []
    for by, name in enumerate(COUNTED):
        for mode in MODES:
            gaps = [1000 * each[mode].middle(by) for each in rounds]
            lines.append(f"{name}, {mode}: {statistics.median(gaps):.0f} ms ({min(gaps):.0f} to {max(gaps):.0f})")
        ratios = [
            each["on"].middle(by) / each["off"].middle(by) for each in rounds if each["off"].middle(by) > 0
        ]  # tokens may come together
        if not ratios:
            continue
        low, high = interval(ratios)
        words = f"median of {len(ratios)} rounds, 95 % {low:.2f} to {high:.2f}, all {min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"{name}, on / off: {statistics.median(ratios):.2f} ({words})")
    asked = (f"{mode} {statistics.median(each[mode].asked for each in rounds):.0f}" for mode in MODES)
    return "\n".join([*lines, f"questions answered in a round: {', '.join(asked)}"])


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--mmproj", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--clients", default=8, show_default=True, type=click.IntRange(min=2))
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(min=10), help="Tokens of a streamed answer.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True)
def main(model: Path, mmproj: Path, clients: int, tokens: int, rounds: int, threads: int | None, gpu_layers: int) -> None:
    """Print both modes' gaps and their ratio."""
    questions = load_questions(SHIPPED)[:24]
    prompts = [([question.image], question.question) for question in questions[::2]]
    prompts += [([one.image for one in questions[i : i + 3]], questions[i].question) for i in range(0, len(questions) - 2, 3)]
    options = ["--no-ui", "--ctx-size", str(CONTEXT * clients), "--parallel", str(clients), "--gpu-layers", str(gpu_layers)]
    options += ["--threads", str(threads)] if threads else []
    with ExitStack() as stack:
        servers = {mode: stack.enter_context(Server(model, mmproj, [*options, "--aifs", mode])) for mode in MODES}
        click.echo(summary(interleaved(rounds, lambda mode: one_round(servers[mode], clients, tokens, prompts))))


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
