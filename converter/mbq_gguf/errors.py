"""The exceptions that a user may see: a sentence that says what to do, and the exit code that goes with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mbq_cbind.errors import BindingError

FIELD = re.compile(r"Validation error for field '(\w+)'")  # huggingface_hub's strict dataclasses


class UserError(Exception):
    """Something the user can mend. ``str(error)`` is one sentence; the command line prints it without a traceback.

    ``exit_code`` is 2 where the call itself was wrong (a bad path, an unknown type) and 1 where the work failed.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """The call was wrong: exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def said(error: BaseException, longest: int = 200) -> str:
    """What another library's exception says, in one line of ``longest`` characters at most; its name where it says nothing.

    A key that was looked for and a setting of another kind (transformers' configuration classes) are named in a person's words.
    """
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]} is missing"[:longest]
    if field := FIELD.match(str(error)):
        return f"{field[1]} is of another kind than such a model has"
    return (" ".join(str(error).split()) or type(error).__name__)[:longest]


@contextmanager
def at(place: str) -> Iterator[None]:
    """Sentences of the block's errors begin with ``place`` (file and line of a set), where there is one."""
    try:
        yield
    except UserError as error:
        if not place or str(error).startswith(place):
            raise
        raise UserError(f"{place}: {error}", exit_code=error.exit_code) from error


SHOWN = (UserError, BindingError)  # what a command line prints as a sentence, with no traceback
