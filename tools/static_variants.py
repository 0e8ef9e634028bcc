"""The variants that trial_static.py compares: which tokens share a static range, and how a range is estimated."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_gguf.calibration.magnitudes import Estimator, Magnitudes

TEXT, VISION, SINK = 0, 1, 2
OUTLIER = 3  # and more: an outlier among TEXT or VISION that is no SINK, in the calibration set
Counted = dict[tuple[int, str, int], Magnitudes]  # by layer, site and class


@dataclass(frozen=True)
class Variant:
    """``estimator`` None means dynamic."""

    estimator: Estimator | None = None
    two: bool = False
    apart: bool = False
    cleaned: bool = False  # outliers are left out of the ranges

    def __str__(self) -> str:
        if self.estimator is None:
            return "dynamic"
        said = "two ranges" if self.two else "one range", self.apart and "sinks apart", self.cleaned and "outliers left out", self.estimator
        return ", ".join(filter(None, said))

    def range(self, counted: Counted, layer: int, site: str, kind: int) -> float:
        """The range for a token of class ``kind``; 0 means dynamic."""
        if self.estimator is None or (self.apart and kind == SINK):
            return 0.0
        kinds = [VISION if kind == VISION else TEXT] if self.two else [TEXT, VISION]
        if not self.apart and TEXT in kinds:
            kinds.append(SINK)
        if not self.cleaned:
            kinds += [OUTLIER + each for each in kinds if each != SINK]
        joined = Magnitudes()
        for each in (counted[layer, site, each] for each in kinds if (layer, site, each) in counted):
            joined.counts, joined.largest = joined.counts + each.counts, max(joined.largest, each.largest)
        return joined.range(self.estimator)


FORMS = ((False, False), (True, False), (False, True), (True, True))
VARIANTS = {
    "full": (
        Variant(),
        *(Variant("minmax", *form) for form in FORMS),
        *(Variant(kind, *form) for kind in ("p99.9", "p99.99", "least-squares") for form in FORMS[2:]),
        *(Variant(kind, *form, cleaned=True) for kind in ("minmax", "p99.99", "least-squares") for form in FORMS[2:]),
    ),
    "none": (
        Variant(),
        *(Variant("minmax", *form) for form in FORMS),
        *(Variant(kind, True, True) for kind in ("p99.9", "p99.99", "least-squares")),
    ),
}
