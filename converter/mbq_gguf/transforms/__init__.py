"""Edits of the weights that leave the function as it is."""
