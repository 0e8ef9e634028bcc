"""What can be refused before a weight is read or anything is written: each check where it is cheap, and all of them before the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mbq_gguf.allocation.plan import check_target
from mbq_gguf.allocation.predict import candidates
from mbq_gguf.calibration.dataset import Drawn, draw_samples, fingerprint
from mbq_gguf.errors import UsageError, said
from mbq_gguf.export.atomic import target
from mbq_gguf.export.checkpoint import names_of, shapes
from mbq_gguf.export.gguf_writer import MMPROJ_TYPES, SPARE_BYTES, mmproj_base
from mbq_gguf.export.rehearsal import rehearse, rehearse_quantised, rehearse_tower
from mbq_gguf.export.space import Need, check_room, predict, taken
from mbq_gguf.export.tower_file import tower_file
from mbq_gguf.formats.registry import quant_type
from mbq_gguf.formats.row_scale import ROW_SCALES, stored_as
from mbq_gguf.models.checks import weight_files
from mbq_gguf.models.load import check_source, outline
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.tower import Tower
from mbq_gguf.models.towers import find_tower
from mbq_gguf.quantise import check_activations, check_settings
from mbq_gguf.settings import ALONE
from mbq_gguf.workdir import check_workdir

if TYPE_CHECKING:
    from mbq_gguf.convert import ConvertOptions


@dataclass(frozen=True)
class Ahead:
    """What a look ahead has found: the options with the rotation that suits type and model, the model without its weights, and what it
    will be calibrated on."""

    options: ConvertOptions
    model: LoadedModel
    drawn: Drawn


def check_inputs(options: ConvertOptions) -> list[Path]:
    """Everything that can be refused before any work; returns the checkpoint's weight files."""
    quant_type(options.type)
    check_embedding_type(options.embedding_type)
    check_activations(options.settings)
    if options.unquantised and (options.method != "rtn" or options.rotate not in (None, "none")):
        raise UsageError(
            f"--type {options.type} is the checkpoint as it is: leave out --method and --rotate, or choose a type that is rounded to"
        )
    if options.mmproj_type not in MMPROJ_TYPES:
        raise UsageError(f"there is no mmproj type {options.mmproj_type}: choose one of {', '.join(MMPROJ_TYPES)}")
    if options.language_model_only and (options.calib or options.changes_tower or options.mmproj_activations):
        raise UsageError(
            f"{ALONE} takes no pictures and writes no tower: leave out --calib, --mmproj-type, --mmproj-activations and --rotate-tower"
        )
    if options.mmproj_activations and not options.tower_type:
        raise UsageError("--mmproj-activations is for a tower of int8 products: give --mmproj-type W8A8 or W4A8 with it, or leave it out")
    if options.mmproj_activations == "static" and options.rounding != "gptq":
        raise UsageError("a tower's static ranges are measured while GPTQ rounds it: give no --rounding nearest")
    check_device(options.device)
    if options.samples < 1:
        raise UsageError("calibration needs at least one sample: give --samples 1 or more")
    check_source(options.model_dir)
    files = weight_files(options.model_dir)
    check_room(needed(options, files))
    rehearse(options.model_dir, files, None if options.language_model_only else mmproj_base(options.mmproj_type))
    return files


def needed(options: ConvertOptions, files: Sequence[Path]) -> list[Need]:
    """The bytes that the two files and the finished layers will take, and where; layers that an earlier run finished are there already."""
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
    """Raise UsageError for a type that embeddings are not stored in."""
    found = quant_type(name).name
    if found in ROW_SCALES:
        raise UsageError(
            f"embeddings and output head have no scale per row: give --embedding-type {stored_as(found)} in the place of {found}"
        )


def check_device(name: str) -> None:
    """Raise UsageError where torch cannot compute on the device called ``name``."""
    try:
        torch.zeros(1, device=name).item()  # "meta" makes tensors that hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"torch cannot compute on {name} ({said(error)}): give --device cpu, or install a torch for your card") from error


def check_tower(options: ConvertOptions, model: LoadedModel) -> Tower:
    """The tower of ``model``, of which an outline will do; UsageError where its family is not known or lets no rotation pass, UserError
    where llama.cpp's conversion does not take its matrices."""
    tower = find_tower(model)
    if tower is None:
        raise UsageError(f"the vision tower of {model.architecture} is not known here: give --mmproj-type F16 and no --rotate-tower")
    reason = tower.no_rotation()
    if options.turns_tower(tower) and reason:
        raise UsageError(f"the vision tower of {model.architecture} cannot be rotated, {reason}: give --no-rotate-tower")
    if options.tower_type:
        rehearse_tower(options.model_dir, tower_file(tower, "F16"))
    return tower


def look_ahead(options: ConvertOptions, say: Callable[[str], None]) -> Ahead:
    """Everything about a quantisation that can be refused without the weights, which takes seconds and not hours; after
    :func:`check_inputs`. ``say`` is told what is left out of the calibration set."""
    model = outline(options.model_dir)
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
        say("the language model alone is calibrated on texts that it writes itself: it sees no token of a picture")
    elif options.calibrates:
        if options.calib is None:
            say("calibrating with the drawn scenes that ship with mbq-gguf: give --calib with pictures like those you will ask about")
        drawn = draw_samples(options.calib, model.prompts, options.samples, options.seed, options.turns, say)
    if options.work_dir is not None and not drawn.pictures:
        check_workdir(options.work_dir, options.fingerprints | {"data": fingerprint(drawn.samples) if drawn else ""})
    return Ahead(options, model, drawn)
