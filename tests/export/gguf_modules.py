"""Removes the loaded gguf modules and restores them, so that a test can load another copy."""

from __future__ import annotations

import sys
from types import ModuleType


def loaded_gguf() -> dict[str, ModuleType]:
    """The modules of the gguf package that are loaded now."""
    return {name: module for name, module in sys.modules.items() if name == "gguf" or name.startswith("gguf.")}


def restore_gguf(modules: dict[str, ModuleType]) -> None:
    """Make ``modules`` the only ones of the gguf package that are loaded."""
    for name in loaded_gguf():
        del sys.modules[name]
    sys.modules.update(modules)
