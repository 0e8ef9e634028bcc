"""Samples in, statistics out: data sets, modality masks, sensitivities and activation statistics."""
