"""Checks that run before any weight is read or anything is written, so that a conversion fails early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mbq_gguf.allocation.plan import check_target
from mbq_gguf.allocation.predict import candidates
from mbq_gguf.calibration.dataset import Drawn, draw_samples, fingerprint
from mbq_gguf.errors import UsageError, describe
from mbq_gguf.export.atomic import target
from mbq_gguf.export.checkpoint import names_of, shapes
from mbq_gguf.export.gguf_writer import MMPROJ_TYPES, SPARE_BYTES, mmproj_base
from mbq_gguf.export.rehearsal import rehearse, rehearse_quantised, rehearse_tower
from mbq_gguf.export.space import Need, check_room, predict, taken
from mbq_gguf.export.tower_file import tower_file
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.formats.row_scale import ROW_SCALES, stored_as
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.load import check_source, load_meta
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.tower import Tower
from mbq_gguf.models.towers import find_tower
from mbq_gguf.quantise import check_activations, check_settings
from mbq_gguf.settings import LANGUAGE_ONLY
from mbq_gguf.workdir import check_workdir

if TYPE_CHECKING:
    from mbq_gguf.convert import ConvertOptions


@dataclass(frozen=True)
class Preflight:
    """The result of the checks: options with the rotation that suits type and model, the model without its weights, and its calibration
    data."""

    options: ConvertOptions
    model: LoadedModel
    drawn: Drawn


def check_inputs(options: ConvertOptions) -> list[Path]:
    """Check options, model directory and disk space; returns the checkpoint's weight files."""
    quant_type(options.type)
    check_embedding_type(options.embedding_type)
    check_activations(options.settings)
    if options.unquantised and (options.method != "rtn" or options.rotate not in (None, "none")):
        raise UsageError(
            f"--type {options.type} keeps the checkpoint as it is: leave out --method and --rotate, or choose a quantised type"
        )
    if options.mmproj_type not in MMPROJ_TYPES:
        raise UsageError(f"there is no mmproj type {options.mmproj_type}: choose one of {', '.join(MMPROJ_TYPES)}")
    if options.language_model_only and (options.calib or options.changes_tower or options.mmproj_activations):
        raise UsageError(
            f"{LANGUAGE_ONLY} takes no pictures and writes no tower: "
            "leave out --calib, --mmproj-type, --mmproj-activations and --rotate-tower"
        )
    if options.mmproj_activations and not options.tower_type:
        raise UsageError("--mmproj-activations needs a tower with int8 products: also give --mmproj-type W8A8 or W4A8, or leave it out")
    if options.mmproj_activations == "static" and options.rounding != "gptq":
        raise UsageError("a tower's static ranges are measured while GPTQ rounds it: leave out --rounding nearest")
    check_device(options.device)
    if options.samples < 1:
        raise UsageError("calibration needs at least one sample: give --samples 1 or more")
    check_source(options.model_dir)
    files = weight_files(options.model_dir)
    check_room(space_needs(options, files))
    rehearse(options.model_dir, files, None if options.language_model_only else mmproj_base(options.mmproj_type))
    return files


def space_needs(options: ConvertOptions, files: Sequence[Path]) -> list[Need]:
    """The disk space that the two files and the finished layers need, less the layers of an earlier run."""
    layer_bits = options.target_bpw or quant_type(options.type).bits_per_weight
    embedding_bits = quant_type(options.type if options.unquantised else options.embedding_type).bits_per_weight
    named = dict(zip(names_of(files), shapes(files), strict=True))
    sizes = predict(named, layer_bits, embedding_bits, quant_type(options.mmproj_type).bits_per_weight)
    folder = target(options.out).parent
    needs = [Need(folder, options.out.name, sizes.text), Need(folder, "headers and vocabulary", SPARE_BYTES)]
    if not options.language_model_only:
        needs.append(Need(target(options.mmproj).parent, options.mmproj.name, sizes.mmproj))
    if not options.unquantised:
        work = options.work_dir or options.work_root
        needs.append(Need(work.absolute(), "finished layers", max(sizes.layers - taken(work), 0)))
    return needs


def check_embedding_type(name: str) -> None:
    """Raise UsageError for a type that embeddings cannot have."""
    found = quant_type(name).name
    if found in ROW_SCALES:
        raise UsageError(
            f"embeddings and output head have no scale per row: give --embedding-type {stored_as(found)} in the place of {found}"
        )


def check_device(name: str) -> None:
    """Raise UsageError if torch cannot compute on device ``name``."""
    try:
        torch.zeros(1, device=name).item()  # item() fails on "meta", whose tensors have no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"torch cannot compute on {name} ({describe(error)}): give --device cpu, or install a torch build for your GPU"
        ) from error


def check_tower(options: ConvertOptions, model: LoadedModel) -> Tower:
    """The vision tower of ``model``, which may be without weights.

    Raises UsageError if its family is unknown or does not allow the rotation, UserError if llama.cpp's conversion rejects its matrices."""
    tower = find_tower(model)
    if tower is None:
        raise UsageError(f"the vision tower of {model.architecture} is not supported: give --mmproj-type F16 and leave out --rotate-tower")
    reason = tower.no_rotation()
    if options.rotates_tower(tower) and reason:
        raise UsageError(f"the vision tower of {model.architecture} cannot be rotated, {reason}: give --no-rotate-tower")
    if options.tower_type:
        rehearse_tower(options.model_dir, tower_file(tower, "F16"))
    return tower


def run_preflight(options: ConvertOptions, say: Callable[[str], None]) -> Preflight:
    """Check everything about a quantisation that does not need the weights, in seconds. Call after :func:`check_inputs`.

    ``say`` gets notes, such as what is left out of the calibration set."""
    model = load_meta(options.model_dir)
    options = options.with_rotation(model)
    check_settings(model, range(options.samples), options.settings)
    found = {f"{name}.weight": (linear.out_features, linear.in_features) for name, linear in model.decoder.linears()}
    if options.target_bpw:
        smallest = sum(rows * min(kind.row_bytes(columns) for kind in candidates(columns)) for rows, columns in found.values())
        check_target(smallest, sum(rows * columns for rows, columns in found.values()), options.target_bpw)
    rehearse_quantised(options.model_dir, found)
    if options.changes_tower:
        check_tower(options, model)
    if options.work_dir is not None:
        check_workdir(options.work_dir, options.fingerprints)
    drawn = Drawn()
    if options.language_model_only:
        say("the language model is calibrated only on texts that it generates: it sees no picture tokens")
    elif options.calibrates:
        if options.calib is None:
            say("calibrating with the drawn scenes that come with mbq-gguf: give --calib with pictures like those you will ask about")
        drawn = draw_samples(options.calib, model.prompts, options.samples, options.seed, options.turns, say)
    if options.work_dir is not None and not drawn.pictures:
        check_workdir(options.work_dir, options.fingerprints | {"data": fingerprint(drawn.samples) if drawn else ""})
    return Preflight(options, model, drawn)
