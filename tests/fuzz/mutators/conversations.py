"""A set of conversations, JSONL or an array in its three shapes, with one or two of them corrupted."""

from __future__ import annotations

import json
import random

from mutators import json_text, raw

PICTURE = "data:image/png;base64,iVBORw0KGgo="
LINES: tuple[dict[str, object], ...] = (
    {"image": "cat.png", "turns": [{"question": "What is it?", "answer": "A cat.", "task": "name"}, {"question": "Why?", "answer": "So."}]},
    {"id": 1, "image": "cat.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
    {
        "images": ["cat.png"],
        "conversations": [{"from": "system", "value": "x"}, {"from": "user", "value": "?"}, {"from": "gpt", "value": "!"}],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ]
    },
    {"images": [PICTURE], "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
)
ENDS = (b"\n", b"\n", b"\r\n", b"\r", b"\n\n \n", b"\x0b", b"\xe2\x80\xa8", b"")


def mutate(draw: random.Random) -> tuple[bytes, str]:
    """A whole file, and what was done to it."""
    texts, done = [], []
    lines = draw.choices(LINES, k=draw.choice((1, 1, 2, 3)))
    spoilt = draw.randrange(len(lines))
    for index, line in enumerate(lines):
        text, words = json_text.mutate(line, draw) if index == spoilt else (json.dumps(line).encode(), "")
        texts.append(text)
        done.append(words)
    together = b"[" + b",\n".join(texts) + b"]" if draw.random() < 0.2 else b"".join(text + draw.choice(ENDS) for text in texts)
    data = draw.choice((b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe")) + together
    if draw.random() < 0.05:
        data, words = raw.mutate(data, draw)
        done.append(words)
    return data, " ".join(word for word in done if word)
