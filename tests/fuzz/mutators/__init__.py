"""Ways to spoil a file that keep most of it right, one module a format: ``mutate(seed, draw)`` gives bytes and says what was done."""
