"""Runs the patched ``llama-server`` on a model, accessible only to this process by default, and queries its OpenAI-compatible API."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import requests

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp import die_with_parent, lockdown
from mbq_gguf.llama_cpp.locks import termination_as_exit
from mbq_gguf.llama_cpp.paths import find_program
from mbq_gguf.llama_cpp.steps import end_group
from mbq_gguf.picture import png

START_SECONDS = 600.0  # large models on slow disks load for minutes
ANSWER_SECONDS = 600.0  # for one answer, including the wait for a free slot
LOGGED = re.compile(r"^\d+(\.\d+){3} [A-Z] ([a-z]{3,4} +)?")  # prefix of a log line: time, level and module
OPTION_REFUSED = re.compile(r"error while handling argument|invalid argument|expected value for argument")  # of common/arg.cpp
# The smallest valid numbers; smaller ones end in an assertion of llama.cpp after the model is loaded.
LEAST = {"-c": 0, "--ctx-size": 0, "-b": 1, "--batch-size": 1}
START_TRIES = 3  # another program may take the free port first
# The kernel kills a server when the *thread* that started it ends (die_with_parent.py); this thread lasts as long as the process.
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="llama-server")


@dataclass(frozen=True)
class Answer:
    """The server's answer. ``seconds``: the duration of the request as the client sees it; token counts are the server's."""

    text: str
    seconds: float
    prompt_tokens: int  # including image tokens
    completion_tokens: int
    finish_reason: str  # "stop", or "length" if max_tokens was reached


class Server:
    """Context manager: ``llama-server`` on 127.0.0.1, ready to answer inside the ``with`` block, always stopped after it.

    Requests need its `key` (lockdown.py has the other restrictions), and the server ends with this process, however that ends. `options`
    are llama-server's own; they come last and can lift restrictions; if they contain a key, none is generated. `port`: 0 for a free one.
    `log_file` keeps the server's log, which is otherwise deleted when the server stops.

    Raises UsageError if a file is missing or an option is refused, and UserError, with the last lines of its log, if the server does
    not start.
    """

    def __init__(self, model: Path, mmproj: Path | None, options: Sequence[str], *, port: int = 0, log_file: Path | None = None) -> None:
        for file in (model, mmproj):
            if file is not None and not file.is_file():
                raise UsageError(f"there is no file {file}: give the path of a GGUF file")
        _check_numbers(options)
        self._command: list[str] = [str(find_program("llama-server")), "--model", str(model.absolute())]
        if mmproj is not None:
            self._command += ["--mmproj", str(mmproj.absolute())]
        self._command += [*lockdown.OPTIONS, *options]
        self._host = _last_value(options, "--host") or "127.0.0.1"
        self._port = _port(_last_value(options, "--port") or str(port))
        self._log_file = log_file
        self._exit = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self.key = None if lockdown.brings_own_key(options) else lockdown.new_key()
        self.url = ""

    def __enter__(self) -> Self:
        if self._process is not None:
            raise RuntimeError("the server was started before: make another one")
        with ExitStack() as undo:
            undo.enter_context(termination_as_exit())
            undo.callback(self._stop)
            no_configuration = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="llama-server-")))
            if self._log_file is None:
                self._log = undo.enter_context(tempfile.NamedTemporaryFile("w+", prefix="llama-server-", suffix=".log"))
            else:
                self._log_file.parent.mkdir(parents=True, exist_ok=True)
                self._log = undo.enter_context(self._log_file.open("w+", encoding="utf-8"))
            self._start(lockdown.environment(self.key, no_configuration))
            self._exit = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        """The server's process id. Raises RuntimeError outside the ``with`` block."""
        if self._process is None:
            raise RuntimeError("the server runs only inside the with block")
        return self._process.pid

    def wait(self) -> NoReturn:
        """Wait until the server ends by itself, then raise UserError, which says how it ended."""
        assert self._process is not None
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"llama-server ended by itself with {how} ({self._last_words()}): start it again, `-- --log-file FILE` keeps its log"
        )

    def ask(
        self, images: Path | Sequence[Path] | None, question: str, max_tokens: int = 64, *, temperature: float = 0.0, seed: int = 0
    ) -> Answer:
        """One question, about one or several pictures if given: they come first, in their order, then the question; greedy by default.

        Raises UsageError if a picture cannot be read, UserError if the server refuses or dies.
        """
        pictures = [images] if isinstance(images, Path) else list(images or ())
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "cache_prompt": False,  # answers must not depend on earlier requests
        }
        sent = json.dumps(body).encode()  # before the clock starts: a picture is about a megabyte
        begin = time.monotonic()
        try:
            response = lockdown.request("POST", f"{self.url}/v1/chat/completions", self.key, ANSWER_SECONDS, sent)
        except requests.Timeout as error:
            raise UserError(
                f"llama-server gave no answer within {ANSWER_SECONDS:.0f} s: ask for fewer tokens or use more threads"
            ) from error
        except requests.RequestException as error:
            raise UserError(f"llama-server stopped while answering ({self._last_words()}): try a smaller context or more memory") from error
        if response.status_code != 200:
            about = f" about {', '.join(map(str, pictures))}" if pictures else ""
            raise UserError(f"llama-server refused the question{about} ({_reason(response)}): change the question")
        return _answer(response.json(), time.monotonic() - begin)

    def _start(self, environment: dict[str, str]) -> None:
        assert self._log is not None
        command = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()), *self._command]
        if self._port and _taken(self._port):
            raise UserError(f"port {self._port} is in use by another program: choose another one with --port")
        for _ in range(START_TRIES):
            port = self._port or _free_port()
            everywhere = self._host in ("0.0.0.0", "::")
            self.url = f"http://{'127.0.0.1' if everywhere else self._host}:{port}"
            # In a new session, so that Ctrl-C reaches only this process, which then stops the server.
            self._process = _STARTER.submit(
                subprocess.Popen,
                [*command, "--host", self._host, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            ).result()
            if self._wait_until_ready():
                return
            words = self._last_words()
            if OPTION_REFUSED.search(words):
                raise UsageError(f"llama-server refuses an option ({words}): `$(mbq-gguf path llama-server) --help` lists them")
            if "bind" not in words or self._port:
                break
        raise UserError(f"llama-server did not start ({words}): check the files and the free memory")

    def _wait_until_ready(self) -> bool:
        """Wait and return True as soon as the model is loaded, False if the process ends before that."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        path = (
            "/v1/models" if self.key else "/health"
        )  # only our server knows the key; another server on this port would answer /health too
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            with suppress(requests.RequestException):
                if lockdown.request("GET", self.url + path, self.key, timeout=5).status_code == 200:
                    return True
            time.sleep(0.05)
        raise UserError(
            f"llama-server was not ready after {START_SECONDS:.0f} s ({self._last_words()}): use a faster disk or a smaller file"
        )

    def _stop(self) -> None:
        if self._process is not None:
            end_group(self._process)
            self._process.wait()

    def _last_words(self, lines: int = 4) -> str:
        """The last lines of the server's log that mention an error, or else the last lines, without prefixes and duplicates. The cause is
        usually followed by three lines that only propagate it."""
        assert self._log is not None
        logged = Path(self._log.name).read_text(encoding="utf-8", errors="replace").splitlines()
        said = [text for line in logged if (text := LOGGED.sub("", line).strip())]
        errors = [line for line in said if any(word in line.lower() for word in ("error", "failed", "couldn't", "unknown"))]
        words = " | ".join(list(dict.fromkeys(errors or said))[-lines:]) or "no output"
        return f"{words}; the log is {self._log_file}" if self._log_file else words


class LlamaServer(Server):
    """A `Server` without web page, for the programs of this project.

    `threads`: CPU threads, the server's own choice where None. `ctx`: tokens of context for each of the `parallel` slots; that many
    questions are answered at once, and `ask` may be called from as many threads. `gpu_layers`: layers on the GPU, for a CUDA build.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None,
        *,
        threads: int | None = None,
        ctx: int = 2048,
        parallel: int = 1,
        gpu_layers: int = 0,
        log_file: Path | None = None,
    ) -> None:
        options = ["--no-ui", "--ctx-size", str(ctx * parallel), "--parallel", str(parallel), "--gpu-layers", str(gpu_layers)]
        if threads is not None:
            options += ["--threads", str(threads)]
        super().__init__(model, mmproj, options, log_file=log_file)


def data_url(image: Path) -> str:
    """A picture, opened by :mod:`mbq_gguf.picture`, as a PNG in a ``data:`` URL. Raises UserError if it is none."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode('ascii')}"


def _answer(reply: dict[str, Any], seconds: float) -> Answer:
    choice, usage = reply["choices"][0], reply["usage"]
    text = choice["message"]["content"] or ""
    return Answer(text, seconds, usage["prompt_tokens"], usage["completion_tokens"], choice["finish_reason"])


def _reason(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"


def _last_value(options: Sequence[str], name: str) -> str | None:
    """The value after the last `name` in `options`, which is the one that llama-server uses; None if it is not there."""
    values = [value for option, value in pairwise(options) if option == name]
    return values[-1] if values else None


def _check_numbers(options: Sequence[str]) -> None:
    """Raise UsageError for numbers below LEAST; llama-server itself rejects values that are not numbers."""
    for option, value in pairwise(options):
        if option in LEAST and re.fullmatch(r"-?\d+", value) and int(value) < LEAST[option]:
            raise UsageError(f"{option} {value} is too small: give {LEAST[option]} or more")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise UsageError(f"--port {text} is not a port: give a number from 1 to 65535")
    return int(text)


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
