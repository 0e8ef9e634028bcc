"""Every target by the name that the command line has for it."""

from __future__ import annotations

from targets import Target, llama, model, readers

READERS: dict[str, type[Target]] = {
    "header": readers.Header,
    "inspect": readers.Inspect,
    "jsonl": readers.Conversations,
    "safetensors": readers.Safetensors,
    "workdir": readers.WorkDirectory,
    "picture": readers.Picture,
    "settings": model.Settings,
}
LLAMA: dict[str, type[Target]] = {"text": llama.Text, "mmproj": llama.Mmproj, "decoder": llama.Decoder}
TARGETS = READERS | LLAMA
