"""Which settings of config.json are probably at fault, once transformers or llama.cpp's conversion has failed on them.

Their exceptions seldom name a setting ("'NoneType' object is not iterable"). So a setting is suspected if it is of another kind than the
class of its configuration has by itself, if a list in it mixes kinds or lengths, or if a part is null or has no number of layers, which
the conversion reads as null. This is asked only after a failure: published models have such settings too, and work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mbq_gguf.errors import describe
from mbq_gguf.models.checks import read_json_object
from mbq_gguf.models.config_types import COUNT, NUMBER, PARTS, SIZE

# What Python raises where a value is of another kind than code expects; other ValueErrors have sentences of their authors'.
PYTHON_ERRORS = (TypeError, AttributeError, IndexError, NameError, ZeroDivisionError)
PYTHON_VALUES = re.compile(r"values to unpack|invalid literal|Unknown type")
LAYERS = re.compile(r"depth|(?:\w+_)?layers?")
MOST, LONGEST = 3, 60  # settings that a message names, and characters of a value


def describe_failure(error: BaseException, model_dir: Path) -> str:
    """``error``, which the model in ``model_dir`` caused, in one line: the settings of its config.json that are suspected, if the error is
    one of Python's own and there are any, and otherwise the error's own words."""
    file, found = model_dir / "config.json", list[str]()
    if isinstance(error, PYTHON_ERRORS) or (isinstance(error, ValueError) and PYTHON_VALUES.search(str(error))):
        with suppress(Exception):  # a class without settings of its own, lists in too many lists: ``error`` is what counts
            config = read_json_object(file)
            found = list(suspects(config)) or (list(nulls(config)) if "NoneType" in str(error) else [])
    return f"in config.json {', '.join(found[:MOST])}" if found else describe(error)


def suspects(config: Mapping[str, Any]) -> Iterator[str]:
    """The settings of ``config`` that are suspected: each with its place, its value, and what is wrong with it."""
    usual = class_settings(config)
    yield from of_object(config, usual, "")
    for part in PARTS:
        settings = config.get(part, {})
        if not isinstance(settings, dict):
            yield f"{part} is {settings!r:.{LONGEST}}"
        elif settings:
            yield from of_object(settings, class_settings(settings) or usual.get(part) or {}, f"{part}.")
            if not any(LAYERS.fullmatch(name) for name in settings):
                yield f"{part} has no number of layers"


def nulls(config: Mapping[str, Any]) -> Iterator[str]:
    """Sizes and numbers that are null: most may be, but Gemma 4's ``num_experts`` only without ``enable_moe_block``. Asked if there are no
    suspects and the error is about None."""
    for place, settings in (("", config), *((f"{part}.", config.get(part) or {}) for part in PARTS)):
        for name, value in settings.items():
            if value is None and any(names.fullmatch(name) for names in (SIZE, COUNT, NUMBER)):
                yield f"{place}{name} is None"


def of_object(settings: Mapping[str, Any], usual: Mapping[str, Any], place: str) -> Iterator[str]:
    """The same for one object of config.json, at ``place``; ``usual`` are the settings of its class."""
    for name, value in settings.items():
        own = usual.get(name)
        here, wanted = kind(value), kind(own)
        if differs(here, wanted) or (own and value in ({}, [])):
            yield f"{place}{name} is {repr(value) if len(repr(value)) <= LONGEST else article(here)} and usually {article(wanted)}"
        elif isinstance(value, list) and (" and " in here or len({len(item) for item in value if isinstance(item, list)}) > 1):
            yield f"{place}{name} is {article(here)}, not all of one kind and length"
        elif value is None and name not in usual and any(names.fullmatch(name) for names in (SIZE, COUNT, NUMBER)):
            yield f"{place}{name} is None"
        elif isinstance(value, dict) and f"{place}{name}" not in PARTS:
            yield from of_object(value, own if isinstance(own, dict) else {}, f"{place}{name}.")


def differs(found: str, usual: str) -> bool:
    """Whether the kind ``found`` is another than the ``usual`` one; what is empty may be of any."""
    either_empty = {found, usual} & {"list", "object"}
    alike = found.split()[0] == usual.split()[0] if either_empty else found == usual
    return usual != "null" and not alike


def class_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that transformers' class of this object has by itself, {} if it has none."""
    from transformers import CONFIG_MAPPING

    name = settings.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        return {}
    found: dict[str, Any] = json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False))
    return found


def kind(value: Any) -> str:
    """The kind of a JSON value in words: "null", "flag", "number", "word", "list of numbers", "object"; "object of objects" by layers."""
    if isinstance(value, dict):
        return "object" + of_kinds(value.values() if all(name.isdigit() for name in value) else ())
    if isinstance(value, list):
        return "list" + of_kinds(value)
    names = {type(None): "null", bool: "flag", int: "number", float: "number"}
    return names.get(type(value), "word")


def of_kinds(items: Iterable[Any]) -> str:
    """The kinds of ``items``: " of numbers", " of lists of numbers", "" if there are none."""
    kinds = sorted({re.sub(r"^\w+", r"\g<0>s", kind(item)) for item in items})
    return f" of {' and '.join(kinds)}" if kinds else ""


def article(words: str) -> str:
    """``words`` behind "a" or "an"."""
    return f"{'an' if words.startswith('o') else 'a'} {words}"
