"""The steps of the walk through the decoder, plain functions over its state; their order is in quantise.py."""
