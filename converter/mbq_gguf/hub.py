"""Resolves the MODEL argument: a directory, or a model on the hub, which is downloaded into huggingface_hub's cache.

Cache, hub and token are configured as for huggingface_hub (HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ``hf auth login``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.export.progress import download_bars
from mbq_gguf.snapshot import snapshot_of

# Configuration, tokenizer, chat templates and the model card, which has licence and languages.
SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "README.md")
CODE = ("*.py",)  # only with --trust-remote-code
WEIGHTS = ("*.safetensors",)
FOLDERS = ("*/*", "consolidated*.safetensors")  # copies of the weights in other formats
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REASON = 160  # characters of another library's message that are shown


def model_directory(model: str | Path, revision: str | None, console: Console, code: bool = False) -> Path:
    """The directory of ``model``: the path itself if it exists, else the cached copy of the hub's ``model`` (ORG/NAME) at ``revision``.

    Downloads a repository's Python code only with ``code``. Raises UsageError if ``model`` is neither, and UserError, with what to do, if
    the hub does not provide it.
    """
    path = Path(model)
    if path.exists():
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError as error:  # tokenizers and safetensors need UTF-8 paths
            raise UsageError(f"the path {model} is not valid UTF-8: rename it, or set PYTHONUTF8=1 in a locale without Unicode") from error
        if revision is not None:
            raise UsageError(f"--revision is for models on the hub and {model} is a local path: leave it out")
        return path
    if not NAME.fullmatch(str(model)) or ".." in str(model) or "--" in str(model):
        raise UsageError(
            f"{model} is not a directory, nor a name such as Qwen/Qwen2-VL-2B-Instruct: "
            "give the directory of a Hugging Face model, or its name on the hub"
        )
    directory = fetch(str(model), revision, console, code)
    console.print(f"{snapshot_of(directory)}", highlight=False, soft_wrap=True)
    return directory


def fetch(repo: str, revision: str | None, console: Console, code: bool) -> Path:
    """Download what a conversion of ``repo`` needs, or find it in the cache; checks the model before downloading its weights."""
    with hub_errors(repo, revision), quiet_hub():
        directory = download(repo, revision, (*SETTINGS, *CODE) if code else SETTINGS, console)
    from mbq_gguf.models.load import check_source  # transformers is slow to import, and not needed if the hub refuses
    from mbq_gguf.models.remote_code import remote_code

    with remote_code(code):
        check_source(directory)
    with hub_errors(repo, revision), quiet_hub():
        return download(repo, directory.name, WEIGHTS, console)


def download(repo: str, revision: str | None, patterns: Sequence[str], console: Console) -> Path:
    """Download the files of ``repo`` that match ``patterns`` into the cache, with a progress bar on ``console``."""
    from huggingface_hub import snapshot_download

    with download_bars(console) as bars:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(FOLDERS), tqdm_class=bar_class(bars, repo)
        )
    return Path(found)


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's exceptions about ``repo`` into one sentence that says what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: accept its terms on {hub}/{repo}, then log in with `hf auth login` or give a token in HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no directory {repo} here and no model of that name on {hub}: check the name, "
            "or log in with `hf auth login` where the model is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} has no revision {revision}: give --revision a branch, a tag or a whole commit hash of {hub}/{repo}"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # offline, or the hub does not answer, and the cache is incomplete
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{repo} is incomplete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids downloading it: "
                "unset HF_HUB_OFFLINE once"
            ) from error
        raise UserError(f"{hub} cannot be reached for {repo} ({root_cause(error)}): check the network, or give a directory") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            raise UserError(f"{hub} rejects the token for {repo}: log in again with `hf auth login`, or correct HF_TOKEN") from error
        raise UserError(f"{hub} does not provide {repo} ({root_cause(error)}): try again later, or give a directory") from error
    except (OSError, httpx2.HTTPError, RuntimeError) as error:
        raise UserError(
            f"downloading {repo} into {constants.HF_HUB_CACHE} stopped ({root_cause(error)}): check network and disk and repeat the same "
            "command, which resumes the download"
        ) from error


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause of ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")[:REASON]


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hide huggingface_hub's log messages: they concern its progress bars, or an error follows."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def bar_class(bars: Progress, repo: str) -> Any:
    """A tqdm class for huggingface_hub that shows the total bytes as one of ``bars`` and hides its other bars."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            shown = options.get("name") == "huggingface_hub.snapshot_download"
            self.task = bars.add_task(f"download {repo}", total=None) if shown else None
            super().__init__(*arguments, **{**options, "gui": True, "disable": False})  # type: ignore[no-untyped-call]  # gui: tqdm itself prints nothing

        def display(self, *_: Any, **__: Any) -> None:
            if self.task is not None:
                bars.update(self.task, total=self.total or None, completed=self.n)

        def clear(self, *_: Any, **__: Any) -> None:
            """Nothing to clear."""

        def close(self) -> None:
            if not self.disable:
                self.display()
                self.disable = True

    return Bar
