"""Weights to codes on a container's own grid."""
