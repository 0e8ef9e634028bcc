"""Closes a llama-server to everybody but the process that started it: its options, environment and key, and requests past every proxy.

Closed are the network (``--offline``: nothing is fetched, pictures by ``http://`` included), the lists of slots with other people's
prompts, changes of properties and metrics (llama-server's own default), tools and proxies for agents, decoders of films, pages of other
origins, and every request without the key. llama-server takes the last of two equal options: one given after these opens what it names.
What an administrator wrote to /etc/llama.cpp/config.ini still counts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

# No program lies below /dev/null: what is no picture that llama-server reads itself would go to ffprobe and ffmpeg, which read anything.
OPTIONS = ("--offline", "--no-slots", "--no-agent", "--cors-origins", "localhost", "--video-ffmpeg-dir", "/dev/null")
# llama-server reads options from LLAMA_*, and under AIP_MODE its port and routes from AIP_*.
FOREIGN = ("LLAMA_", "AIP_")
# glibc keeps what a thread has freed for that thread: each answer of a large request (probabilities of all tokens: 280 MB as JSON) added as
# much again, since another thread sent it, up to eight times the cores. One heap for all, and pieces of 32 MB given back at once, hold it
# still. Of smaller pieces, as a picture's pixels are, 64 MB of pages are kept, which were zeroed anew for each picture (docs/log.md). Other
# systems' allocators do not read these; who sets them himself has his own way.
MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
KEY_OPTIONS = ("--api-key", "--api-key-file")


def new_key() -> str:
    """A key that nobody can guess: 128 random bits."""
    return secrets.token_hex(16)


def environment(key: str | None, empty: Path) -> dict[str, str]:
    """This process's environment for a server: without other people's options, with `key` if given (arguments can be read by all users).

    `empty`: an empty folder that stands for the user's configuration, where llama-server would look for llama.cpp/config.ini.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {**MEMORY, **kept, "XDG_CONFIG_HOME": str(empty)} | ({"LLAMA_API_KEY": key} if key else {})


def brings_own_key(options: Sequence[str]) -> bool:
    """Whether llama-server's own `options` name a key (an empty one: none is asked for)."""
    return any(option in KEY_OPTIONS for option in options)


def request(method: str, url: str, key: str | None, timeout: float, body: dict[str, Any] | bytes | None = None) -> requests.Response:
    """One request to a server of ours, ``body`` as JSON (bytes: it is JSON already); proxies and .netrc of the environment do not see it.

    Raises requests.RequestException.
    """
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
            return session.request(method, url, data=body, timeout=timeout, headers=headers)
        return session.request(method, url, json=body, timeout=timeout, headers=headers)
