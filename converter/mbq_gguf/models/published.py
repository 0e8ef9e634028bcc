"""Models that are published with their own modelling code, which are read here without running it: one module for each.

Such a module has ``empty_model`` (the model without weights) and ``image_processor``, both of which take the model's directory, and
``rename_tensors``, which renames a checkpoint's tensors to that model's names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from mbq_gguf.models import cogvlm, dots_ocr, glm_4v, internvl, minicpmv, qwen_vl
from mbq_gguf.models.text_model import TextModel

PUBLISHED: dict[str, ModuleType] = {
    **dict.fromkeys(internvl.PUBLISHED, internvl),
    dots_ocr.PUBLISHED: dots_ocr,
    **dict.fromkeys(minicpmv.PUBLISHED, minicpmv),
}
# Models of which only the language model is read, given their config.json.
TEXT_MODELS: dict[str, Callable[[Mapping[str, Any]], TextModel]] = {
    qwen_vl.PUBLISHED: qwen_vl.text_model,
    **dict.fromkeys(glm_4v.PUBLISHED, glm_4v.text_model),
    cogvlm.PUBLISHED: cogvlm.text_model,
}
UNKNOWN_TYPE = "You are using a model of type"


def is_other_record(record: logging.LogRecord) -> bool:
    """Log filter that drops transformers' warning about an unknown model type, which it repeats for each tokenizer that is read."""
    return not str(record.msg).startswith(UNKNOWN_TYPE)


def silence_type_warning() -> None:
    """Hide that warning from now on: these types are supported here."""
    logging.getLogger("transformers.configuration_utils").addFilter(is_other_record)
