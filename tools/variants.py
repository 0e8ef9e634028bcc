"""The rows of docs/results.md: how each file is made from the reference VLM. To add a row, add a line here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REFERENCE = "BF16"
THREADS = 2


@dataclass(frozen=True)
class Variant:
    """A file: its name in the tables and the command that makes it."""

    name: str
    program: str  # "convert" (ours, from the Hugging Face directory) or "quantize" (llama-quantize, from the BF16 GGUF)
    arguments: tuple[str, ...]
    asked: bool = True  # through llama-server; a step is compared by `mbq-gguf eval` alone

    @property
    def file_name(self) -> str:
        return re.sub(r"[^A-Za-z0-9_.]+", "-", self.name) + ".gguf"

    def command(self, folder: Path, model: Path) -> list[str]:
        """The command that writes the file to ``folder``."""
        if self.program == "quantize":
            return ["llama-quantize", str(folder / f"{REFERENCE}.gguf"), str(folder / self.file_name), *self.arguments, str(THREADS)]
        return ["mbq-gguf", "convert", str(model), str(folder / self.file_name), *self.arguments, "--threads", str(THREADS)]


# The papers' methods alone: steps beyond them are on by default.
PLAIN = ("--samples", "64", "--synthetic", "0", "--no-clip", "--no-propagate-error", "--refits", "0")


def plain(method: str, rounding: str) -> Variant:
    """A row for one of the papers' methods, in MBQ3."""
    return Variant(f"MBQ3 {method} {rounding}", "convert", ("--type", "MBQ3", "--method", method, "--rounding", rounding, *PLAIN))


def step(*options: str, type_name: str = "MBQ3") -> Variant:
    """The default with one thing changed."""
    return Variant(f"{type_name} {' '.join(options)}", "convert", ("--type", type_name, *options), asked=False)


STEPS = (
    step("--seed", "1"),
    step("--samples", "32"),
    step("--samples", "32", "--seed", "1"),
    step("--samples", "256"),
    step("--samples", "256", "--seed", "1"),
    step("--synthetic", "0"),
    step("--no-clip"),
    step("--no-propagate-error"),
    step("--error-correction", "0"),
    step("--refits", "0"),
    step("--learn-scales", "4"),
    *(step("--token-weights", weights) for weights in ("modality", "gradient", "token")),
    *(step("--rotate", rotate) for rotate in ("offline", "full")),
    *(step("--method", method) for method in ("awq", "mbq")),
    step("--seed", "1", type_name="MBQ3S"),
    step("--rotate", "full", type_name="MBQ3S"),
)

# For the model that widen.py writes, whose rows of 768 and 1536 suit every type.
WIDE = tuple(Variant(name, "convert", ("--type", name), asked=False) for name in (REFERENCE, "MBQ3", "Q3_K"))

VARIANTS = (
    Variant(REFERENCE, "convert", ("--type", REFERENCE)),
    *(plain(method, rounding) for rounding in ("nearest", "gptq") for method in ("rtn", "awq", "mbq")),
    *(Variant(name, "convert", ("--type", name)) for name in ("MBQ3S", "MBQ3")),
    Variant("3.5 bits, mixed", "convert", ("--target-bpw", "3.5")),
    *(Variant(f"{name} by mbq-gguf", "convert", ("--type", name)) for name in ("Q3_K", "Q4_0")),
    *(Variant(name, "quantize", (name,)) for name in ("Q4_0", "Q4_K_M", "Q3_K_M")),
    *STEPS,
)
