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


@click.command(cls=GroupedCommand, short_help="A Hugging Face VLM to GGUF files: calibrate, round, write.")
@click.argument("model")
@click.argument("out", type=FILE)
@everyday(
    "--type",
    "type_",
    default=QuantiseSettings.type_name,
    help="MBQ3S (small groups) or MBQ3 (the papers' grid), 3.25 to 3.5 bits; a stock ggml type such as Q4_0 or Q3_K, for any llama.cpp; "
    "W4A8 or W8A8 (Q4_0 or Q8_0 with one scale a row); BF16 or F16.",
)
@everyday(
    "--calib",
    type=click.Path(path_type=Path),
    help="A JSONL (or one JSON array) of pictures, questions and answers (ours, above, LLaVA's or OpenAI's shape), or a folder of pictures "
    "(default: drawn scenes).",
)
@everyday(
    "--dry-run", is_flag=True, help="Check everything that can be checked early, print sizes, memory and time to expect, write nothing."
)
@everyday("--card", is_flag=True, help="Also write README.md beside OUT, a model card; `mbq-gguf card OUT` renews it after `eval`.")
@everyday("--revision", help="Of a MODEL on a hub: a branch, a tag or a commit (default: main).")
@everyday("--device", default=settings.DEVICE, help="Where layers are computed: cpu, cuda, cuda:1.")
@everyday("--threads", type=THREADS, help="CPU threads (default: all cores).")
@everyday(
    "--memory",
    type=Finite(min=0),
    help="GB of the host's memory to hold before samples' activations go to disk, beside finished layers (default: most of what is free).",
)
@everyday("--work-dir", type=DIRECTORY, help="Where finished layers are kept (default: beside OUT until it is whole).")
@everyday("--embedding-type", default=settings.EMBEDDING_TYPE, help="The type of embeddings and output head.")
@everyday(
    "--mmproj-type",
    default=settings.MMPROJ_TYPE,
    help="The type of vision tower and projector: F16, BF16, F32, Q8_0, or W8A8 or W4A8 (one scale a row, int8 products).",
)
@everyday(
    settings.ALONE,
    is_flag=True,
    default=False,
    help="Of a model whose vision tower llama.cpp does not know (`mbq-gguf models`): no vision file, calibrated on texts alone.",
)
@everyday(settings.TRUST, "trust_remote_code", is_flag=True, default=False, help=settings.TRUST_HELP)
@calibration("--samples", type=click.IntRange(min=1), default=settings.SAMPLES, help="How many samples of --calib are used.")
@calibration("--seed", type=int, default=settings.SEED, help="Which samples are drawn.")
@calibration(
    "--synthetic",
    type=click.IntRange(min=0),
    default=QuantiseSettings.synthetic,
    help="Calibrate also on so many texts that the model writes itself and half as many procedural pictures: they keep what samples miss.",
)
@calibration(
    "--turns",
    type=click.Choice(["all", "last"]),
    default=settings.TURNS,
    help="Of each conversation: all turns, or the last one alone with the picture.",
)
@rounding(
    "--rounding",
    type=click.Choice(["nearest", "gptq"]),
    default=QuantiseSettings.rounding,
    help="How weights become codes. The options below are GPTQ's.",
)
@rounding("--clip/--no-clip", default=QuantiseSettings.clip, help="Search the range of each block (stock types always).")
@rounding(
    "--propagate-error/--no-propagate-error",
    former=["--distort/--no-distort"],
    default=QuantiseSettings.propagate_error,
    help="Calibrate each layer on the inputs that the rounded layers before it give, not on the original's (also for AWQ and MBQ).",
)
@rounding(
    "--error-correction",
    former=["--correction"],
    type=Finite(0, 1),
    default=QuantiseSettings.error_correction,
    help="With --propagate-error: the share of earlier layers' error that a layer makes good.",
)
@rounding(
    "--refits",
    type=click.IntRange(min=0),
    default=QuantiseSettings.refits,
    help="How often scales are fitted again to the codes; in between, codes are improved by coordinate descent.",
)
@research(
    "--target-bpw",
    type=Finite(min=0, min_open=True),
    help="Instead of --type: a type for each tensor, at most this many bits a weight of the decoder's matrices in all.",
)
@research(
    "--rotate",
    type=click.Choice(["none", "offline", "full"]),
    help="Spread outliers by rotations: offline folds into weights, full adds a transform that the patched llama.cpp computes "
    "(default: full for W4A8 with GPTQ, else none).",
)
@research(
    "--rotate-tower/--no-rotate-tower",
    default=None,
    help="Rotate the vision tower too, folded into its weights: any llama.cpp runs it (default: for --mmproj-type W4A8, where it can be).",
)
@research(
    "--mmproj-activations",
    type=click.Choice(["dynamic", "static"]),
    help="--mmproj-type W8A8, W4A8: int8 scales of activations found for each patch, or measured beforehand, one for all "
    "(default: static where GPTQ rounds).",
)
@research(
    "--activations",
    type=click.Choice(["dynamic", "static"]),
    default=QuantiseSettings.activations,
    help="W4A8, W8A8: int8 scales of activations found for each token as it comes, or measured beforehand for text and for pictures.",
)
@research(
    "--range-estimator",
    type=click.Choice(["minmax", "p99.9", "p99.99", "least-squares"]),
    default=QuantiseSettings.range_estimator,
    help="With --activations static: how a range follows from what is measured.",
)
@research(
    "--learn-scales",
    former=["--refine"],
    type=click.IntRange(min=0),
    default=QuantiseSettings.learn_scales,
    help="With --propagate-error: passes over the samples in which each layer's scales are learned together by gradients (4: six times "
    "the time). For MBQ3 and stock types: MBQ3S stores scales in steps of 3 %, which keep little of it.",
)
@research(
    "--token-weights",
    type=click.Choice(["uniform", "modality", "gradient", "token"]),
    default=QuantiseSettings.token_weights,
    help="How GPTQ weighs tokens: all alike, by MBQ's ratio of vision to language, by the gradient of their class, or each by its own.",
)
@research(
    "--prompt-weight",
    type=Finite(min=0),
    default=QuantiseSettings.prompt_weight,
    help="With --token-weights modality: the weight of a token of the question; a token of the answer has weight 1.",
)
@research(
    "--method",
    type=click.Choice(["rtn", "awq", "mbq", "smoothquant"]),
    default=QuantiseSettings.method,
    help="How channels are scaled before rounding: not at all, by AWQ, by MBQ (these two take long), or by SmoothQuant.",
)
@research(
    "--floor/--no-floor",
    default=QuantiseSettings.floor,
    help="MBQ: raise each layer's ratio of vision to language to the median over layers.",
)
@research(
    "--answer-mask",
    type=click.Choice(["header", "predicting", "answer"]),
    default=QuantiseSettings.answer_mask,
    help="Which tokens stand for the answer: with the header that opens it (MBQ's authors), those that predict it, or the answer alone.",
)
@research("--search-samples", type=click.IntRange(min=1), help="AWQ, MBQ: compare factors on so many samples (default: all).")
@research(
    "--search-loss",
    type=click.Choice(["mae", "mse"]),
    help="AWQ, MBQ: compare factors by absolute or squared errors (default: mae for MBQ, mse for AWQ).",
)
@research(
    "--grouped-o/--no-grouped-o",
    default=QuantiseSettings.grouped_o,
    help="AWQ, MBQ: factors for o_proj also where query heads share a value head (MBQ's authors have none there).",
)
@click.pass_context
def convert(context: click.Context, /, model: str, type_: str, revision: str | None, dry_run: bool, card: bool, **options: Any) -> None:
    """Turn the Hugging Face VLM MODEL into the GGUF file OUT and the vision file mmproj-OUT beside it.

    \b
    mbq-gguf convert MODEL out.gguf                              3 bits, for the patched llama.cpp
    mbq-gguf convert MODEL out.gguf --type Q4_0                  a stock type, for any llama.cpp
    mbq-gguf convert MODEL out.gguf --calib my-pictures.jsonl    calibrated on what you will ask about

    MODEL is a directory, or a name on the hub such as Qwen/Qwen2-VL-2B-Instruct, which is fetched into huggingface_hub's cache
    (HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold; no code is fetched). A directory of that name comes first.

    Calibrates with pictures and answers: GPTQ rounds on the type's own grid, layer by layer, from what the rounded layers before give;
    MBQ (--method mbq, arXiv 2412.19509) weighs each modality by how much the answer depends on it. A run that is stopped goes on after its
    last finished layer when the same command is given again.

    \b
    A line of --calib:
    {"image": "cat.png", "turns": [{"question": "What is it?", "answer": "A cat."}]}

    Several cards of one machine (docs/cards.md): `torchrun --nproc-per-node 4 -m mbq_gguf convert MODEL out.gguf --device cuda`.
    """
    if options["target_bpw"] and context.get_parameter_source("type_") is not ParameterSource.DEFAULT:
        raise UsageError("give --type or --target-bpw: a target size chooses the types itself")
    set_environment()
    if dry_run and not launch.first():
        return
    console = Console(quiet=not launch.first())
    check_gguf_output(options["out"])  # before gigabytes are fetched
    if card:
        from mbq_gguf.card import check_card

        check_card(options["out"])
    options["device"] = launch.device(options["device"])
    from mbq_gguf.models.alone import language_model_alone

    with language_model_alone(options["language_model_only"]):
        model_dir = model_directory(model, revision, console, options["trust_remote_code"])
    from mbq_gguf.convert import ConvertOptions
    from mbq_gguf.convert import convert as convert_model

    chosen = ConvertOptions(model_dir, type=type_, **options)
    if not launch.first():
        from mbq_gguf.convert import assist

        assist(chosen)
        return
    if dry_run:
        from mbq_gguf.dry_run import dry_run as rehearsed

        console.print(rehearsed(chosen, console).render())
        return
    console.print(convert_model(chosen, console).render())
    if card:
        from mbq_gguf.card import write_card

        command = shlex.join(["mbq-gguf", "convert", *context.meta[ARGUMENTS]])
        say(console, f"{write_card(chosen.out, command)} written")


def set_environment() -> None:
    """What torch reads from the environment when it is loaded; what the user has set stays."""
    # OpenMP threads that spin while they wait take the cores from whatever else runs: beside another conversion on two cores the texts
    # took seven minutes instead of half a minute. llama.cpp, whose waits are short, is left to spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A card's memory in pieces that join: Hessians of 18944 columns do not fit where the decoder's many matrices were.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    if launch.count() > 1:  # torch warns of processes that were killed in the middle of a call
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
