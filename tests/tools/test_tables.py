"""docs/results.md matches the stored rows: a table edited by hand, or a measured row that was not written, fails here."""

from __future__ import annotations

import json
import statistics

import make_divergence
import make_results
import make_wide
import pytest
import trial_rows
import trial_w4a8


def shown(which: str) -> list[str]:
    """The lines of tables between the markers of one section."""
    page = make_results.PAGE.read_text(encoding="utf-8")
    section = page.partition(f"<!-- {which} table:")[2].partition(f"<!-- end of {which} table")[0]
    return [line for line in section.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("which", ["quality", "divergence", "steps", "wide", "balance", "w4a8"])
def test_the_page_is_the_rows(which: str) -> None:
    divergence = json.loads(make_divergence.STORE.read_text(encoding="utf-8"))
    text = {
        "quality": lambda: make_results.render(make_results.load_rows(make_results.TABLE)),
        "divergence": lambda: make_divergence.render_files(divergence),
        "steps": lambda: make_divergence.render_steps(divergence),
        "wide": lambda: make_wide.render(json.loads(make_wide.STORE.read_text(encoding="utf-8"))),
        "w4a8": lambda: trial_w4a8.render(json.loads(trial_w4a8.STORE.read_text(encoding="utf-8"))),
        "balance": lambda: trial_rows.render(json.loads(trial_rows.STORE.read_text(encoding="utf-8"))),
    }[which]()
    assert shown(which) == [line for line in text.splitlines() if line.startswith("|")]
    assert len(shown(which)) > 2


def test_every_divergence_is_of_the_file_that_its_row_tells_of() -> None:
    rows = json.loads(make_divergence.STORE.read_text(encoding="utf-8"))["rows"]
    finished = make_results.load_rows(make_results.TABLE)
    made = {name: row["made"] for name, row in rows.items() if row["made"]}
    assert {"MBQ3", "MBQ3S", "MBQ3 --seed 1"} <= made.keys()
    for name in made:
        assert made[name] == make_divergence.made_at(finished[name]), name


README_ROWS = {
    ("Q4_0", "mbq-gguf"): "Q4_0 by mbq-gguf",
    ("Q4_0", "llama-quantize, imatrix"): "Q4_0+imatrix",
    ("Q3_K", "mbq-gguf"): "Q3_K by mbq-gguf",
    ("IQ3_S", "llama-quantize, imatrix"): "IQ3_S+imatrix",
    ("Q3_K_M", "llama-quantize, imatrix"): "Q3_K_M+imatrix",
    ("Q4_K_M", "llama-quantize, imatrix"): "Q4_K_M+imatrix",
    ("MBQ3S", "mbq-gguf"): "MBQ3S",
    ("MBQ3", "rounding to nearest"): "MBQ3 rtn nearest",
}


def readme_rows() -> list[list[str]]:
    """The cells of every row of the README's tables, without what makes them bold."""
    page = (make_results.PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    return [[cell.strip().replace("*", "") for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def test_the_readme_shows_stored_rows() -> None:
    rows = json.loads(make_divergence.STORE.read_text(encoding="utf-8"))["rows"]
    shown = {(cells[0].split(" ")[0], cells[1]): cells[2:] for cells in readme_rows()}
    assert README_ROWS.keys() <= shown.keys()
    for key, name in README_ROWS.items():
        scenes, photographs = rows[name]["scenes"], rows[name]["photographs"]
        assert shown[key] == [
            f"{scenes['layer_bits_per_weight']:.2f}",
            f"{scenes['file_bytes'] / 1e6:.1f}",
            f"{scenes['exact_match']:.3f}",
            f"{scenes['divergence']['mean']:.4f}",
            f"{photographs['divergence']['mean']:.2f}",
            f"{scenes['text']['divergence']['mean']:.2f}",
        ], key


SPEEDS = make_results.PAGE.parent / "results"


def end_to_end(name: str) -> dict[str, dict[str, str]]:
    """What llama-bench gave for a 7B's shapes, by type: tokens per second of each test, and "GB" of the file."""
    found: dict[str, dict[str, str]] = {}
    for row in json.loads((SPEEDS / name).read_text(encoding="utf-8"))["end_to_end"]:
        kind = found.setdefault(row["type"], {"GB": f"{row['bytes'] / 1e9:.1f}"})
        kind[row["test"]] = f"{row['tokens_s']:.0f}"
    return found


def test_the_readme_shows_stored_speeds() -> None:
    shown = {cells[0]: cells[1:] for cells in readme_rows() if len(cells) == 4}
    for kind, row in end_to_end("gpu_row_scale.json").items():
        assert shown[kind] == [row["GB"], row["tg128"], row["pp512"]], kind


def test_the_first_table_of_the_page_shows_stored_speeds() -> None:
    before, since = end_to_end("gpu.json"), end_to_end("gpu_row_scale.json")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown("glance")[2:]]
    found = {cells[0]: cells[1:] for cells in rows}
    assert found.keys() == before.keys() | since.keys()
    for kind, cells in found.items():
        old, new = before.get(kind, {}), since.get(kind, {})
        expected = [old.get("tg128"), old.get("pp512"), new.get("tg128"), new.get("pp512"), new.get("pp2048")]
        assert cells == [figure or "-" for figure in expected], kind


def test_the_pages_ratios_of_towers_and_first_tokens_are_those_of_the_rows() -> None:
    """docs/results/tower.json: the tower alone in runs of one size, and the sum with the language model where sizes alternate."""
    towers: dict[int, float] = {}  # median of the rounds' ratios, as bench_tower.py prints it
    both: dict[tuple[str, int], float] = {}
    for run in json.loads((SPEEDS / "tower.json").read_text(encoding="utf-8")):
        seconds = {(row["name"], row["tokens"]): row["seconds"] for row in run["rows"]}
        if "--language" in run["command"]:
            both = {key: statistics.median(times) for key, times in seconds.items()}
        else:
            tokens = run["rows"][0]["tokens"]
            rounds = zip(seconds["F16", tokens], seconds["W8A8", tokens], strict=True)
            towers[tokens] = statistics.median(base / mine for base, mine in rounds)
    page = " ".join(make_results.PAGE.read_text(encoding="utf-8").split())
    assert towers.keys() == {256, 1024}
    for ratio in towers.values():
        assert f"| {ratio:.3f} |" in page
    first = {}
    for tower in ("F16", "W8A8"):
        for tokens in (256, 1024):
            best = min(both[name, tokens] for name in ("7B:F16", "7B:MBQ3S")) + both["F16", tokens]
            first[tower, tokens] = best / (both["7B:W4A8", tokens] + both[tower, tokens])
    assert f"W4A8 is {first['F16', 256]:.2f} times as fast as the best of the others with 256 tokens" in page
    assert f"and {first['F16', 1024]:.2f} times with 1024" in page
    assert f"it is {first['W8A8', 256]:.2f} and {first['W8A8', 1024]:.2f} times as fast" in page
    assert min(towers.values()) >= 1.4, "the README says 1.4 of towers"
    assert 1.45 <= min(first["W8A8", tokens] for tokens in (256, 1024)) <= 1.55, "and 1.5 of the first token"
