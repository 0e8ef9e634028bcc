"""The model's own greedy answer, for images that come without one."""

from __future__ import annotations

import torch
from PIL import Image

from mbq_gguf.models.loaded import LoadedModel


@torch.no_grad()
def greedy_answer(loaded: LoadedModel, image: Image.Image, question: str, max_tokens: int) -> str:
    """What the model writes greedily after ``question`` about ``image``, at most ``max_tokens`` tokens.

    Needs the whole decoder on the device in the computing dtype, so it is copied there for the time of the call.
    """
    encoded = loaded.encode(image, [(question, "")])
    stored = next(loaded.decoder.layers.parameters()).dtype
    loaded.decoder.layers.to(device=loaded.device, dtype=loaded.dtype)
    try:
        model = loaded.model
        out = model.generate(**encoded.inputs, do_sample=False, max_new_tokens=max_tokens, use_cache=True)  # type: ignore[operator]
    finally:
        loaded.decoder.layers.to(device="cpu", dtype=stored)
    new = out[0, encoded.ids.shape[0] :]
    return str(loaded.prompts.tokenizer.decode(new, skip_special_tokens=True)).strip()
