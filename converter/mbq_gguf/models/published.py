"""Models that their authors publish with code of their own, each read here without it: a module for each says how.

Such a module has ``bare`` (the model without weights), ``respelled`` (a checkpoint's tensors under that model's names) and
``image_processor``, each of the model's directory or its tensors.
"""

from __future__ import annotations

from types import ModuleType

from mbq_gguf.models import dots_ocr, internvl, minicpmv

PUBLISHED: dict[str, ModuleType] = {
    internvl.PUBLISHED: internvl,
    dots_ocr.PUBLISHED: dots_ocr,
    **dict.fromkeys(minicpmv.PUBLISHED, minicpmv),
}
