"""Which container each tensor gets, so that a size is met at the least predicted loss."""
