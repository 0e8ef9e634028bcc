"""``mbq-gguf serve`` and ``mbq-gguf ask``: run a converted file, with its vision file, in the patched llama-server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from mbq_gguf.errors import UsageError
from mbq_gguf.export.gguf_specials import file_special_tokens
from mbq_gguf.llama_cpp.paths import check_gpu_layers
from mbq_gguf.llama_cpp.server import Answer, LlamaServer, Server
from mbq_gguf.llama_cpp.steps import say
from mbq_gguf.picture import open_picture
from mbq_gguf.special_tokens import check_text


def serve(file: Path, mmproj: Path | None, port: int, options: Sequence[str], console: Console) -> None:
    """Serve `file` on 127.0.0.1 until Ctrl-C; prints the address, and the key if one is required, when the server is ready.

    `mmproj`: by default the one beside `file`, and none if there is none. `options`: llama-server's own, which may open what is closed.
    Raises UserError if the server does not start or ends by itself.
    """
    # Otherwise every answer would contain the file's whole path; a comma would separate two names.
    name = [] if {"--alias", "-a"} & set(options) else ["--alias", file.stem.replace(",", " ")]
    server = Server(file, mmproj or _beside(file), [*name, *options], port=port)
    with ExitStack() as stack:
        with console.status(f"loading {file.name}"):
            stack.enter_context(server)
        say(console, f"{server.url}")
        if server.key:
            say(console, f"key: {server.key} (the page asks for it; programs send it as `Authorization: Bearer KEY`)")
        say(console, "Ctrl-C stops it")
        server.wait()


def ask(
    file: Path, mmproj: Path | None, pictures: Sequence[Path], question: str, max_tokens: int, ctx: int, gpu_layers: int, console: Console
) -> Answer:
    """The answer of `file` to one question about `pictures`, in their order. `ctx`: tokens of context, those of the pictures included.

    Raises UsageError if a file is missing, the question names a special token (:mod:`mbq_gguf.special_tokens`) or the build in use has no
    GPU for `gpu_layers`, UserError if the server does not start or refuses, as it does where `ctx` is too small.
    """
    check_gpu_layers(gpu_layers)
    vision = mmproj or _beside(file)
    if pictures and vision is None and file.is_file():  # a missing FILE is reported first, below
        raise UsageError(f"there is no vision file {_name_beside(file)}: put it there, or name it with --mmproj")
    if file.is_file():
        check_text(question, file_special_tokens(file), "the question")
    for picture in pictures:  # check before loading the model
        open_picture(picture)
    server = LlamaServer(file, vision if pictures else None, ctx=ctx, gpu_layers=gpu_layers)
    with console.status(f"loading {file.name}") as status, server:
        status.update("reading the pictures and answering" if pictures else "answering")
        return server.ask(pictures, question, max_tokens)


def _name_beside(file: Path) -> Path:
    return file.with_name(f"mmproj-{file.name}")


def _beside(file: Path) -> Path | None:
    """The vision file that ``convert`` wrote together with `file`, None if it is not there."""
    path = _name_beside(file)
    return path if path.is_file() else None
