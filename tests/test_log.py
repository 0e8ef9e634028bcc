"""docs/log.md: the heading of each entry is a date, what was tried, and the verdict."""

from __future__ import annotations

import re
from pathlib import Path

LOG = Path(__file__).parents[1] / "docs" / "log.md"


def test_each_heading_has_its_verdict() -> None:
    headings = [line for line in LOG.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert headings
    assert [line for line in headings if not re.fullmatch(r"## \d{4}-\d\d-\d\d: .+: \S.*", line)] == []
