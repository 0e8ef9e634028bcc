"""Errors of the bindings; each message is one sentence that says what to do."""

from __future__ import annotations


class BindingError(Exception):
    """Work in llama.cpp failed, or its libraries cannot be used. ``exit_code`` is the exit code for programs."""

    exit_code = 1


class CallError(BindingError):
    """Invalid arguments: an unknown type, inconsistent shapes, a missing file."""

    exit_code = 2
