"""Restricts a llama-server to the process that started it: options, environment, API key, and requests that bypass proxies.

This blocks downloads (``--offline``, including pictures from ``http://`` URLs), the list of slots with other users' prompts, changing
properties and metrics (llama-server's default), agent tools and proxies, video decoders, web pages of other origins, and requests without
the key. llama-server uses the last of several equal options, so options after these re-enable features. /etc/llama.cpp/config.ini, which an
administrator may have written, still applies.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

# There are no programs in /dev/null: files that llama-server cannot read itself would go to ffprobe and ffmpeg, which read anything.
OPTIONS = ("--offline", "--no-slots", "--no-agent", "--cors-origins", "localhost", "--video-ffmpeg-dir", "/dev/null")
# llama-server reads options from LLAMA_*, and with AIP_MODE its port and routes from AIP_*.
FOREIGN = ("LLAMA_", "AIP_")
# glibc has per-thread heaps: each large answer (probabilities of all tokens: 280 MB as JSON) added to the server's memory, since another
# thread sent it, up to eight times the number of cores. With a single heap, and blocks of 32 MB returned at once, memory stays constant.
# For smaller blocks, such as a picture's pixels, 64 MB of pages are kept, which otherwise were zeroed again for each picture (docs/log.md).
# Other allocators ignore these variables, and values set by the user take precedence.
MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
KEY_OPTIONS = ("--api-key", "--api-key-file")


def new_key() -> str:
    """A random API key of 128 bits."""
    return secrets.token_hex(16)


def environment(key: str | None, empty: Path) -> dict[str, str]:
    """This process's environment for a server: without other people's options, with `key` if given (arguments can be read by all users).

    `empty`: an empty folder to use as the user's configuration folder, where llama-server would look for llama.cpp/config.ini.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {**MEMORY, **kept, "XDG_CONFIG_HOME": str(empty)} | ({"LLAMA_API_KEY": key} if key else {})


def brings_own_key(options: Sequence[str]) -> bool:
    """Whether `options` for llama-server contain an API key (an empty one disables keys)."""
    return any(option in KEY_OPTIONS for option in options)


def request(method: str, url: str, key: str | None, timeout: float, body: dict[str, Any] | bytes | None = None) -> requests.Response:
    """One request to our server, with ``body`` as JSON (bytes are sent as they are), ignoring proxies and .netrc of the environment.

    Raises requests.RequestException.
    """
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
            return session.request(method, url, data=body, timeout=timeout, headers=headers)
        return session.request(method, url, json=body, timeout=timeout, headers=headers)
