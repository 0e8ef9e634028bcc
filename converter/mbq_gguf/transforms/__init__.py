"""Function-preserving edits of weights: channel equalisation and rotations."""
