"""Where a vision-language model keeps its decoder layers, their linears and its vision tokens: one adapter a family."""
