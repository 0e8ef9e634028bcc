"""Every page can be reached from the README, every link between pages has a target, and every metadata key is explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mbq_gguf.allocation.plan import Plan
from mbq_gguf.export import metadata

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ggml_patch" / "README.md"])


def links(page: Path) -> set[tuple[Path, str]]:
    """The files and headings that ``page`` links to; other sites' are left out."""
    found = set()
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        address = urlparse(target)
        if not address.scheme:
            found.add(((page.parent / address.path).resolve() if address.path else page, address.fragment))
    return found


def headings(page: Path) -> set[str]:
    """The anchors of ``page`` as GitHub makes them: lower case, without punctuation, a hyphen for each space."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target.name}#{anchor}"
        for page in PAGES
        for target, anchor in sorted(links(page))
        if not target.exists() or (anchor and anchor not in headings(target))
    ]
    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [target for target, _ in links(page) if target.suffix == ".md"]
    assert set(PAGES) <= reached


def test_every_key_that_says_how_a_file_was_made_is_explained() -> None:
    about: dict[str, Any] = {"type_name": "MBQ3S", "method": "mbq", "rounding": "gptq", "fingerprint": "", "samples": 1, "synthetic": 0}
    keys = metadata.describe(**about, ratios={"attention": [1.0], "mlp": [1.0]}, token_weights="uniform")
    keys |= metadata.gptq(clip=True, propagate_error=True, error_correction=0.5, refits=2, learn_scales=0)
    keys |= metadata.allocated(Plan({"a": "MBQ3S"}, {"a": 52}, {"a": 128}, {"a": 0.0}), {})
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert not [key for key in keys if key.startswith(metadata.PREFIX) and f"`{key}`" not in page]
