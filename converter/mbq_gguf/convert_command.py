"""``mbq-gguf convert``: its options under headings, with the defaults of :mod:`mbq_gguf.settings`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from mbq_gguf import launch, settings
from mbq_gguf.errors import UsageError
from mbq_gguf.export.atomic import check_gguf_output
from mbq_gguf.hub import model_directory
from mbq_gguf.llama_cpp.steps import say
from mbq_gguf.option_groups import ARGUMENTS, THREADS, Finite, GroupedCommand, option_group
from mbq_gguf.settings import QuantiseSettings

DIRECTORY = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)

everyday = option_group("Everyday")
calibration = option_group("Calibration")
rounding = option_group("Rounding")
research = option_group("Research (what each does to the figures: docs/results.md)")


@click.command(cls=GroupedCommand, short_help="Convert a Hugging Face VLM to quantised GGUF files.")
@click.argument("model")
@click.argument("out", type=FILE)
@everyday(
    "--type",
    "type_",
    default=QuantiseSettings.type_name,
    help="MBQ3S (small groups) or MBQ3 (the papers' grid), 3.25 to 3.5 bits per weight; a stock ggml type such as Q4_0 or Q3_K, for any "
    "llama.cpp; W4A8 or W8A8 (Q4_0 or Q8_0 with one scale per row); BF16 or F16.",
)
@everyday(
    "--calib",
    type=click.Path(path_type=Path),
    help="A JSONL file (or one JSON array) of pictures, questions and answers, in the format above, LLaVA's or OpenAI's; or a folder of "
    "pictures (default: drawn scenes).",
)
@everyday(
    "--dry-run", is_flag=True, help="Check everything that can be checked early, print the expected sizes, memory and time, write nothing."
)
@everyday("--card", is_flag=True, help="Also write a model card, README.md, beside OUT; `mbq-gguf card OUT` updates it after `eval`.")
@everyday("--revision", help="Branch, tag or commit of a MODEL on the hub (default: main).")
@everyday("--device", default=settings.DEVICE, help="Device that computes: cpu, cuda, cuda:1.")
@everyday("--threads", type=THREADS, help="CPU threads (default: all cores).")
@everyday(
    "--memory",
    type=Finite(min=0),
    help="GB of host memory to use before the samples' activations spill to disk, beside the finished layers (default: most of what is "
    "free).",
)
@everyday("--work-dir", type=DIRECTORY, help="Where finished layers are kept (default: beside OUT until OUT is complete).")
@everyday("--embedding-type", default=settings.EMBEDDING_TYPE, help="Type of the embeddings and the output head.")
@everyday(
    "--mmproj-type",
    default=settings.MMPROJ_TYPE,
    help="Type of the vision tower and projector: F16, BF16, F32, Q8_0, W8A8 or W4A8 (one scale per row, int8 products).",
)
@everyday(
    settings.LANGUAGE_ONLY,
    is_flag=True,
    default=False,
    help="Convert only the language model and calibrate on texts, if llama.cpp does not support the vision tower (see `mbq-gguf models`).",
)
@everyday(settings.TRUST, "trust_remote_code", is_flag=True, default=False, help=settings.TRUST_HELP)
@calibration("--samples", type=click.IntRange(min=1), default=settings.SAMPLES, help="Number of samples used from --calib.")
@calibration("--seed", type=int, default=settings.SEED, help="Random seed for drawing samples.")
@calibration(
    "--synthetic",
    type=click.IntRange(min=0),
    default=QuantiseSettings.synthetic,
    help="Also calibrate on this many texts that the model generates and half as many procedural pictures, to keep abilities that the "
    "samples do not exercise.",
)
@calibration(
    "--turns",
    type=click.Choice(["all", "last"]),
    default=settings.TURNS,
    help="Use all turns of each conversation, or only the last one, with the picture.",
)
@rounding(
    "--rounding",
    type=click.Choice(["nearest", "gptq"]),
    default=QuantiseSettings.rounding,
    help="Rounding method. The options below belong to gptq.",
)
@rounding("--clip/--no-clip", default=QuantiseSettings.clip, help="Search the range of each block (always done for stock types).")
@rounding(
    "--propagate-error/--no-propagate-error",
    former=["--distort/--no-distort"],
    default=QuantiseSettings.propagate_error,
    help="Calibrate each layer on the outputs of the quantised layers before it instead of the original ones (also for AWQ and MBQ).",
)
@rounding(
    "--error-correction",
    former=["--correction"],
    type=Finite(0, 1),
    default=QuantiseSettings.error_correction,
    help="With --propagate-error: the share of the earlier layers' error that a layer corrects.",
)
@rounding(
    "--refits",
    type=click.IntRange(min=0),
    default=QuantiseSettings.refits,
    help="How often scales are refitted to the codes, alternating with coordinate descent on the codes.",
)
@research(
    "--target-bpw",
    type=Finite(min=0, min_open=True),
    help="Instead of --type: choose a type for each tensor, with at most this many bits per weight over the decoder's matrices.",
)
@research(
    "--rotate",
    type=click.Choice(["none", "offline", "full"]),
    help="Spread outliers by rotations: offline is folded into the weights, full adds a transform that only the patched llama.cpp "
    "computes (default: full for W4A8 with GPTQ, otherwise none).",
)
@research(
    "--rotate-tower/--no-rotate-tower",
    default=None,
    help="Also rotate the vision tower, folded into its weights, so that any llama.cpp runs it (default: for --mmproj-type W4A8, if the "
    "tower allows it).",
)
@research(
    "--mmproj-activations",
    type=click.Choice(["dynamic", "static"]),
    help="For --mmproj-type W8A8 or W4A8: int8 activation scales computed for each patch at run time, or one fixed scale from "
    "calibration (default: static with --rounding gptq).",
)
@research(
    "--activations",
    type=click.Choice(["dynamic", "static"]),
    default=QuantiseSettings.activations,
    help="For W4A8 and W8A8: int8 activation scales computed for each token at run time, or fixed ones from calibration, for text and for "
    "pictures.",
)
@research(
    "--range-estimator",
    type=click.Choice(["minmax", "p99.9", "p99.99", "least-squares"]),
    default=QuantiseSettings.range_estimator,
    help="With --activations static: how ranges are computed from the measured magnitudes.",
)
@research(
    "--learn-scales",
    former=["--refine"],
    type=click.IntRange(min=0),
    default=QuantiseSettings.learn_scales,
    help="With --propagate-error: passes over the samples that train each layer's scales by gradient descent (4 passes: six times the "
    "time). Useful for MBQ3 and stock types; MBQ3S stores scales in steps of 3 %, too coarse to keep most of the gain.",
)
@research(
    "--token-weights",
    type=click.Choice(["uniform", "modality", "gradient", "token"]),
    default=QuantiseSettings.token_weights,
    help="How GPTQ weighs tokens: equally, by MBQ's ratio of vision to language, by the gradient of their class, or each by its own "
    "gradient.",
)
@research(
    "--prompt-weight",
    type=Finite(min=0),
    default=QuantiseSettings.prompt_weight,
    help="With --token-weights modality: the weight of a question token; an answer token has weight 1.",
)
@research(
    "--method",
    type=click.Choice(["rtn", "awq", "mbq", "smoothquant"]),
    default=QuantiseSettings.method,
    help="How channels are scaled before rounding: not at all (rtn), by AWQ or MBQ (both slow), or by SmoothQuant.",
)
@research(
    "--floor/--no-floor",
    default=QuantiseSettings.floor,
    help="For MBQ: raise each layer's ratio of vision to language to at least the median over layers.",
)
@research(
    "--answer-mask",
    type=click.Choice(["header", "predicting", "answer"]),
    default=QuantiseSettings.answer_mask,
    help="Which tokens count as the answer: the answer and its header (as MBQ's authors), the tokens that predict it, or the answer only.",
)
@research("--search-samples", type=click.IntRange(min=1), help="For AWQ and MBQ: compare factors on this many samples (default: all).")
@research(
    "--search-loss",
    type=click.Choice(["mae", "mse"]),
    help="For AWQ and MBQ: compare factors by absolute or squared errors (default: mae for MBQ, mse for AWQ).",
)
@research(
    "--grouped-o/--no-grouped-o",
    default=QuantiseSettings.grouped_o,
    help="For AWQ and MBQ: scale o_proj even if query heads share a value head (MBQ's authors do not).",
)
@click.pass_context
def convert(context: click.Context, /, model: str, type_: str, revision: str | None, dry_run: bool, card: bool, **options: Any) -> None:
    """Turn the Hugging Face VLM MODEL into the GGUF file OUT and the vision file mmproj-OUT beside it.

    \b
    mbq-gguf convert MODEL out.gguf                              3 bits, for the patched llama.cpp
    mbq-gguf convert MODEL out.gguf --type Q4_0                  a stock type, for any llama.cpp
    mbq-gguf convert MODEL out.gguf --calib my-pictures.jsonl    calibrated on what you will ask about

    MODEL is a directory, or a name on the Hugging Face Hub such as Qwen/Qwen2-VL-2B-Instruct, which is downloaded into huggingface_hub's
    cache without its code (HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE apply). If a directory of that name exists, it is used.

    Calibrates with pictures and answers: GPTQ rounds layer by layer on the type's own grid, using the outputs of the layers that are
    already quantised; MBQ (--method mbq, arXiv 2412.19509) weighs each modality by how much the answer depends on it. If a run is
    interrupted, the same command resumes after the last finished layer.

    \b
    The format of a line of --calib:
    {"image": "cat.png", "turns": [{"question": "What is it?", "answer": "A cat."}]}

    On several GPUs of one machine (docs/cards.md): `torchrun --nproc-per-node 4 -m mbq_gguf convert MODEL out.gguf --device cuda`.
    """
    if options["target_bpw"] and context.get_parameter_source("type_") is not ParameterSource.DEFAULT:
        raise UsageError("give --type or --target-bpw: a target size chooses the types itself")
    set_environment()
    if dry_run and not launch.first():
        return
    console = Console(quiet=not launch.first())
    check_gguf_output(options["out"])  # before downloading gigabytes
    if card:
        from mbq_gguf.model_card import check_card

        check_card(options["out"])
    options["device"] = launch.device(options["device"])
    from mbq_gguf.models.language_only import language_only_mode

    with language_only_mode(options["language_model_only"]):
        model_dir = model_directory(model, revision, console, options["trust_remote_code"])
    from mbq_gguf.convert import ConvertOptions
    from mbq_gguf.convert import convert as convert_model

    chosen = ConvertOptions(model_dir, type=type_, **options)
    if not launch.first():
        from mbq_gguf.convert import run_worker

        run_worker(chosen)
        return
    if dry_run:
        from mbq_gguf.dry_run import dry_run as estimate

        console.print(estimate(chosen, console).render())
        return
    console.print(convert_model(chosen, console).render())
    if card:
        from mbq_gguf.model_card import write_card

        command = shlex.join(["mbq-gguf", "convert", *context.meta[ARGUMENTS]])
        say(console, f"{write_card(chosen.out, command)} written")


def set_environment() -> None:
    """Set environment variables that torch reads when it is imported; the user's own settings take precedence."""
    # OpenMP threads that spin while waiting take cores from other processes: with another conversion running on the same two cores,
    # generating the texts took seven minutes instead of half a minute. llama.cpp's waits are short, so it may spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Avoids fragmentation of GPU memory: a Hessian of 18944 columns does not fit into the gaps that the decoder's many matrices leave.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    if launch.count() > 1:  # hide torch's warnings about processes killed in the middle of a call
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
