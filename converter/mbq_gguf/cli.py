"""The ``mbq-gguf`` command: click commands and nothing else; each imports its work only when it is called."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from mbq_gguf import __version__, launch, settings
from mbq_gguf.convert_command import convert
from mbq_gguf.errors import SHOWN, UsageError
from mbq_gguf.evaluate.command import eval_command
from mbq_gguf.export.atomic import check_gguf_output
from mbq_gguf.hub import model_directory
from mbq_gguf.llama_cpp.locks import termination_as_exit
from mbq_gguf.llama_cpp.steps import say
from mbq_gguf.terminal import speak_everywhere

DIRECTORY = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


WHOLE = "nothing half-written is left"
GOES_ON = f"{WHOLE}; the same command goes on from what is finished"
STOPPED = {  # what is left of a command that writes; others have nothing to say
    "build": WHOLE,
    "convert": GOES_ON,
    "demo": GOES_ON,
    "demo-model": WHOLE,
    "eval": f"{WHOLE}; with --out or --html the same command goes on from what is finished",
    "imatrix": WHOLE,
}


class Commands(click.Group):
    """A group that prints one of :data:`SHOWN` as its sentence and ends with its exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As click does, in a terminal of any encoding."""
        speak_everywhere()
        return super().main(*args, **options)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; of several processes (torchrun) all but `convert` would do the same work and write the same files."""
        found = super().resolve_command(ctx, args)
        if launch.count() > 1 and found[0] != "convert":
            raise UsageError(f"{found[0]} is the work of one process: start it without torchrun")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; 1 means it failed, 2 that the call was wrong, 128 and its number that a signal ended it (Ctrl-C: 130)."""
        try:
            with launch.ended_by_signal(), termination_as_exit():
                return super().invoke(ctx)
        except SHOWN as error:
            launch.wait_for_the_first()
            launch.report(str(error))
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # pathlib's is_file() lets this one through, for every path of the command
                raise
            Console(stderr=True).print("[bold red]error:[/] a path is longer than the file system takes: shorten it", highlight=False)
            sys.exit(2)
        except KeyboardInterrupt:
            _say_stopped(ctx.invoked_subcommand)
            sys.exit(130)
        except SystemExit as end:
            if end.code in (129, 143):
                _say_stopped(ctx.invoked_subcommand)
            raise


def _say_stopped(command: str | None) -> None:
    if not launch.first():
        return
    left = launch.ENDED if launch.count() > 1 else STOPPED.get(command or "")
    with suppress(OSError):  # SIGHUP: the terminal is gone
        Console(stderr=True).print(f"stopped: {left}" if left else "stopped", highlight=False, soft_wrap=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mbq-gguf")
def main() -> None:
    """Make vision-language models small for llama.cpp without making them blind.

    \b
    mbq-gguf build                                   fetch, patch and build llama.cpp (once)
    mbq-gguf convert MODEL out.gguf                  calibrate with pictures, write GGUF and mmproj
    mbq-gguf ask out.gguf picture.png "What is it?"  one answer; several pictures may be given
    mbq-gguf serve out.gguf                          a web page and an OpenAI-compatible API
    mbq-gguf inspect out.gguf                        what is in a file
    mbq-gguf eval bf16.gguf out.gguf --mmproj M      how much it lost, on questions about pictures
    mbq-gguf imatrix MODEL imatrix.gguf              for llama-quantize: which channels pictures need
    mbq-gguf models                                  which families are supported, and what works with each
    mbq-gguf path llama-server                       where a built program lies
    """


def wide_console() -> Console:
    """Standard output for tables: 160 columns into a file or a pipe, where rich gives 80, so that grep finds a row in one line."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


@main.command(short_help="Fetch, patch and build llama.cpp, once.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What the build computes on.")
@click.option(
    "--source", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A llama.cpp tree to use instead of the pinned one."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at a time (default: all cores).")
@click.option("--cuda-architectures", help="What CMAKE_CUDA_ARCHITECTURES takes, such as 90-real (default: this machine's card).")
@click.option(
    "--page",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="llama-server's web page, built with npm: where node is there, or not at all.",
)
def build(backend: str, source: Path | None, jobs: int | None, cuda_architectures: str | None, page: str) -> None:
    """Fetch the pinned llama.cpp, patch it, build it and prove that the result runs on this machine.

    A finished build is kept in the user's cache and found again by its content, so a second call returns at once.
    """
    from mbq_gguf.llama_cpp.build import build as build_llama_cpp

    console = Console()
    tree = build_llama_cpp(backend, source=source, jobs=jobs, cuda_architectures=cuda_architectures, page=page, console=console)
    say(console, f"llama.cpp is ready in {tree}")


@main.command(short_help="Print where a built program or library lies.")
@click.argument("name")
def path(name: str) -> None:
    """Print where the built program or library NAME lies, such as llama-server or libllama.so."""
    from mbq_gguf.llama_cpp.paths import find

    click.echo(os.fsencode(find(name)))  # as the file system has it: for $(mbq-gguf path NAME) in any locale


@main.command(short_help="A web page and an OpenAI-compatible API for a file.")
@click.argument("file", type=FILE)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--mmproj", type=FILE, help="The vision file (default: mmproj-FILE beside FILE).")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Where it listens, on 127.0.0.1.")
def serve(file: Path, options: tuple[str, ...], mmproj: Path | None, port: int) -> None:
    """Serve the GGUF file FILE in the patched llama-server, with its web page and an OpenAI-compatible API, until Ctrl-C.

    OPTIONS after `--` are llama-server's own. The server is closed but for this machine and whoever has the key that is printed:

    \b
    -- --host 0.0.0.0                listen to the network
    -- --api-key KEY                 a key of your own; --api-key "" asks for none
    -- --slots --metrics --props     lists of running requests, counters, changes of properties
    -- --cors-origins '*'            let pages of other sites ask it (with the key)
    -- --video-ffmpeg-dir /usr/bin   hand WebP pictures and films to ffmpeg

    Pictures are sent by the page or as data: URLs of PNG, JPEG, GIF or BMP; nothing is fetched from http:// URLs. LLAMA_* variables do not
    reach the server. From a shell, with the key:

    \b
    printf '{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,%s"}}]}]}' "$(base64 -w0 cat.png)" |
      curl http://127.0.0.1:8080/v1/chat/completions -H "Authorization: Bearer KEY" -H "Content-Type: application/json" -d @-
    """
    from mbq_gguf.llama_cpp.serve import serve as serve_file

    serve_file(file, mmproj, port, options, Console())


@main.command(short_help="One answer about pictures.")
@click.argument("file", type=FILE)
@click.argument("pictures", nargs=-1, type=FILE)
@click.argument("question")
@click.option("--mmproj", type=FILE, help="The vision file (default: mmproj-FILE beside FILE).")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="The longest answer.")
@click.option(
    "--ctx", type=click.IntRange(min=64), default=8192, show_default=True, help="Tokens of context: pictures, question and answer."
)
@click.option("--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True, help="Layers on the GPU, with a CUDA build.")
def ask(file: Path, pictures: tuple[Path, ...], question: str, **options: Any) -> None:
    """Ask the GGUF file FILE one QUESTION about PICTURES, in the order given, and print the answer.

    \b
    mbq-gguf ask out.gguf receipt.png "What is the total?"
    mbq-gguf ask out.gguf before.jpg after.jpg "What has changed?"
    """
    from mbq_gguf.llama_cpp.serve import ask as ask_file

    answer = ask_file(file, pictures=pictures, question=question, console=Console(stderr=True), **options)
    click.echo(answer.text.strip())
    if answer.finish_reason == "length":
        Console(stderr=True).print(f"cut after {answer.completion_tokens} tokens: --max-tokens allows more", highlight=False)


@main.command("demo-model", short_help="Write that small model, the reference VLM.")
@click.argument("directory", type=DIRECTORY)
def demo_model(directory: Path) -> None:
    """Write the reference VLM (135M parameters, sees drawn scenes) to DIRECTORY as a Hugging Face model."""
    from mbq_gguf.demo.assemble import assemble

    say(Console(), f"reference VLM written to {assemble(directory)}")


@main.command(short_help="The whole path once, on a small model that comes along.")
@click.option("--directory", type=DIRECTORY, default=Path("build/demo"), show_default=True, help="Where the demonstration keeps its files.")
def demo(directory: Path) -> None:
    """The whole path once: build, reference VLM, 3 bits, and three questions about pictures to the patched llama-server."""
    from mbq_gguf.demo.run import run_demo

    run_demo(Console(), directory)


@main.command(short_help="How a file was made, and its tensors.")
@click.argument("file", type=FILE)
def inspect(file: Path) -> None:
    """Show how FILE was made and a table of its tensors, types and bits per weight."""
    from mbq_gguf.export.inspect import inspect as inspect_file

    wide_console().print(inspect_file(file))


@main.command(short_help="llama.cpp's importance matrix, computed with pictures.")
@click.argument("model")
@click.argument("out", type=FILE)
@click.option("--revision", help="Of a MODEL on a hub: a branch, a tag or a commit (default: main).")
@click.option("--calib", type=click.Path(path_type=Path), help="A JSONL set or a folder of pictures (default: shipped drawn scenes).")
@click.option("--samples", type=click.IntRange(min=1), default=settings.SAMPLES, show_default=True, help="Calibration samples.")
@click.option("--seed", type=int, default=settings.SEED, show_default=True, help="Which samples are drawn.")
@click.option("--device", default=settings.DEVICE, show_default=True, help="Where layers are computed: cpu, cuda, cuda:1.")
@click.option(settings.TRUST, "trust_remote_code", is_flag=True, default=False, help=settings.TRUST_HELP)
def imatrix(
    model: str, out: Path, revision: str | None, calib: Path | None, samples: int, seed: int, device: str, trust_remote_code: bool
) -> None:
    """Write llama.cpp's importance matrix of the Hugging Face VLM MODEL to OUT, computed on pictures and their questions.

    MODEL is a directory, or a name on the hub, as for `convert`.

    llama-imatrix sees text alone; here the image tokens count as well. For files that llama-quantize makes:

    \b
    mbq-gguf convert MODEL bf16.gguf --type BF16
    mbq-gguf imatrix MODEL imatrix.gguf
    $(mbq-gguf path llama-quantize) --imatrix imatrix.gguf bf16.gguf q4_k_m.gguf Q4_K_M

    `convert` needs no such file: it calibrates by itself, and its rounding keeps far more.
    """
    console = Console()
    check_gguf_output(out)  # before gigabytes are fetched
    model_dir = model_directory(model, revision, console, trust_remote_code)
    from mbq_gguf.imatrix import make_imatrix

    say(console, make_imatrix(model_dir, out, calib, samples, seed, device, console, trust_remote_code))


@main.command(short_help="Which families of models are supported.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def models(as_json: bool) -> None:
    """List the families of models that are supported, what works with each, and why something does not."""
    import json

    from mbq_gguf.models import support

    if as_json:
        click.echo(json.dumps(support.as_json(), indent=2))
    else:
        wide_console().print(support.table(), highlight=False)


@main.command(short_help="Write or renew a model card, README.md, beside a file.")
@click.argument("out", type=FILE)
def card(out: Path) -> None:
    """Write or renew README.md beside the GGUF file OUT: a model card, with what `eval --out` found if its JSON lies there."""
    from mbq_gguf.card import write_card
    from mbq_gguf.export.gguf_header import read_header

    read_header(out)  # what is wrong with OUT is said before what is wrong with README.md
    say(Console(), f"{write_card(out)} written")


main.add_command(convert)
main.add_command(eval_command)
