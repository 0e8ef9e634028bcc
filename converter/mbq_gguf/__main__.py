"""``python -m mbq_gguf``: the same as the ``mbq-gguf`` command."""

from mbq_gguf.cli import main

main()
