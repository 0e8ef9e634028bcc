"""Steps before the first layer (samples, sensitivities, rotation, allocation) and after the last one."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from mbq_gguf.allocation.allocate import allocate
from mbq_gguf.allocation.plan import Plan
from mbq_gguf.calibration.generate import writing_bits
from mbq_gguf.calibration.narrow import NARROW
from mbq_gguf.calibration.precision import coarse_products
from mbq_gguf.calibration.ranges import static_keys
from mbq_gguf.calibration.sensitivity import Sensitivity, measure
from mbq_gguf.calibration.sinks import Sinks, find_sinks
from mbq_gguf.calibration.stream import capture
from mbq_gguf.calibration.synthetic import synthetic_streams, written
from mbq_gguf.parallel import broadcast_from_first
from mbq_gguf.transforms.preserved import FunctionCheck
from mbq_gguf.transforms.rotation import draw, file_keys, rotated_embeddings, rotated_projector
from mbq_gguf.walk.ahead import workers
from mbq_gguf.walk.state import Walk, made

ROTATION_SEED = 0


def capture_samples(walk: Walk) -> None:
    """Run the samples up to the first layer."""
    walk.captured = []
    with walk.timed("capture"):
        for stream in capture(walk.loaded, walk.samples, walk.settings.answer_mask, workers(walk.loaded.device)):
            walk.captured.append(stream)
            walk.progress("capture", len(walk.captured), len(walk.samples))


def measure_sensitivity(walk: Walk) -> None:
    """Measure how much the answers depend on each linear, if a setting needs it; samples without an answer do not take part."""
    settings = walk.settings
    if settings.method != "mbq" and settings.token_weights == "uniform" and not settings.target_bpw:
        return
    fisher = settings.token_weights == "token" or settings.target_bpw is not None
    answered = [stream for stream in made(walk.captured) if stream.labels.any()]

    def found() -> tuple[dict[str, torch.Tensor], None]:
        with walk.timed("sensitivity"), coarse_products(walk.loaded.device):
            return measure(walk.loaded, answered, walk.counted("sensitivity"), fisher=fisher).tensors(), None

    walk.sensitivity = Sensitivity.restored(walk.work.cached("sensitivity", found)[0])
    for stream, salience in zip(answered, walk.sensitivity.salience, strict=False):
        stream.salience = salience
    if settings.method == "mbq":
        for branch, ratios in walk.sensitivity.ratios(settings.floor).items():
            walk.result.put("ratio", branch, ratios)


def add_synthetic(walk: Walk) -> None:
    """Add texts that the model generates, and procedural pictures; they have no answers."""
    count, captured = walk.settings.synthetic, made(walk.captured)
    if not count or (walk.settings.pictures and not walk.samples):
        return
    pictures = count // 2 if walk.settings.pictures else 0

    def texts() -> tuple[dict[str, torch.Tensor], None]:
        with walk.timed("texts"), coarse_products(walk.loaded.device):
            # in one process: a step takes as long for some texts as for all
            return {"ids": broadcast_from_first(lambda: written(walk.loaded, count, walk.counted(_writing_stage(walk))))}, None

    ids = walk.work.cached("texts", texts)[0]["ids"]
    with walk.timed("capture"):
        for number, stream in enumerate(synthetic_streams(walk.loaded, ids, walk.samples, pictures, workers(walk.loaded.device))):
            captured.append(stream)
            walk.progress("synthetic", number + 1, count + pictures)


def _writing_stage(walk: Walk) -> str:
    bits = writing_bits(walk.loaded)
    return "write texts" if bits > max(NARROW) else f"write texts, decoder in {bits} bits"


def measure_sinks(walk: Walk) -> None:
    """Find the tokens that static ranges exclude, if there are such ranges, and add the file's metadata for both."""
    if walk.settings.activations != "static":
        return
    captured = made(walk.captured)

    def found() -> tuple[dict[str, torch.Tensor], object]:
        with walk.timed("sinks"), coarse_products(walk.loaded.device):
            return {}, asdict(broadcast_from_first(lambda: find_sinks(walk.loaded, captured, walk.counted("sinks"))))

    walk.sinks = Sinks(**walk.work.cached("sinks", found)[1])
    for key, value in static_keys(walk.settings.range_estimator, walk.sinks).items():
        walk.result.put("metadata", key, value)


def draw_rotation(walk: Walk) -> None:
    """Choose the random rotation, and add the metadata that identifies it to both files."""
    rotate = walk.settings.rotate
    if rotate == "none":
        return
    walk.rotation = draw(walk.loaded.decoder, rotate, ROTATION_SEED)
    for key, value in file_keys(rotate, walk.rotation.block).items():
        walk.result.put("metadata", key, value)
    for key, value in file_keys(rotate).items():
        walk.result.put("vision", key, value)


def enter_decoder(walk: Walk) -> None:
    """Turn the captured samples into the walk's streams."""
    captured, rotation = made(walk.captured), walk.rotation
    if walk.settings.method != "rtn" or rotation:
        walk.check = FunctionCheck(walk.loaded, captured, rotation)
    basis = rotation.residual.to(walk.loaded.device) if rotation else None
    streams = [replace(stream) if basis is None else stream.turned(basis) for stream in captured]
    walk.captured, walk.streams = None, streams
    if walk.settings.follows_prefix:
        walk.prefix = [replace(stream) for stream in streams]


def choose_types(walk: Walk) -> None:
    """Choose a type for each tensor, if there is a target size."""
    settings, target = walk.settings, walk.settings.target_bpw
    if not target:
        return

    def plan() -> tuple[dict[str, torch.Tensor], object]:
        with walk.timed("allocation"):
            found = allocate(
                len(walk.loaded.decoder.layers),
                walk.rotated_layer,
                made(walk.streams),
                walk.token_weights,
                made(walk.sensitivity).fisher,
                damping=settings.damping if settings.rounding == "gptq" else None,
                clip=settings.clip,
                target=target,
                progress=walk.counted("allocation"),
            )
        return {}, asdict(found)

    walk.result.plan = Plan(**walk.work.cached("plan", plan)[1])


def finish(walk: Walk) -> None:
    """Check the logits, and add embeddings, head and projector if they are rotated."""
    rotation, result = walk.rotation, walk.result
    embeddings = rotated_embeddings(walk.loaded.decoder, rotation) if rotation else {}
    if walk.check:
        walk.check.logits(embeddings)
    for name, value in embeddings.items():
        result.put("replaced", name, value)
    for name, value in (rotated_projector(walk.loaded, rotation) if rotation else {}).items():
        result.put("vision", name, value)
    result.seconds = walk.timer.seconds
