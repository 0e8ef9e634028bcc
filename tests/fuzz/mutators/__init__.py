"""Ways to corrupt a file that leave most of it valid, one module per format: ``mutate(seed, draw)`` returns bytes and a description."""
