"""`mbq-gguf --help` describes each command completely within 80 columns."""

from __future__ import annotations

from click.testing import CliRunner
from mbq_gguf.cli import main


def test_every_command_has_its_line() -> None:
    shown = CliRunner().invoke(main, ["--help"], env={"COLUMNS": "80"}, terminal_width=80).output
    lines = shown.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == sorted(main.commands)
    assert all(line.endswith(".") and not line.endswith("..") for line in lines)
