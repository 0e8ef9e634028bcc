"""Exceptions for users: one sentence that says what is wrong and what to do, with an exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mbq_cbind.errors import BindingError

FIELD = re.compile(r"Validation error for field '(\w+)'")  # huggingface_hub's strict dataclasses


class UserError(Exception):
    """An error that the user can fix. ``str(error)`` is one sentence, which the command line prints without a traceback.

    ``exit_code`` is 2 if the arguments were wrong (a bad path, an unknown type) and 1 if the work failed.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """Wrong arguments: exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def describe(error: BaseException, longest: int = 200) -> str:
    """Another library's exception in one line of at most ``longest`` characters; its class name if it has no message.

    Missing keys, and settings that transformers' configuration classes reject for their type, are put into plain words.
    """
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]} is missing"[:longest]
    if field := FIELD.match(str(error)):
        return f"{field[1]} has another type than this model needs"
    return (" ".join(str(error).split()) or type(error).__name__)[:longest]


@contextmanager
def error_context(place: str) -> Iterator[None]:
    """Prefix user errors raised in the block with ``place`` (file and line of a data set), if it is not empty."""
    try:
        yield
    except UserError as error:
        if not place or str(error).startswith(place):
            raise
        raise UserError(f"{place}: {error}", exit_code=error.exit_code) from error


USER_ERRORS = (UserError, BindingError)  # printed as a sentence, without traceback
