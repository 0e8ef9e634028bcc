"""Quantises the vision tower to types with one scale per row: optional rotation, then GPTQ block by block on calibration pictures.

A block's Hessians are measured in one run for all of its sites, with everything before it quantised. The linears after the blocks follow,
one group after the other. Feed-forward widths that are not a multiple of the block size are padded with zero channels. Static ranges of a
block's activations are measured with the block itself quantised too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mbq_gguf.calibration.dataset import FREE_QUESTION, Sample
from mbq_gguf.calibration.magnitudes import Estimator
from mbq_gguf.calibration.moments import Moments
from mbq_gguf.calibration.pictures import picture
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.stream import capture_encoded
from mbq_gguf.calibration.tower_ranges import ESTIMATOR, counting, tower_range_keys
from mbq_gguf.export.gguf_writer import FEED_FORWARD, VisionFile
from mbq_gguf.export.tower_file import padded_width
from mbq_gguf.formats.grid import grid_of
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.registry import quant_type_for
from mbq_gguf.models.layer import StopForward, run_until
from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.prompts import Encoded
from mbq_gguf.models.tower import Tower, joined, linear
from mbq_gguf.models.towers import find_tower
from mbq_gguf.rounding.nearest import round_nearest
from mbq_gguf.rounding.sequence import Refinement, refined
from mbq_gguf.settings import Activations
from mbq_gguf.transforms.tower import rotate_tower

SEED = 0
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class TowerResult(VisionFile):
    """The tensors and metadata of a changed tower, for the vision file."""

    quantised: dict[str, QuantisedTensor] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TowerSettings:
    """``type_name``: W8A8 or W4A8 (None: matrices keep their type). ``made``: the number of procedural pictures besides the samples'.
    ``damping``, ``refits``: as for GPTQ of the decoder. Static ``activations`` need ``type_name`` and samples; ``estimator`` is for their
    ranges."""

    type_name: str | None
    rotate: bool
    made: int = 0
    damping: float = 0.01
    refits: int = 2
    activations: Activations = "dynamic"
    estimator: Estimator = ESTIMATOR


@torch.no_grad()
def quantise_tower(
    loaded: LoadedModel,
    settings: TowerSettings,
    samples: Sequence[Sample],
    rotated: VisionFile | None = None,
    advance: Advance = lambda done, total: None,
) -> TowerResult:
    """Quantise and rotate the tower of ``loaded`` in place; returns its contents for the vision file.

    GPTQ uses the pictures of ``samples`` and procedural ones. Without samples, matrices are rounded to nearest and activations are dynamic.
    ``rotated`` has what the decoder's rotation has changed in the projector. ``advance`` is called with finished and total blocks. Raises
    UsageError if the tower cannot be rotated.
    """
    tower = find_tower(loaded)
    assert tower is not None, "preflight.check_tower comes first"
    rotated, rotate, type_name = rotated or VisionFile(), settings.rotate, settings.type_name
    result = TowerResult({}, dict(rotated.replaced), dict(rotated.metadata))
    _set_parameters(loaded.model, rotated.replaced)
    names = _names(tower)
    before = {name: parameter.detach().clone() for name, parameter in names.items()} if rotate else {}
    if rotate:
        rotate_tower(tower, SEED)
        result.replaced.update({name: value.detach().cpu() for name, value in names.items() if not torch.equal(value, before[name])})
    if type_name is not None:
        _pad(tower, result)
        _round(loaded, tower, settings, list(_encoded(loaded, samples, settings.made)), result, advance)
    result.metadata.update(tower_keys(settings, "gptq" if samples else "nearest"))
    return result


def tower_keys(settings: TowerSettings, rounding: str) -> dict[str, Any]:
    """The vision file's metadata that record how its tower was changed."""
    kind = {"mbq.tower.type": settings.type_name, "mbq.tower.rounding": rounding} if settings.type_name else {}
    return {**kind, "mbq.tower.rotated": settings.rotate}


def _names(tower: Tower) -> dict[str, nn.Parameter]:
    """The parameters of the tower and of the modules that read it, each once, by the end of its name in a checkpoint."""
    names: dict[str, nn.Parameter] = {}
    for place, name, _ in tower.exits():
        parts = [place.norm, *place.readers, *(reader for group in place.later for reader in group)]
        for part in filter(None, parts):
            full = joined(name, part)
            names |= {f"{full}.{end}": value for end, value in tower.holder.get_submodule(full).named_parameters()}
    seen = {id(value) for value in names.values()}
    return names | {name: value for name, value in tower.module.named_parameters() if id(value) not in seen}


def _set_parameters(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        for end, value in values.items():
            if name == end or name.endswith(f".{end}"):
                parameter.copy_(value)


def _pad(tower: Tower, result: TowerResult) -> None:
    """Pad feed-forwards to :func:`padded_width` with rows and columns of zeros; every activation function here maps 0 to 0."""
    wide = padded_width(tower)
    if not wide:
        return
    ups, down = tower.layout.sites[2].readers, tower.layout.sites[3].readers[0]
    for index, block in enumerate(tower.blocks):
        for name in (*ups, down):
            module = linear(block, name)
            more = wide - (module.in_features if name == down else module.out_features)
            module.weight = nn.Parameter(
                nn.functional.pad(module.weight, (0, more) if name == down else (0, 0, 0, more)), requires_grad=False
            )
            module.out_features, module.in_features = module.weight.shape
            if module.bias is not None and name != down:
                module.bias = nn.Parameter(nn.functional.pad(module.bias, (0, more)), requires_grad=False)
                result.replaced[f"{tower.block_name(index)}.{name}.bias"] = module.bias.detach().cpu()
    result.metadata[FEED_FORWARD] = wide


def _encoded(loaded: LoadedModel, samples: Sequence[Sample], made: int) -> Iterator[Encoded]:
    """Encode every picture of ``samples`` once, and ``made`` procedural ones."""
    draw = np.random.default_rng(SEED)
    pictures: list[Path | Image.Image] = list(dict.fromkeys(sample.image for sample in samples))
    pictures += [picture(draw) for _ in range(made if samples else 0)]
    for image in pictures:
        yield loaded.encode(image, [(FREE_QUESTION, "")])


@dataclass
class _BlockInput:
    """The arguments of a block for one picture."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _round(
    loaded: LoadedModel,
    tower: Tower,
    settings: TowerSettings,
    pictures: list[Encoded],
    result: TowerResult,
    advance: Advance,
) -> None:
    assert settings.type_name
    type_name, static = settings.type_name, settings.activations == "static" and bool(pictures)
    ranges: list[list[float]] = []
    refinement = Refinement(settings.damping, clip=True, error_correction=0.0, refits=settings.refits)
    blocks = tower.blocks
    groups = list(tower.exit_groups())
    entered = [_enter(loaded, blocks[0], encoded) for encoded in pictures]
    for index, block in enumerate(blocks):
        sites = [{name: linear(block, name) for name in site.readers} for site in tower.layout.sites]
        with _hessians([next(iter(site.values())) for site in sites]) as found, coarse_products(loaded.device):
            for state in entered:
                block(*state.args, **state.kwargs)
        for site in sites:
            here = {f"{tower.block_name(index)}.{name}.weight": module for name, module in site.items()}
            _round_site(here, found.get(next(iter(site.values()))), type_name, refinement, result)
        with counting([list(site.values()) for site in sites] if static else []) as inputs, coarse_products(loaded.device):
            for state in entered:
                _advance(block, state)
        ranges.append([site.range(settings.estimator) for site in inputs])
        advance(index + 1, len(blocks) + len(groups))
    if static:
        result.metadata.update(tower_range_keys(settings.estimator, ranges))
    for number, group in enumerate(groups):
        with _hessians(list(group.values())) as found, coarse_products(loaded.device):
            for encoded in pictures:
                capture_encoded(loaded, encoded)
        for name, module in group.items():
            _round_site({f"{name}.weight": module}, found.get(module), type_name, refinement, result)
        advance(len(blocks) + number + 1, len(blocks) + len(groups))


def _round_site(
    linears: dict[str, nn.Linear], hessian: torch.Tensor | None, type_name: str, refinement: Refinement, result: TowerResult
) -> None:
    """Quantise matrices that read one activation, in place, by GPTQ if there is a ``hessian`` and the type has a grid."""
    weights = [module.weight.detach().float() for module in linears.values()]
    kept = quant_type_for(type_name, weights[0].shape[1])
    grid = grid_of(kept)
    if hessian is None or grid is None:
        rounded = [round_nearest(weight, kept) for weight in weights]
    else:
        coded = refined(torch.cat(weights), Moments(hessian), grid, refinement)
        rounded = [part.rounded(grid) for part in coded.split([len(weight) for weight in weights])]
    for (name, module), part in zip(linears.items(), rounded, strict=True):
        module.weight.copy_(part.weight)
        result.quantised[name] = QuantisedTensor(kept.name, part.data, module.in_features)
        result.replaced.pop(name, None)


def _enter(loaded: LoadedModel, block: nn.Module, encoded: Encoded) -> _BlockInput:
    """The arguments of the first block when the model runs on ``encoded``; the forward pass stops there."""
    seen: list[_BlockInput] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_BlockInput(args, dict(kwargs)))
        raise StopForward

    run_until(block.register_forward_pre_hook(hook, with_kwargs=True), lambda: capture_encoded(loaded, encoded))
    return seen[0]


def _advance(block: nn.Module, state: _BlockInput) -> None:
    """Run the block and replace its input by its output."""
    out = block(*state.args, **state.kwargs)
    hidden = out[0] if isinstance(out, tuple) else out
    if state.args:
        state.args = (hidden, *state.args[1:])
    else:
        state.kwargs["hidden_state" if "hidden_state" in state.kwargs else "hidden_states"] = hidden  # Llama 4's blocks use the first name


@contextmanager
def _hessians(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Sum x^T x [columns, columns] over the inputs of each of ``modules`` within the block."""
    found: dict[nn.Module, torch.Tensor] = {}

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        found.setdefault(module, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.t(), x)

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
