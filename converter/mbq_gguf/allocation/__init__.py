"""Which quant type each tensor gets, so that a size is met at the least predicted loss."""
