"""tools/trial_tower.py: ``convert`` accepts the options of every row, and no two rows write the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import trial_tower
from mbq_gguf.preflight import check_inputs


@pytest.mark.parametrize("row", trial_tower.ROWS, ids=str)
def test_every_row_can_be_made(row: trial_tower.Row, tiny_dir: Path, tmp_path: Path) -> None:
    check_inputs(trial_tower.options_of(tiny_dir, tmp_path, row, 2))


def test_every_row_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = [trial_tower.options_of(tmp_path, tmp_path, row, 2).mmproj for row in trial_tower.ROWS]
    assert len(set(files)) == len(files)
