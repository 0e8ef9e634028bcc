"""Builds llama-server's web page (llama.cpp's tools/ui) with npm, from the tree's package lock, and caches it under a hash of its sources.

npm downloads about a thousand packages, whose checksums are in the lock file, and runs none of their install scripts. On two cores the page
takes one minute to download and three to build, and temporarily 700 MB of disk. It is therefore built once per pin, not with every build.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console

from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import source
from mbq_gguf.llama_cpp.cache import cache_root
from mbq_gguf.llama_cpp.locks import file_lock
from mbq_gguf.llama_cpp.machine import find_tool
from mbq_gguf.llama_cpp.pin import Pin
from mbq_gguf.llama_cpp.steps import run_step, say

FOLDER = "tools/ui"
RESULT = f"{FOLDER}/dist"  # where llama.cpp's build first looks for a finished page
NODE = (20, 19)  # the oldest version that the page's bundler (vite 7) supports
RETRY_SECONDS = 24 * 3600.0  # how long `auto` waits after a failed build
# Fails quickly without network: npm's default is five minutes per request.
_NPM_CI = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-timeout=60000", "--fetch-retry-maxtimeout=10000")
_REASONS = (
    re.compile(r"^\w*Error: .+$", re.MULTILINE),
    re.compile(r"^npm (?:error|ERR!) (?!code |errno |syscall |type |A complete log)(?:network )?(.+)$", re.MULTILINE),
)


def find_page(choice: str, origin: Path | None, pin: Pin, console: Console) -> Path | None:
    """The folder of the finished web page of `origin`, or of the pinned source where None; built where it is not in the cache.

    None if `choice` is ``off``, and where it is ``auto`` and the page cannot be built, which is said in one sentence. Raises UserError
    for that where it is ``on``.
    """
    if choice == "off" or (choice == "auto" and origin is not None and not _lock_file(origin / FOLDER).is_file()):
        return None
    try:
        node = _node_version()
        sources = f"{pin.sha256} {pin.subdirectory}" if origin is None else source.tree_hash(origin / FOLDER)
        page = cache_root() / "pages" / hashlib.sha256(f"{sources} {node} {_NPM_CI}".encode()).hexdigest()[:16]
        with file_lock(cache_root() / "locks" / f"page-{page.name}.lock", lambda: say(console, "another mbq-gguf is building the page")):
            if not (page / "index.html").is_file():
                _build(page, choice, origin, pin, console)
        return page
    except UserError as error:
        if choice == "on":
            raise
        say(console, f"llama-server gets no web page: {error}")
        return None


def _node_version() -> str:
    """What ``node --version`` says. Raises UserError if node or npm is missing or too old."""
    node, wanted = find_tool("node"), ".".join(map(str, NODE))
    if node is None or find_tool("npm") is None:
        raise UserError(f"node and npm were not found: install node {wanted} or newer and run `mbq-gguf build --page on`")
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    version = tuple(int(part) for part in re.findall(r"\d+", said)[:2])
    if version < NODE:
        raise UserError(f"node {said} is too old: install node {wanted} or newer and run `mbq-gguf build --page on`")
    return said


def _build(page: Path, choice: str, origin: Path | None, pin: Pin, console: Console) -> None:
    failed = page.with_suffix(".failed")
    if choice == "auto" and failed.is_file() and time.time() - failed.stat().st_mtime < RETRY_SECONDS:
        raise UserError(failed.read_text(encoding="utf-8"))
    page.parent.mkdir(parents=True, exist_ok=True)
    log_path = cache_root() / "logs" / f"page-{page.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    npm = find_tool("npm")
    assert npm is not None
    for left in page.parent.glob(f".{page.name}-*"):  # left by a killed process; this process holds the lock
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{page.name}-", dir=page.parent) as work, log_path.open("w", encoding="utf-8") as log:
        inside = Path(work, "ui")
        if origin is None:
            source.unpack_folder(source.fetch(pin, console), pin, FOLDER, inside)
        else:
            shutil.copytree(origin / FOLDER, inside, ignore=shutil.ignore_patterns("node_modules", "dist"))
        if not _lock_file(inside).is_file():
            raise UserError(f"this llama.cpp has no {_lock_file(Path(FOLDER))}: build with `--page off`")
        extra = {"LLAMA_UI_OUT_DIR": str(Path(work, "dist")), "LLAMA_UI_VERSION": "b0", "LLAMA_BUILD_NUMBER": "0"}
        try:
            for title, step in (("downloading the web page's packages", _NPM_CI), ("building the web page", ("run", "build"))):
                say(console, title)
                with console.status(title):
                    run_step([npm, "--prefix", inside, *step], log, lambda line: None, extra)
            if not Path(work, "dist", "index.html").is_file():
                raise FileNotFoundError("it made no index.html")
        except (UserError, FileNotFoundError) as error:
            sentence = f"npm could not build it ({_reason(log_path) or error}): run `mbq-gguf build --page on` to try again"
            failed.write_text(sentence, encoding="utf-8")
            raise UserError(sentence) from error
        Path(work, "dist").replace(page)
        failed.unlink(missing_ok=True)


def _lock_file(folder: Path) -> Path:
    return folder / "package-lock.json"


def _reason(log: Path) -> str | None:
    """The first line of what npm or the bundler said that states an error, and where the rest is; None if none does."""
    said = log.read_text(encoding="utf-8", errors="replace")
    found = next((match for pattern in _REASONS if (match := pattern.search(said))), None)
    return f"{found[found.lastindex or 0]}; the log is {log}" if found else None
