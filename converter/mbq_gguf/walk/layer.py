"""Steps for one layer: observe, equalise, check, round, learn, keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mbq_gguf.allocation.allocate import total_weight
from mbq_gguf.allocation.predict import Inputs, measured_costs
from mbq_gguf.calibration.calls import Entering
from mbq_gguf.calibration.experts import seeing_others, shares_of
from mbq_gguf.calibration.moments import Moments, Replay
from mbq_gguf.calibration.observe import TokenWeights, observe
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.ranges import count_magnitudes
from mbq_gguf.calibration.stream import advance
from mbq_gguf.calibration.streamed import Streamed
from mbq_gguf.calibration.token_weights import modality, uniform
from mbq_gguf.formats.quantised import QuantisedTensor
from mbq_gguf.formats.static_ranges import range_key
from mbq_gguf.memory import arrival, to_host
from mbq_gguf.models.layer import Layer
from mbq_gguf.models.layout import Site
from mbq_gguf.outcome import Outcome, apply_outcome
from mbq_gguf.parallel import broadcast_from_first
from mbq_gguf.rounding.inverse import check_factored, faults_later
from mbq_gguf.rounding.learned import learn
from mbq_gguf.rounding.sequence import Matrix, Refinement, placed, round_in_order
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.transforms.fold import repeats
from mbq_gguf.transforms.folded import folded_moments, folded_originals
from mbq_gguf.transforms.layer import Criterion, changed, fold_layer, other_parameters, search_layer
from mbq_gguf.transforms.smooth import smooth_layer
from mbq_gguf.walk.ahead import Original, helps, workers
from mbq_gguf.walk.state import LayerWork, Walk, made


def enter_layer(walk: Walk, index: int) -> LayerWork:
    """Set up layer ``index``."""
    layer, plan = walk.rotated_layer(index), walk.result.plan
    layout = layer.layout
    type_names = {
        name: plan.type_names[f"layers.{index}.{layout.linear_of(name)}.weight"] if plan else walk.settings.type_name
        for name in layout.readers
    }
    return LayerWork(walk, layer, walk.token_weights(index), type_names, _replay(walk, layer))


def pass_original(work: LayerWork) -> None:
    """Run the streams through the original layer, observe what the next steps need, and start the layer after it."""
    walk, index = work.walk, work.layer.index
    with walk.timed("observe"), coarse_products(work.layer.device):
        found = walk.ahead.take(index) or run_original(walk, work.layer, made(walk.streams))
    work.passed, work.observed, work.shares = found.passed, found.observed, found.shares
    if walk.settings.rounding == "gptq" and index + 1 < len(walk.loaded.decoder.layers) and helps(work.layer.device):
        walk.ahead.start(walk.rotated_layer(index + 1), lambda layer: run_original(walk, layer, found.passed))


def run_original(walk: Walk, layer: Layer, streams: Sequence[Streamed]) -> Original:
    """The results of the original ``layer`` for ``streams``, which are not changed."""
    passed, settings = [replace(stream) for stream in streams], walk.settings
    shares = shares_of(layer, passed) if settings.rounding == "gptq" else []
    weights = walk.token_weights(layer.index) if _of_originals(walk) else None
    with seeing_others(layer, shares if weights else []):
        observed = observe(layer, passed, hessian_weights=weights, keep_originals=_corrects(settings), workers=workers(layer.device))
    return Original(layer.index, passed, observed, shares)


def smooth(work: LayerWork) -> None:
    """Fold SmoothQuant's factors."""
    walk, layer = work.walk, work.layer
    if walk.settings.method != "smoothquant":
        return
    with walk.timed("smooth"):
        found = broadcast_from_first(lambda: smooth_layer(Entering(layer, made(walk.streams)), _foldable(walk, layer)))
    for site, factors in found.items():
        work.outcome.put("factors", site, factors)
    fold_layer(layer, work.factors)


def equalise(work: LayerWork) -> None:
    """Search channel factors and fold them."""
    walk, layer, settings = work.walk, work.layer, work.walk.settings
    if settings.method not in ("awq", "mbq"):
        return
    gptq = _refinement(settings) if settings.rounding == "gptq" else None
    with walk.timed("search"):
        original = Entering(layer, made(walk.streams))
        prefix = Entering(layer, walk.prefix) if settings.follows_prefix else None
        judge = Criterion(_search_weights(walk, layer.index), settings.power, settings.search_samples, gptq, made(work.observed).hessians)
        # in one process: each candidate depends on those before it
        choices = broadcast_from_first(lambda: search_layer(original, prefix, work.type_names, judge, _foldable(walk, layer)))
    for site, choice in choices.items():
        work.outcome.put("factors", site, choice.factors)
        work.outcome.put("exponent", site, choice.exponent)
    fold_layer(layer, work.factors)


def check_function(work: LayerWork) -> None:
    """Raise UserError if rotation and factors have changed what the layer computes."""
    if work.walk.check:
        work.walk.check.layer(work.layer)


def round_layer(work: LayerWork) -> None:
    """Round every matrix, site by site."""
    layer = work.layer
    with work.walk.timed("rounding"), work.walk.ahead.beside(), seeing_others(layer, work.shares), faults_later() as work.faults:
        if work.walk.result.plan:
            work.before = {name: layer.linear(name).weight.detach().clone() for name in layer.layout.readers}
        work.matrices = round_in_order(layer, work.type_names, lambda site: _moments(work, site), _refinement(work.walk.settings))


def learn_scales(work: LayerWork) -> None:
    """Replace parameters by learned ones where these are better."""
    walk, layer, matrices = work.walk, work.layer, made(work.matrices)
    if not walk.settings.learn_scales:
        return
    coded = {name: (matrix.grid, matrix.coded) for name, matrix in matrices.items() if matrix.grid and matrix.coded}
    targets = [stream.hidden for stream in made(work.passed)]
    with walk.timed("learn scales"), coarse_products(layer.device):
        found = broadcast_from_first(lambda: learn(layer, walk.prefix, targets, work.weights, coded, walk.settings.learn_scales))
    for name, better in found.items():
        grid = coded[name][0]
        matrices[name] = placed(Matrix(matrices[name].type_name, better.rounded(grid), grid, better), layer.linear(name).weight)
    work.replay = _replay(walk, layer)  # the old one kept results of the earlier weights


def keep_parameters(work: LayerWork) -> None:
    """Arrange that the quantised weights, by linear, and every other changed parameter are recorded when they have arrived on the host, by
    whoever saves the layer. A GPU continues with the next layer meanwhile.
    """
    layer, outcome, faults = work.layer, work.outcome, work.faults
    quantised = {
        name: (parts[0].type_name, [part.rounded.data for part in parts], parts[0].rounded.weight.shape[1])
        for name, parts in layer.layout.by_linear(made(work.matrices)).items()
    }
    others = {name: to_host(parameter) for name, parameter in other_parameters(layer).items()}
    stored, arrived = work.walk.loaded.decoder.layers[layer.index], arrival(layer.device)

    def enter() -> None:
        arrived()
        check_factored(faults)
        for name, (type_name, parts, columns) in quantised.items():
            data = np.concatenate(parts) if len(parts) > 1 else parts[0]
            outcome.put_quantised(f"{name}.weight", QuantisedTensor(type_name, data, columns))
        for name, value in changed(others, stored).items():
            outcome.put("replaced", name, value.clone())

    work.arriving = enter


def measure_ranges(work: LayerWork) -> None:
    """Measure the static ranges of the layer's activations in the rounded model."""
    walk, layer = work.walk, work.layer
    if walk.settings.activations != "static":
        return
    streams = [replace(stream) for stream in walk.prefix or made(walk.streams)]
    with walk.timed("ranges"), coarse_products(layer.device):
        counted = broadcast_from_first(lambda: count_magnitudes(layer, streams, made(walk.sinks)))
    for (site, kind), magnitudes in counted.items():
        work.outcome.put("metadata", range_key(site, kind), magnitudes.range(walk.settings.range_estimator))


def measure_losses(work: LayerWork) -> None:
    """Measure the cost of rounding in the terms by which types were chosen, if they were."""
    walk, layer, factors = work.walk, work.layer, work.factors
    if not walk.result.plan:
        return
    inputs = {}
    for site in layer.sites:
        hessian = folded_moments(layer, site, made(work.observed), factors).hessian
        inputs[site.name] = Inputs(hessian, total_weight(made(walk.streams), work.weights, site))
    fisher = {name: float(values[layer.index]) for name, values in made(walk.sensitivity).fisher.items()}
    costs = measured_costs(layer, work.before, inputs, fisher, factors)
    for name, parts in layer.layout.by_linear(costs).items():
        work.outcome.put("loss", f"{name}.weight", sum(parts))


def put_back(work: LayerWork, outcome: Outcome) -> None:
    """Restore the layer from the ``outcome`` of an earlier run, with the same checks.

    In the original layer experts see as many tokens as in that run: a product's last bits depend on its number of rows, and they decide
    some codes of the next layer."""
    walk, layer = work.walk, work.layer
    work.passed = [replace(stream) for stream in made(walk.streams)]
    with (
        walk.timed("observe"),
        coarse_products(layer.device),
        seeing_others(layer, shares_of(layer, work.passed) if _of_originals(walk) else []),
    ):
        advance(layer, work.passed)
    fold_layer(layer, outcome.tensors_of("factors"))
    check_function(work)
    apply_outcome(layer, outcome)


def leave_layer(work: LayerWork) -> None:
    """Move the walk past the finished layer."""
    with work.walk.timed("moments"), coarse_products(work.layer.device), work.walk.ahead.resting():
        work.replay.advance()
    work.walk.streams = made(work.passed)


def _replay(walk: Walk, layer: Layer) -> Replay:
    return Replay(layer, walk.prefix, workers(layer.device))


def _refinement(settings: QuantiseSettings) -> Refinement:
    share = settings.error_correction if settings.propagate_error else 0.0
    return Refinement(settings.damping, settings.clip, share, settings.refits)


def _corrects(settings: QuantiseSettings) -> bool:
    """Whether rounding corrects errors of the preceding layers, and so needs the original's activations."""
    return settings.rounding == "gptq" and _refinement(settings).error_correction > 0


def _of_originals(walk: Walk) -> bool:
    """Whether Hessians of the original model's inputs are needed: to round by, or since types were chosen by them."""
    return walk.settings.sums_originals or walk.result.plan is not None


def _moments(work: LayerWork, site: Site) -> Moments | None:
    """The moments by which GPTQ rounds ``site``; None for nearest rounding."""
    settings, layer, observed = work.walk.settings, work.layer, made(work.observed)
    if settings.rounding == "nearest":
        return None
    if not settings.follows_prefix:
        return folded_moments(layer, site, observed, work.factors)
    originals = folded_originals(layer, site, observed, work.factors) if _corrects(settings) and site.expert is None else None
    with work.walk.timed("moments"), coarse_products(work.layer.device), work.walk.ahead.resting():
        found = work.replay.moments(site, work.weights, originals)
    observed.originals.pop(site.name, None)  # a site is requested once; this frees memory on the GPU
    return found


def _search_weights(walk: Walk, index: int) -> TokenWeights:
    """The weight of each token when candidates for layer ``index`` are compared."""
    if walk.settings.method == "awq":
        return uniform
    ratios = walk.result.ratios
    if walk.settings.power == 2:  # squared errors: means over the tokens of each modality; absolute errors are summed
        asked = [stream for stream in made(walk.streams) if stream.labels.any()][: walk.settings.search_samples]
        answer, vision = (sum(int(getattr(stream, name).sum()) for stream in asked) for name in ("answer", "vision"))
        share = answer / max(1, vision)
        ratios = {branch: [share * ratio for ratio in of_layers] for branch, of_layers in ratios.items()}
    return modality(ratios, index)


def _foldable(walk: Walk, layer: Layer) -> tuple[Site, ...]:
    """Sites that accept channel factors: not down_proj's if a Hadamard transform is between it and up_proj, nor o_proj's with grouped
    queries if the settings exclude it.
    """
    left = {"down"} if walk.rotation and walk.rotation.block else set()
    if not walk.settings.grouped_o:
        left |= {site.name for site in layer.sites if repeats(layer, site) > 1}
    return tuple(site for site in layer.sites if site.name not in left)
