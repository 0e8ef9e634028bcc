"""Chooses a quant type for each tensor, to reach a target size at the least predicted loss."""
