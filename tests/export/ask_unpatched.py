"""Asks an unpatched llama.cpp questions about pictures, in a separate process, because the library aborts on files that it cannot read.

    python ask_unpatched.py MODEL.gguf MMPROJ.gguf < questions.json > answers.json

Questions are pairs of a picture's path and a text; answers are texts in the same order.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import xllamacpp


def main(model: str, mmproj: str) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = model, mmproj
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, False
    server = xllamacpp.Server(parameters)
    answers = []
    for picture, question in json.load(sys.stdin):
        url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        message = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
        answers.append(server.handle_chat_completions(message)["choices"][0]["message"]["content"].strip())
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
