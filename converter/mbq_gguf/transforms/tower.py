"""Function-preserving edits of a vision tower: gains folded into matrices, rotation of the residual stream, LayerNorm to RMSNorm.

LayerNorm without gain and bias commutes with every orthogonal R that preserves the vector of ones (R 1 = 1): h R has the mean of h, and the
remainder keeps its length. A rotated tower therefore runs on the same graph, including LayerNorm. RMSNorm commutes with any rotation. If
the mean is removed from everything that writes the stream (MQuant, arXiv 2502.00425; SliceGPT, arXiv 2401.15024), LayerNorm equals RMSNorm.

Vectors are rows: h becomes h R, as in :mod:`mbq_gguf.transforms.rotation`. A norm's gain moves into its readers, its bias into their
biases; if a reader has none, the norm keeps bias / gain, rotated.
"""

from __future__ import annotations

import torch
from torch import nn

from mbq_gguf.errors import UsageError
from mbq_gguf.models.tower import Tower, joined, linear

Writable = nn.Linear | nn.Conv2d | nn.Conv3d


def mean_keeping_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal R [n, n], float64, with R 1 = 1: any rotation of the complement of the vector of ones, which a reflection maps to
    an axis."""
    mirror = torch.full((n,), n**-0.5, dtype=torch.float64)
    mirror[0] -= 1.0
    reflection = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(mirror, mirror) / mirror.square().sum().clamp(min=1e-30)
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = random_orthogonal(n - 1, generator)
    rotation: torch.Tensor = reflection @ inner @ reflection
    return rotation


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix [n, n], float64, uniformly distributed (Stewart 1980)."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    rotation: torch.Tensor = q * r.diagonal().sign()
    return rotation


@torch.no_grad()
def rotate_tower(tower: Tower, seed: int) -> None:
    """Rotate the residual stream of ``tower`` and its attention's values, in place, in float64. Raises UsageError if it cannot be."""
    reason = tower.no_rotation()
    if reason:
        raise UsageError(f"the vision tower cannot be rotated, {reason}: give --no-rotate-tower")
    fold_gains(tower)
    generator = torch.Generator().manual_seed(seed)
    residual = mean_keeping_rotation(tower.width, generator)
    change_stream(tower, residual)
    for norm, readers in _norms_with_readers(tower):
        for reader in readers:
            _multiply(reader, residual)
        bias = getattr(norm, "bias", None)
        if bias is not None:  # some reader has no bias
            _set(bias, _by_tiles(bias.double(), residual))
    for place, name, _ in tower.exits():
        for end in place.readers if place.bare else ():
            _multiply(linear(tower.holder, joined(name, end)), residual)
    for block in tower.blocks:
        _rotate_values(tower, block, generator)


@torch.no_grad()
def change_stream(tower: Tower, matrix: torch.Tensor) -> None:
    """Let everything that writes the stream write h M for h, in place; ``matrix`` M is [width, width] float64."""
    for name in tower.layout.entries:
        found = _attribute(tower.module, name)
        if isinstance(found, nn.Conv2d | nn.Conv3d):
            _write(found, matrix)
        else:
            parameter = found.weight if isinstance(found, nn.Embedding) else found
            assert isinstance(parameter, torch.Tensor)
            _set(parameter, parameter.double() @ matrix.to(parameter.device))
    for block in tower.blocks:
        for name in tower.layout.writers:
            _write(linear(block, name), matrix)


def centre_tower(tower: Tower) -> None:
    """Remove the mean from everything that writes the stream, in place, so that RMSNorm equals LayerNorm; also folds gains.

    Raises UsageError if a norm spans several patches, since their common mean differs from the mean of each.
    """
    reason = tower.no_centring()
    if reason:
        raise UsageError(f"the vision tower's LayerNorm cannot become RMSNorm, {reason}: leave it as it is")
    fold_gains(tower)
    width = tower.width
    change_stream(tower, torch.eye(width, dtype=torch.float64) - torch.full((width, width), 1.0 / width, dtype=torch.float64))


@torch.no_grad()
def fold_gains(tower: Tower) -> None:
    """Fold gain and bias of every norm that reads the stream, and the scales of branches, into adjacent matrices, in place."""
    for norm, readers in _norms_with_readers(tower):
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, torch.Tensor)
        gain = weight.detach().double()
        shift = None if bias is None else bias.detach().double().clone()  # set to zero below
        if bias is not None and shift is not None and any(reader.bias is None for reader in readers):
            if bool((gain == 0).any()):
                raise UsageError("a norm of the vision tower has a gain of 0, so that its bias cannot be kept: give --no-rotate-tower")
            _set(bias, shift / gain)
            shift = None
        elif bias is not None:
            bias.zero_()
        for reader in readers:
            columns = _columns(reader)
            if shift is not None and reader.bias is not None:
                moved = columns.double() * shift.repeat(columns.shape[-1] // shift.numel())
                _set(reader.bias, reader.bias.double() + moved.flatten(1).sum(dim=1))
            columns.copy_(columns.double() * gain.repeat(columns.shape[-1] // gain.numel()))
        weight.fill_(1.0)
    for block in tower.blocks:
        for name, writer in tower.layout.scales:
            scale, module = getattr(block, name), linear(block, writer)
            assert isinstance(scale, torch.Tensor)
            _set(module.weight, module.weight.double() * scale.double()[:, None])
            if module.bias is not None:
                _set(module.bias, module.bias.double() * scale.double())
            scale.fill_(1.0)


def _norms_with_readers(tower: Tower) -> list[tuple[nn.Module, list[Writable]]]:
    """Every norm that reads the residual stream, with its readers."""
    found: list[tuple[nn.Module, list[Writable]]] = [
        (block.get_submodule(site.norm), [linear(block, name) for name in site.readers])
        for block in tower.blocks
        for site in tower.layout.sites
        if site.norm
    ]
    for place, name, _ in tower.exits():
        if place.norm:
            readers = [_writable(tower.holder.get_submodule(joined(name, reader))) for reader in place.readers]
            found.append((tower.holder.get_submodule(joined(name, place.norm)), readers))
    return found


def _writable(module: nn.Module) -> Writable:
    assert isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    return module


def _attribute(module: nn.Module, name: str) -> nn.Module | torch.Tensor:
    holder, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(holder), last)
    assert isinstance(found, nn.Module | torch.Tensor)
    return found


def _columns(module: Writable) -> torch.Tensor:
    """A view of the weight with its input channels last: [out, in], or [out, ..., in] for a convolution."""
    return module.weight.detach().movedim(1, -1)


def _multiply(module: Writable, matrix: torch.Tensor) -> None:
    """Make ``module`` read h M instead of h, for orthogonal M; every ``len(matrix)`` channels of its input are one stream."""
    columns = _columns(module)
    columns.copy_(_by_tiles(columns.double(), matrix))


def _by_tiles(values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = values.view(*values.shape[:-1], -1, len(matrix)) @ matrix.to(values.device)
    return product.flatten(-2)


def _write(module: Writable, matrix: torch.Tensor) -> None:
    """Make ``module`` write h M instead of h."""
    matrix = matrix.to(module.weight.device)
    _set(module.weight, torch.tensordot(matrix, module.weight.double(), dims=([0], [0])))
    if module.bias is not None:
        _set(module.bias, module.bias.double() @ matrix)


def _rotate_values(tower: Tower, block: nn.Module, generator: torch.Generator) -> None:
    """Rotate the values of every head; attention's output projection undoes it."""
    value, out = linear(block, tower.layout.values), linear(block, tower.layout.writers[0])
    size = head_size(block)
    rows = slice(value.out_features - out.in_features, None)  # if queries, keys and values are one linear, values come last
    rotation = random_orthogonal(size, generator).to(value.weight.device)
    weight = value.weight[rows].double().view(-1, size, value.in_features)
    _set(value.weight[rows], (rotation.t() @ weight).flatten(0, 1))
    if value.bias is not None:
        _set(value.bias[rows], (value.bias[rows].double().view(-1, size) @ rotation).flatten())
    _set(out.weight, _by_tiles(out.weight.double(), rotation))


def head_size(block: nn.Module) -> int:
    """The number of channels of an attention head of ``block``."""
    return next(size for module in block.modules() if isinstance(size := getattr(module, "head_dim", None), int))


def _set(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.detach().copy_(value)
