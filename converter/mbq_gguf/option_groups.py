"""Click options grouped under headings in ``--help``, and number types with limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import click

OTHER = "Other"
ARGUMENTS = "mbq_gguf.arguments"  # key of Context.meta
THREADS = click.IntRange(1, 512)  # GGML_MAX_N_THREADS; with many more, creating threads fails in the middle of the work
Decorate = Callable[[Callable[..., Any]], Callable[..., Any]]


class Finite(click.FloatRange):
    """A finite number in a range; click's FloatRange accepts NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert and check the value."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


class GroupedOption(click.Option):
    """An option under ``heading``. ``former`` names keep working for old commands but are not shown."""

    def __init__(self, names: Sequence[str], *, heading: str, former: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__([*names, *former], **attributes)
        self.heading = heading
        self.former = frozenset(part for name in former for part in name.split("/"))

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The help record without former names."""
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in self.former]
        shown.secondary_opts = [name for name in self.secondary_opts if name not in self.former]
        return super(GroupedOption, shown).get_help_record(ctx)


class GroupedCommand(click.Command):
    """A command whose ``--help`` lists its options by heading, in order of definition."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse ``args`` and keep a copy in ``ctx.meta[ARGUMENTS]``."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by heading; those without one (``--help``) come last."""
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records.setdefault(getattr(parameter, "heading", OTHER), []).append(record)
        rest = records.pop(OTHER, [])
        for heading, rows in {**records, OTHER: rest}.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def option_group(heading: str) -> Callable[..., Decorate]:
    """``click.option`` for one heading, with defaults shown."""

    def option(*names: str, **attributes: Any) -> Decorate:
        return click.option(*names, cls=GroupedOption, heading=heading, **{"show_default": True, **attributes})

    return option
