"""Models that their authors publish with code of their own, each read here without it: a module for each says how.

Such a module has ``bare`` (the model without weights) and ``image_processor``, each of the model's directory, and ``respelled`` (a
checkpoint's tensors under that model's names, by its configuration).
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
# Those whose language model alone is read, by their config.json.
TEXT_MODELS: dict[str, Callable[[Mapping[str, Any]], TextModel]] = {
    qwen_vl.PUBLISHED: qwen_vl.text_model,
    **dict.fromkeys(glm_4v.PUBLISHED, glm_4v.text_model),
    cogvlm.PUBLISHED: cogvlm.text_model,
}
UNKNOWN_TYPE = "You are using a model of type"


def known(record: logging.LogRecord) -> bool:
    """A filter of log records: False for transformers' warning that it does not know a model's type, each time a tokenizer is read."""
    return not str(record.msg).startswith(UNKNOWN_TYPE)


def unwarned() -> None:
    """Keep that warning off the terminal from now on: these types are known here."""
    logging.getLogger("transformers.configuration_utils").addFilter(known)
