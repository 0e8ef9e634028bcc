"""Run the patched ``llama-server`` on a model and ask it questions about pictures through its OpenAI-compatible API."""

from __future__ import annotations

import base64
import mimetypes
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import requests

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.llama_cpp.locks import termination_as_exit
from mbq_gguf.llama_cpp.paths import find_program
from mbq_gguf.llama_cpp.steps import end_group

START_SECONDS = 600.0  # large models on slow disks load for minutes
ANSWER_SECONDS = 600.0  # one answer, waiting for a free slot included
START_TRIES = 3  # another program may take the free port before the server does


@dataclass(frozen=True)
class Answer:
    """What the server answered. ``seconds`` is the whole request as the client sees it; token counts are the server's own."""

    text: str
    seconds: float
    prompt_tokens: int  # image tokens included
    completion_tokens: int
    finish_reason: str  # "stop", or "length" where max_tokens cut the answer


class LlamaServer:
    """Context manager: ``llama-server`` on a free port of 127.0.0.1, ready to answer inside the ``with`` block, always stopped after it.

    `threads`: CPU threads, the server's own choice where None. `ctx`: tokens of context for each of the `parallel` slots; that many
    questions are answered at once, and `ask` may be called from as many threads. `gpu_layers`: layers on the GPU, for a CUDA build.
    `log_file` keeps the server's log; without it the log is gone when the server stops.

    Raises UsageError where a file is missing and UserError, with the last lines of its log, where the server does not start.
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
        for file in (model, mmproj):
            if file is not None and not file.is_file():
                raise UsageError(f"there is no file {file}: give the path of a GGUF file")
        command: list[str | Path] = [
            find_program("llama-server"),
            "--model",
            model.absolute(),
            "--host",
            "127.0.0.1",
            "--offline",
            "--no-webui",
        ]
        command += ["--ctx-size", str(ctx * parallel), "--parallel", str(parallel), "--gpu-layers", str(gpu_layers)]
        if mmproj is not None:
            command += ["--mmproj", mmproj.absolute()]
        if threads is not None:
            command += ["--threads", str(threads)]
        self._command = command
        self._log_file = log_file
        self._exit = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self.url = ""

    def __enter__(self) -> LlamaServer:
        with ExitStack() as undo:
            undo.enter_context(termination_as_exit())
            undo.callback(self._stop)
            if self._log_file is None:
                self._log = undo.enter_context(tempfile.NamedTemporaryFile("w+", prefix="llama-server-", suffix=".log"))
            else:
                self._log_file.parent.mkdir(parents=True, exist_ok=True)
                self._log = undo.enter_context(self._log_file.open("w+", encoding="utf-8"))
            self._start()
            self._exit = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        """The server's process number. Raises RuntimeError outside the ``with`` block."""
        if self._process is None:
            raise RuntimeError("the server runs only inside the with block")
        return self._process.pid

    def ask(self, image: Path | None, question: str, max_tokens: int = 64, *, temperature: float = 0.0, seed: int = 0) -> Answer:
        """One question, about one picture where given: the picture comes first, then the question; greedy by default.

        Raises UsageError where the picture cannot be read, UserError where the server refuses or dies.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "cache_prompt": False,  # an answer must not depend on what was asked before
        }
        begin = time.monotonic()
        try:
            response = requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS)
        except requests.Timeout as error:
            raise UserError(
                f"llama-server gave no answer within {ANSWER_SECONDS:.0f} s: ask for fewer tokens or use more threads"
            ) from error
        except requests.RequestException as error:
            raise UserError(f"llama-server stopped while answering ({self._last_words()}): try a smaller context or more memory") from error
        if response.status_code != 200:
            raise UserError(
                f"llama-server refused the question{f' about {image}' if image else ''} ({_reason(response)}): change the question"
            )
        return _answer(response.json(), time.monotonic() - begin)

    def _start(self) -> None:
        assert self._log is not None
        for _ in range(START_TRIES):
            port = _free_port()
            self.url = f"http://127.0.0.1:{port}"
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server.
            self._process = subprocess.Popen(
                [*self._command, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            if self._wait_until_ready():
                return
            words = self._last_words()
            if "bind" not in words:
                break
        raise UserError(f"llama-server did not start ({words}): check the files and the free memory")

    def _wait_until_ready(self) -> bool:
        """True as soon as the model is loaded, False where the process ends before that."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return True
            time.sleep(0.05)
        raise UserError(
            f"llama-server was not ready after {START_SECONDS:.0f} s ({self._last_words()}): use a faster disk or a smaller file"
        )

    def _stop(self) -> None:
        if self._process is not None:
            end_group(self._process)
            self._process.wait()

    def _last_words(self, lines: int = 3) -> str:
        """The last lines of the server's log that speak of an error, else simply the last ones."""
        assert self._log is not None
        said = [line.strip() for line in Path(self._log.name).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if any(word in line.lower() for word in ("error", "failed", "couldn't", "unknown"))]
        words = " | ".join((errors or said)[-lines:]) or "it said nothing"
        return f"{words}; the log is {self._log_file}" if self._log_file else words


def data_url(image: Path) -> str:
    """The picture's file as it is, in a ``data:`` URL. Raises UsageError where it cannot be read."""
    try:
        data = image.read_bytes()
    except OSError as error:
        raise UsageError(f"the picture {image} cannot be read ({error.strerror}): give the path of a PNG or JPEG file") from error
    kind = mimetypes.guess_type(image.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _answer(reply: dict[str, Any], seconds: float) -> Answer:
    choice, usage = reply["choices"][0], reply["usage"]
    text = choice["message"]["content"] or ""
    return Answer(text, seconds, usage["prompt_tokens"], usage["completion_tokens"], choice["finish_reason"])


def _reason(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
