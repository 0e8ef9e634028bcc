"""Static ranges of a decoder with different kinds of layers, as llama.cpp reads them: one per layer."""

from __future__ import annotations

import pytest
from mbq_gguf.formats.static_ranges import CLASSES, SITES, range_key, unread
from mbq_gguf.quantise import quantise
from mbq_gguf.settings import QuantiseSettings
from small import Small

SETTINGS = QuantiseSettings(type_name="W4A8", rounding="nearest", activations="static", range_estimator="minmax", synthetic=0, clip=False)


def test_static_ranges_stand_at_their_layers(small: Small) -> None:
    """Where layers differ: 0, dynamic, for a site that a layer has not, and no range of a site that llama.cpp has no name for."""
    layers = [{site.name for site in small.loaded.decoder.layout.of(module).sites} for module in small.loaded.decoder.layers]
    if small.loaded.decoder.layout.stacks:
        pytest.skip("experts have no static ranges")
    keys = quantise(small.loaded, small.samples, SETTINGS).facts_of("metadata")
    assert not unread(keys, tower=False)
    for site in SITES:
        for kind in CLASSES:
            found = keys[range_key(site, kind)]
            assert [value > 0 for value in found] == [site in sites for sites in layers], (site, kind)
