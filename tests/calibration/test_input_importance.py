"""Sums of squared inputs against a direct computation in the whole model."""

from __future__ import annotations

import torch
from mbq_gguf.calibration.dataset import Sample
from mbq_gguf.calibration.importance import importance
from mbq_gguf.calibration.stream import capture
from mbq_gguf.models import LoadedModel


@torch.no_grad()
def test_sums_are_those_of_the_whole_model(tiny: LoadedModel, samples: list[Sample]) -> None:
    seen: list[int] = []
    found = importance(tiny, capture(tiny, samples), lambda done, total: seen.append(done))
    assert seen == [1, 2, 3]
    assert len(found.sums) == 3 * 7

    direct: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in tiny.decoder.linears():

        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], key: str = f"{name}.weight") -> None:
            direct[key] = direct.get(key, 0) + args[0][0].double().square().sum(0)

        handles.append(module.register_forward_pre_hook(hook))
    tokens = 0
    with tiny.whole(tiny.dtype):
        for sample in samples:
            encoded = tiny.encode(sample.image, list(sample.turns))
            tokens += len(encoded.ids)
            tiny.model(**encoded.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    assert (found.tokens, found.samples) == (tokens, len(samples))
    assert found.sums.keys() == direct.keys()
    for key, sums in direct.items():
        torch.testing.assert_close(found.sums[key], sums, rtol=1e-5, atol=1e-6, msg=key)
