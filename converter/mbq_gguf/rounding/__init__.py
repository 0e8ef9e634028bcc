"""Weights to codes on the quant type's own grid."""
