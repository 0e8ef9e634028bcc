"""The ``mbq-gguf`` command: click commands and nothing else; each imports its work only when it is called."""

from __future__ import annotations

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
from mbq_gguf.errors import USER_ERRORS, UsageError
from mbq_gguf.evaluate.command import eval_command
from mbq_gguf.export.atomic import check_gguf_output
from mbq_gguf.hub import model_directory
from mbq_gguf.llama_cpp.locks import termination_as_exit
from mbq_gguf.llama_cpp.steps import say
from mbq_gguf.system_errors import system_errors
from mbq_gguf.terminal import allow_any_encoding

DIRECTORY = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


CLEAN = "no partial files are left"
RESUMES = f"{CLEAN}; the same command resumes from what is finished"
STOPPED = {  # what an interrupted command that writes leaves behind
    "build": CLEAN,
    "convert": RESUMES,
    "demo": RESUMES,
    "demo-model": CLEAN,
    "eval": f"{CLEAN}; with --out or --html the same command resumes from what is finished",
    "imatrix": CLEAN,
}


class Commands(click.Group):
    """A group that prints each of :data:`USER_ERRORS` as one sentence and exits with its code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As in click, but for a terminal of any encoding."""
        allow_any_encoding()
        return super().main(*args, **options)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, but under torchrun only `convert` is allowed: with any other command all processes would write the same files."""
        found = super().resolve_command(ctx, args)
        if launch.count() > 1 and found[0] != "convert":
            raise UsageError(f"{found[0]} runs in one process: start it without torchrun")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Exit codes: 1 if it failed, 2 for wrong arguments, 128 + n if signal n ended it (Ctrl-C: 130)."""
        try:
            with launch.ended_by_signal(), termination_as_exit(), system_errors():
                return super().invoke(ctx)
        except USER_ERRORS as error:
            launch.wait_for_the_first()
            launch.report(str(error))
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            sys.exit(error.exit_code)
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
    mbq-gguf build                                   download, patch and build llama.cpp (once)
    mbq-gguf convert MODEL out.gguf                  calibrate with pictures, write GGUF and mmproj files
    mbq-gguf ask out.gguf picture.png "What is it?"  one answer, about one or several pictures
    mbq-gguf serve out.gguf                          a web page and an OpenAI-compatible API
    mbq-gguf inspect out.gguf                        how a file was made, and its tensors
    mbq-gguf eval bf16.gguf out.gguf                 how much it loses, on questions about pictures
    mbq-gguf imatrix MODEL imatrix.gguf              an importance matrix for llama-quantize
    mbq-gguf models                                  supported families, and what works with each
    mbq-gguf path llama-server                       where a built program is
    """


def wide_console() -> Console:
    """Standard output for tables: 160 columns into a file or a pipe (rich's default is 80), so that a row is one line for grep."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


@main.command(short_help="Download, patch and build llama.cpp, once.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="The device that the build is for.")
@click.option(
    "--source", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Build this llama.cpp tree instead of the pinned one."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Parallel compiler processes (default: all cores).")
@click.option("--cuda-architectures", help="CMAKE_CUDA_ARCHITECTURES, such as 90-real (default: this machine's GPU).")
@click.option(
    "--page",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Build llama-server's web page with npm; auto: if node is installed.",
)
def build(backend: str, source: Path | None, jobs: int | None, cuda_architectures: str | None, page: str) -> None:
    """Download the pinned llama.cpp, patch and build it, and check that the result runs on this machine.

    Finished builds are cached by content, so a second call returns at once.
    """
    from mbq_gguf.llama_cpp.build import build as build_llama_cpp

    console = Console()
    tree = build_llama_cpp(backend, source=source, jobs=jobs, cuda_architectures=cuda_architectures, page=page, console=console)
    say(console, f"llama.cpp is ready in {tree}")


@main.command(short_help="Print the path of a built program or library.")
@click.argument("name")
def path(name: str) -> None:
    """Print the path of the built program or library NAME, such as llama-server or libllama.so."""
    from mbq_gguf.llama_cpp.paths import find

    click.echo(os.fsencode(find(name)))  # the raw bytes, so that $(mbq-gguf path NAME) works in any locale


@main.command(short_help="Serve a file: a web page and an OpenAI-compatible API.")
@click.argument("file", type=FILE)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--mmproj", type=FILE, help="The vision file (default: mmproj-FILE beside FILE).")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="The port to listen on, at 127.0.0.1.")
def serve(file: Path, options: tuple[str, ...], mmproj: Path | None, port: int) -> None:
    """Serve the GGUF file FILE in the patched llama-server, with its web page and an OpenAI-compatible API, until Ctrl-C.

    OPTIONS after `--` are llama-server's own. By default only this machine can reach the server, with the key that is printed:

    \b
    -- --host 0.0.0.0                listen to the network
    -- --api-key KEY                 a key of your own; --api-key "" requires none
    -- --slots --metrics --props     enable lists of running requests, metrics, changing properties
    -- --cors-origins '*'            allow web pages of other sites (with the key)
    -- --video-ffmpeg-dir /usr/bin   decode WebP pictures and videos with ffmpeg

    Send pictures through the web page or as data: URLs of PNG, JPEG, GIF or BMP; http:// URLs are not downloaded. The server ignores
    LLAMA_* environment variables. From a shell, with the key:

    \b
    printf '{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,%s"}}]}]}' "$(base64 -w0 cat.png)" |
      curl http://127.0.0.1:8080/v1/chat/completions -H "Authorization: Bearer KEY" -H "Content-Type: application/json" -d @-
    """
    from mbq_gguf.llama_cpp.serve import serve as serve_file

    serve_file(file, mmproj, port, options, Console())


@main.command(short_help="Ask one question about pictures.")
@click.argument("file", type=FILE)
@click.argument("pictures", nargs=-1, type=FILE)
@click.argument("question")
@click.option("--mmproj", type=FILE, help="The vision file (default: mmproj-FILE beside FILE).")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Maximum length of the answer.")
@click.option(
    "--ctx", type=click.IntRange(min=64), default=8192, show_default=True, help="Context size in tokens: pictures, question and answer."
)
@click.option("--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True, help="Layers on the GPU, with a CUDA build.")
def ask(file: Path, pictures: tuple[Path, ...], question: str, **options: Any) -> None:
    """Ask the GGUF file FILE one QUESTION about PICTURES (in this order), and print the answer.

    \b
    mbq-gguf ask out.gguf receipt.png "What is the total?"
    mbq-gguf ask out.gguf before.jpg after.jpg "What has changed?"
    """
    from mbq_gguf.llama_cpp.serve import ask as ask_file

    answer = ask_file(file, pictures=pictures, question=question, console=Console(stderr=True), **options)
    click.echo(answer.text.strip())
    if answer.finish_reason == "length":
        Console(stderr=True).print(f"cut off after {answer.completion_tokens} tokens: --max-tokens allows more", highlight=False)


@main.command("demo-model", short_help="Write the reference VLM, the small model of the demo.")
@click.argument("directory", type=DIRECTORY)
def demo_model(directory: Path) -> None:
    """Write the reference VLM (135M parameters, sees drawn scenes) to DIRECTORY as a Hugging Face model."""
    from mbq_gguf.demo.assemble import assemble

    say(Console(), f"reference VLM written to {assemble(directory)}")


@main.command(short_help="Run everything once, on a small model that is included.")
@click.option("--directory", type=DIRECTORY, default=Path("build/demo"), show_default=True, help="Where the demo keeps its files.")
def demo(directory: Path) -> None:
    """Build llama.cpp, convert the reference VLM to 3 bits, and ask the patched llama-server three questions about pictures."""
    from mbq_gguf.demo.run import run_demo

    run_demo(Console(), directory)


@main.command(short_help="Show how a file was made, and its tensors.")
@click.argument("file", type=FILE)
def inspect(file: Path) -> None:
    """Show how FILE was made and a table of its tensors, types and bits per weight."""
    from mbq_gguf.export.inspect import inspect as inspect_file

    wide_console().print(inspect_file(file))


@main.command(short_help="Write llama.cpp's importance matrix, computed with pictures.")
@click.argument("model")
@click.argument("out", type=FILE)
@click.option("--revision", help="Branch, tag or commit of a MODEL on the hub (default: main).")
@click.option("--calib", type=click.Path(path_type=Path), help="A JSONL file or a folder of pictures (default: the included drawn scenes).")
@click.option("--samples", type=click.IntRange(min=1), default=settings.SAMPLES, show_default=True, help="Number of calibration samples.")
@click.option("--seed", type=int, default=settings.SEED, show_default=True, help="Random seed for drawing samples.")
@click.option("--device", default=settings.DEVICE, show_default=True, help="Device that computes: cpu, cuda, cuda:1.")
@click.option(settings.TRUST, "trust_remote_code", is_flag=True, default=False, help=settings.TRUST_HELP)
def imatrix(
    model: str, out: Path, revision: str | None, calib: Path | None, samples: int, seed: int, device: str, trust_remote_code: bool
) -> None:
    """Write llama.cpp's importance matrix of the Hugging Face VLM MODEL to OUT, computed on pictures and their questions.

    MODEL is a directory, or a name on the hub, as for `convert`.

    llama-imatrix uses text only; this matrix includes image tokens. It is for files that llama-quantize makes:

    \b
    mbq-gguf convert MODEL bf16.gguf --type BF16
    mbq-gguf imatrix MODEL imatrix.gguf
    $(mbq-gguf path llama-quantize) --imatrix imatrix.gguf bf16.gguf q4_k_m.gguf Q4_K_M

    `convert` does not need this file: it calibrates by itself, and loses far less.
    """
    console = Console()
    check_gguf_output(out)  # before downloading gigabytes
    model_dir = model_directory(model, revision, console, trust_remote_code)
    from mbq_gguf.imatrix import make_imatrix

    say(console, make_imatrix(model_dir, out, calib, samples, seed, device, console, trust_remote_code))


@main.command(short_help="List the supported model families.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """List the supported model families, what works with each, and why the rest does not."""
    import json

    from mbq_gguf.models import support

    if as_json:
        click.echo(json.dumps(support.as_json(), indent=2))
    else:
        wide_console().print(support.table(), highlight=False)


@main.command(short_help="Write or update the model card, README.md, beside a file.")
@click.argument("out", type=FILE)
def card(out: Path) -> None:
    """Write or update README.md beside the GGUF file OUT: a model card, with the figures of `eval --out` if its JSON is in that folder."""
    from mbq_gguf.export.gguf_header import read_header
    from mbq_gguf.model_card import write_card

    read_header(out)  # report a wrong OUT before a wrong README.md
    say(Console(), f"{write_card(out)} written")


main.add_command(convert)
main.add_command(eval_command)
