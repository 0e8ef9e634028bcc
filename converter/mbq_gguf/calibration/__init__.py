"""Data sets, modality masks, sensitivities and activation statistics."""

from mbq_gguf.calibration.dataset import Sample, load_samples

__all__ = ["Sample", "load_samples"]
