"""Several processes share a conversion and write the same bytes for any number of them (2 and 3 here, on the CPU, through gloo)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from forked import Command, free_port, of_several
from mbq_gguf import launch
from mbq_gguf.calibration import batches, sums
from mbq_gguf.calibration.dataset import SHIPPED, Sample, read_jsonl
from mbq_gguf.cli import main
from mbq_gguf.errors import UsageError, UserError
from mbq_gguf.models import load
from mbq_gguf.models.checks import check_finite
from mbq_gguf.parallel import (
    PAGE,
    balanced_map,
    broadcast_from_first,
    even_shares,
    gather_objects,
    gather_pieces,
    own_pieces,
    parallel_map,
    parallel_map_values,
    process_group,
)
from mbq_gguf.quantise import quantise
from mbq_gguf.rounding import cholesky, gptq, inverse
from mbq_gguf.settings import QuantiseSettings
from mbq_gguf.workdir import WorkDir, open_workdir
from safetensors.torch import load_file, save_file

SECONDS = 120  # for one run at most; it takes some 4 where nothing else runs
# Weights by each token's gradient: samples are spread for the sensitivities too.
SETTINGS = QuantiseSettings(token_weights="token", synthetic=2)


def quantised(model: str, out: str, work: str) -> None:
    """Quantise ``model`` in pieces so small that every process has several, and save what the first has to write to ``out``."""
    torch.set_num_threads(1)
    batches.TOKENS, sums.TILE, gptq.ROWS_AT_ONCE = 200, 48, 32
    inverse.COLUMNS_SOLVED["cpu"], cholesky.WIDTH["cpu"] = 24, 12
    samples = [Sample(s.image, s.turns[:1]) for s in read_jsonl(SHIPPED)[:3]]
    with process_group("cpu"):
        kept = open_workdir(Path(work), {"model": "tiny"}) if launch.first() else WorkDir(Path(work), "")
        result = quantise(load(Path(model)), samples, SETTINGS, kept)
    if launch.first():
        save_file(result.tensors, out, {"facts": json.dumps(result.facts)})


@pytest.fixture(scope="module")
def alone(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process has to write."""
    out = tmp_path_factory.mktemp("alone") / "out.safetensors"
    assert Command(out.with_suffix(".log"), tiny_dir, out, out.with_suffix(".work"), work=quantised).wait(SECONDS) == 0
    assert len(load_file(out)) > 20
    return out


def test_two_processes_give_the_same_bytes_and_three_go_on_from_their_first_layer(alone: Path, tiny_dir: Path, tmp_path: Path) -> None:
    for count in (2, 3):
        out, work = tmp_path / f"{count}.safetensors", tmp_path / "work"
        for later in work.glob("layer-000[12].safetensors"):
            later.unlink()
        started = enumerate(of_several(count, free_port()))
        run = [Command(tmp_path / f"{rank}.log", tiny_dir, out, work, variables=variables, work=quantised) for rank, variables in started]
        assert [process.wait(SECONDS) for process in run] == [0] * count
        assert out.read_bytes() == alone.read_bytes()


def heard(folder: str) -> None:
    """Exchange what is short and what is long, then look at weights of which one is spoilt; what came of it is saved by each process."""
    with process_group("cpu"):
        both = [gather_objects(launch.rank()), gather_objects(launch.rank() * "long" * PAGE)]
        try:
            check_finite([Path(folder, "weights.safetensors")])
        except UserError as error:
            both.append([str(error)])
    Path(folder, f"{launch.rank()}.json").write_text(json.dumps(both))


def test_what_one_process_finds_all_hear(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.tensor([1.0, torch.inf]), "c": torch.ones(3)}, tmp_path / "weights.safetensors")
    started = enumerate(of_several(3, free_port()))
    run = [Command(tmp_path / f"{rank}.log", tmp_path, variables=variables, work=heard) for rank, variables in started]
    assert [process.wait(SECONDS) for process in run] == [0, 0, 0]
    for rank in range(3):
        short, long, (sentence,) = json.loads((tmp_path / f"{rank}.json").read_text())
        assert short == [0, 1, 2]
        assert long == [number * "long" * PAGE for number in range(3)]
        assert sentence.startswith(f"the weight b in {tmp_path}/weights.safetensors has NaN or infinite values")


def in_rounds(folder: str) -> None:
    """Spread seven pieces; each process saves what it computed (10 and more) and what it was given, in their order."""
    events: list[int] = []

    def compute(piece: int) -> dict[str, torch.Tensor]:
        events.append(10 + piece)
        return {"square": torch.full((piece,), piece**2)}

    with process_group("cpu"):
        for piece, parts in parallel_map(range(7), compute):
            events.append(piece)
            assert parts["square"].tolist() == piece * [piece**2]
    Path(folder, f"{launch.rank()}.json").write_text(json.dumps(events))


def test_two_rounds_are_on_their_way_while_the_next_is_computed(tmp_path: Path) -> None:
    started = enumerate(of_several(2, free_port()))
    run = [Command(tmp_path / f"{rank}.log", tmp_path, variables=variables, work=in_rounds) for rank, variables in started]
    assert [process.wait(SECONDS) for process in run] == [0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [
        [10, 12, 14, 0, 1, 16, 2, 3, 4, 5, 6],
        [11, 13, 15, 0, 1, 2, 3, 4, 5, 6],
    ]


def completed(folder: str) -> None:
    """Fill the own ones of seven columns, of which no two lie together, and of seven rows, with the number of the process."""
    columns, rows = torch.full((5, 7), -1.0), torch.full((7, 5), -1.0)
    with process_group("cpu"):
        for number in own_pieces(7):
            columns[:, number] = rows[number] = launch.rank()
        gather_pieces([columns[:, number] for number in range(7)])
        gather_pieces(list(rows))
    save_file({"columns": columns, "rows": rows}, Path(folder, f"{launch.rank()}.safetensors"))


def test_each_process_completes_what_the_others_have_computed(tmp_path: Path) -> None:
    started = enumerate(of_several(3, free_port()))
    run = [Command(tmp_path / f"{rank}.log", tmp_path, variables=variables, work=completed) for rank, variables in started]
    assert [process.wait(SECONDS) for process in run] == [0, 0, 0]
    for rank in range(3):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found["columns"].tolist() == [[0, 1, 2, 0, 1, 2, 0]] * 5
        assert found["rows"].tolist() == [[number % 3] * 5 for number in range(7)]


def test_a_single_process_does_all_by_itself() -> None:
    with process_group("cpu"):
        assert [(piece, parts["x"].item()) for piece, parts in parallel_map([2, 3], lambda piece: {"x": torch.tensor(piece**2)})] == [
            (2, 4),
            (3, 9),
        ]
        assert list(parallel_map_values("ab", str.upper)) == ["A", "B"]
        assert broadcast_from_first(lambda: 7) == 7
        assert [(piece, part.item()) for piece, part in balanced_map([1, 9], torch.tensor)] == [(0, 0), (1, 1)]
        assert gather_objects(3) == [3]
        gather_pieces([torch.ones(2)])
        assert list(own_pieces(3)) == [0, 1, 2]
        assert even_shares(5) == [range(5)]


def test_other_commands_are_the_work_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in of_several(2, 1)[0].items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["imatrix", "model", "out.gguf"])
    assert done.exit_code == 2
    assert "imatrix runs in one process: start it without torchrun" in done.output


def test_what_is_wrong_is_the_root_cause_of_the_report_by_torchrun(tiny_dir: Path, tmp_path: Path) -> None:
    """The report is the launcher's last word; what it says itself above it, with a traceback, is not ours to leave out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mbq_gguf", "convert"]
    done = subprocess.run(
        [*command, str(tiny_dir), str(tmp_path / "out.gguf"), "--type", "Q9"], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1
    report, _, cause = done.stderr.partition("Root Cause (first observed failure):")
    assert report.count("error: there is no type Q9: ") == 1
    assert "there is no type Q9: choose one of MBQ3, " in cause


def test_each_process_takes_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.device("cuda:1") == "cuda:1"
    for name, value in of_several(4, 1)[2].items():
        monkeypatch.setenv(name, value)
    assert (launch.count(), launch.rank(), launch.first()) == (4, 2, False)
    assert launch.device("cuda") == "cuda:2"
    assert launch.device("cpu") == "cpu"
    with pytest.raises(UsageError, match="several processes cannot share cuda:1, each uses its own GPU: give --device cuda"):
        launch.device("cuda:1")
