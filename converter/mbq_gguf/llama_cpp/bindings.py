"""Points the bindings, which do not know about pins and caches, to the build in use."""

from __future__ import annotations

from functools import cache

from mbq_cbind.library import use

from mbq_gguf.llama_cpp.cache import cache_root
from mbq_gguf.llama_cpp.paths import source_dir


@cache
def bind() -> None:
    """Call this before using ``mbq_cbind``. Raises UserError if nothing is built."""
    use(source_dir(), cache_root() / "cbind")
