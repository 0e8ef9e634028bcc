"""What goes wrong in the bindings, as one sentence that says what to do."""

from __future__ import annotations


class BindingError(Exception):
    """Work in llama.cpp failed, or its libraries cannot be used. ``exit_code`` is what a program that ends by it should return."""

    exit_code = 1


class CallError(BindingError):
    """The call itself was wrong: an unknown type, shapes that do not belong together, a missing file."""

    exit_code = 2
