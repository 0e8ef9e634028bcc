"""``mbq-gguf convert --help``: every option has a heading, every choice is known to the code, former names work and are not shown."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import click
import pytest
from click.testing import CliRunner
from mbq_gguf import settings
from mbq_gguf.calibration.dataset import Turns
from mbq_gguf.calibration.token_weights import Kind
from mbq_gguf.cli import imatrix, main
from mbq_gguf.convert_command import convert
from mbq_gguf.evaluate.command import eval_command
from mbq_gguf.models.prompts import AnswerMask
from mbq_gguf.option_groups import GroupedOption
from mbq_gguf.transforms.rotation import Rotate


def parsed(*arguments: str) -> dict[str, object]:
    """What the command makes of ``arguments``."""
    return convert.make_context("convert", ["model", "out.gguf", *arguments]).params


def test_headings_stand_in_order_with_every_option_below_one() -> None:
    shown = CliRunner().invoke(main, ["convert", "--help"]).output
    places = [shown.index(f"\n{heading}") for heading in ("Everyday:", "Calibration:", "Rounding:", "Research (", "Other:")]
    assert places == sorted(places)
    assert all(isinstance(parameter, GroupedOption | click.Argument) for parameter in convert.params)
    assert "--help" in shown[places[-1] :]


@pytest.mark.parametrize(
    ("former", "now", "field", "value"),
    [
        (["--no-distort"], ["--no-propagate-error"], "propagate_error", False),
        (["--correction", "0.25"], ["--error-correction", "0.25"], "error_correction", 0.25),
        (["--refine", "4"], ["--learn-scales", "4"], "learn_scales", 4),
    ],
)
def test_former_names_mean_the_same_and_are_not_shown(former: list[str], now: list[str], field: str, value: object) -> None:
    assert parsed(*former)[field] == parsed(*now)[field] == value != parsed()[field]
    shown = CliRunner().invoke(main, ["convert", "--help"]).output.split()
    assert now[0] in shown
    assert former[0] not in shown


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("method", settings.Method),
        ("rounding", settings.Rounding),
        ("search_loss", settings.SearchLoss),
        ("turns", Turns),
        ("token_weights", Kind),
        ("answer_mask", AnswerMask),
        ("rotate", Rotate),
    ],
)
def test_choices_are_those_of_the_code(field: str, kind: object) -> None:
    [option] = [parameter for parameter in convert.params if parameter.name == field]
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == get_args(kind)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value: str) -> None:
    """click finds NaN in every range."""
    options = [parameter for parameter in convert.params if isinstance(parameter.type, click.types.FloatParamType)]
    assert {option.name for option in options} == {"memory", "error_correction", "target_bpw", "prompt_weight"}
    for option in options:
        with pytest.raises(click.BadParameter):
            parsed(option.opts[0], value)


@pytest.mark.parametrize("command", [convert, eval_command])
def test_no_more_threads_than_llama_cpp_takes(command: click.Command) -> None:
    [option] = [parameter for parameter in command.params if parameter.name == "threads"]
    assert option.type_cast_value(click.Context(command), 512) == 512
    for count in (0, 513):
        with pytest.raises(click.BadParameter):
            option.type_cast_value(click.Context(command), count)


def test_imatrix_calibrates_on_as_much_as_convert() -> None:
    ours, theirs = ({option.name: option.default for option in command.params} for command in (convert, imatrix))
    for name in ("samples", "seed", "device"):
        assert ours[name] == theirs[name], name


def test_help_loads_no_torch() -> None:
    program = (
        "import sys; from mbq_gguf.cli import main; main(['convert', '--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
