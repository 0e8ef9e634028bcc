"""``convert --dry-run``: exact file sizes, early failures, and nothing written."""

from __future__ import annotations

from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.convert import ConvertOptions, convert
from mbq_gguf.cost import CARD, CPU_SPEED, Rates, Site, Speed, Work, layer_seconds, rates_at, stage_seconds
from mbq_gguf.dry_run import dry_run, expected_seconds
from mbq_gguf.errors import UserError
from mbq_gguf.memory_estimate import Memory, estimate_memory, suggest_options
from rich.console import Console

NEAREST = {"method": "rtn", "rounding": "nearest"}
GPTQ = {"samples": 2, "synthetic": 0}


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "BF16"},
        {**NEAREST, "type": "MBQ3S", "mmproj_type": "Q8_0"},
        {**NEAREST, "type": "W4A8", "embedding_type": "F16", "mmproj_type": "W4A8"},
        {**NEAREST, "type": "Q4_0", "rotate": "full"},
        {**GPTQ, "type": "BF16", "mmproj_type": "W8A8"},
        {**GPTQ, "method": "awq", "target_bpw": 4.5},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_expected_sizes_are_the_files(settings: dict[str, Any], built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    options = ConvertOptions(tiny_dir, tmp_path / "out.gguf", **settings)
    console = Console(file=StringIO(), width=140)
    expected = dry_run(options, console)
    assert list(tmp_path.iterdir()) == []
    report = convert(options, console)
    for size, path in ((expected.text_bytes, report.out), (expected.mmproj_bytes, report.mmproj)):
        assert size == pytest.approx(path.stat().st_size, rel=0.01), path.name
    if "target_bpw" not in settings:
        types = [
            [(record.name, record.type_name, record.nbytes) for record in records] for records in (report.tensors, expected.report.tensors)
        ]
        assert types[0] == types[1]


def test_it_tells_files_memory_and_time(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=140)
    console.print(dry_run(ConvertOptions(tiny_dir, tmp_path / "out.gguf", **GPTQ), console).render())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("MBQ3S_64", "mmproj-out.gguf", "of memory and", "nothing was written"):
        assert part in said


def test_a_bad_calibration_set_is_found(built_llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "nowhere.png", "turns": [{"question": "What?", "answer": "A box."}]}\n')
    with pytest.raises(UserError, match=r"nowhere\.png"):
        dry_run(ConvertOptions(tiny_dir, tmp_path / "out.gguf", calib=bad), Console(file=StringIO()))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="has no image in it"):
        dry_run(ConvertOptions(tiny_dir, tmp_path / "out.gguf", calib=tmp_path / "folder"), Console(file=StringIO()))


WORK = Work(
    layers=[[Site(576, 960), Site(576, 576), Site(576, 3072), Site(1536, 576)]] * 30,
    ends=28_000_000,
    tower=10_000_000,
    vocabulary=49152,
    width=576,
    checkpoint=290_000_000,
    files=112_000_000,
    streams=216,
    tokens=39_000,
    texts=80,
)


def test_time_grows_with_tokens_weights_and_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbq_gguf.dry_run.measure_speed", lambda: CPU_SPEED)
    plain, searched = (ConvertOptions(tmp_path, tmp_path / "out.gguf", method=method) for method in ("rtn", "mbq"))  # type: ignore[arg-type]
    twice = replace(WORK, layers=[*WORK.layers, *WORK.layers])
    seconds = expected_seconds(plain, WORK)
    assert seconds < expected_seconds(plain, replace(WORK, tokens=2 * WORK.tokens)) < 2 * seconds
    assert 1.5 * seconds < expected_seconds(plain, twice) < 2 * seconds
    assert expected_seconds(searched, WORK) > 2 * seconds
    for speed, low, high in (
        (Speed(CPU_SPEED.products / 2, CPU_SPEED.small / 2, 1), 1.99, 2.01),
        (Speed(CPU_SPEED.products / 2, CPU_SPEED.small, 1), 1.2, 1.8),
        (Speed(CPU_SPEED.products, CPU_SPEED.small / 2, 1), 1.2, 1.8),
        (Speed(CPU_SPEED.products * 2, CPU_SPEED.small, 2), 0.5, 0.6),  # the second thread: all but what one does alone
    ):
        monkeypatch.setattr("mbq_gguf.dry_run.measure_speed", lambda speed=speed: speed)
        assert low * seconds < expected_seconds(plain, WORK) < high * seconds


GB = 10**9
SEVEN = [Site(3584, 4608), Site(3584, 3584), Site(3584, 37888), Site(18944, 3584)]
SEVEN_B = Work(
    [SEVEN] * 28,
    ends=2 * 152064 * 3584,
    tower=675_000_000,
    vocabulary=152064,
    width=3584,
    checkpoint=16_600_000_000,
    files=5_500_000_000,
    streams=216,
    tokens=39_000,
    texts=80,
)


# A 7B's shapes on H200s with default options, 2026-11-29 and -30 (docs/log.md): layers, GPUs, seconds by stage, with startup and checks in
# "load". The run of 28 layers took 111 s, 12 of which were compiling.
CARDS = [
    (28, 1, {"load": 17, "capture": 11, "texts": 16, "layers": 28 * 1.50, "write": 15}),
    (8, 1, {"load": 19, "capture": 10, "texts": 7.0, "layers": 8 * 1.54, "write": 10.5}),
    (8, 2, {"load": 19, "capture": 7, "texts": 7.0, "layers": 8 * 0.863, "write": 10.5}),
]


@pytest.mark.parametrize(("layers", "cards", "seconds"), CARDS)
def test_a_card_is_foretold_within_a_third(layers: int, cards: int, seconds: dict[str, float]) -> None:
    work = of_layers(layers)
    found = stage_seconds(work, CARD, processes=cards)
    assert {stage: found[stage] for stage in seconds} == pytest.approx(seconds, rel=1 / 3)
    assert found["layers"] == pytest.approx(seconds["layers"], rel=1 / 20)
    assert layers < 28 or sum(found.values()) == pytest.approx(111 - 12, rel=1 / 5)


def experts(width: int, inner: int) -> list[Site]:
    """128 experts, of which a token chooses 8, and a first site that is none."""
    share, least = 8 / 128, 4 * width
    return [Site(width, 5120)] + 128 * [Site(width, 2 * inner, share, 128, least), Site(inner, width, share, 128, least)]


@pytest.mark.parametrize(
    ("rates", "layer", "batches", "seconds"),
    [
        (CARD, experts(2048, 768), 8, 4.6),  # Qwen3-VL-30B-A3B's shapes on an H200
        (rates_at(CPU_SPEED, True), experts(64, 64), 10, 3.9),  # one thread of machine A, where nearly all is overhead
    ],
)
def test_a_layer_of_experts_is_foretold_within_a_third(rates: Rates, layer: list[Site], batches: int, seconds: float) -> None:
    """96 samples of 200 tokens, 2026-11-30 (docs/log.md)."""
    work = Work([], 0, 0, 0, layer[0].columns, 0, 0, streams=96, tokens=19200, texts=0, batches=batches)
    assert layer_seconds(work, layer, rates) == pytest.approx(seconds, rel=1 / 3)


def test_two_cards_gain_less_with_experts() -> None:
    """A layer of 128 experts took one H200 5.5 s and two 4.4, on a slower host than above."""
    layer = experts(2048, 768)
    work = Work([layer], 0, 0, 0, 2048, 0, 0, streams=96, tokens=19200, texts=0, batches=8)
    one, two = (stage_seconds(work, CARD, processes=count)["layers"] for count in (1, 2))
    assert two / one == pytest.approx(4.4 / 5.5, rel=1 / 10)


def test_memory_of_a_card_is_foretold_within_a_third() -> None:
    """A whole 7B took 20.8 GiB of an H200 and 6.0 of the host (docs/results.md)."""
    found = [bytes_ / 2**30 for bytes_ in estimate_memory(of_layers(28), "cuda")[:2]]
    assert found == pytest.approx([6.0, 20.8], rel=1 / 3)


def of_layers(layers: int) -> Work:
    checkpoint, files = 4_700 + 466 * (layers - 2), 2_700 + 100 * layers
    return replace(SEVEN_B, layers=[SEVEN] * layers, checkpoint=checkpoint * 10**6, files=files * 10**6, tokens=35_269)


@pytest.mark.parametrize(
    ("layers", "device", "free", "way"),
    [
        (28, "cuda", Memory(64 * GB, 140 * GB), ""),
        (28, "cuda", Memory(64 * GB, 16 * GB), ""),  # rounding takes 13
        (28, "cuda", Memory(64 * GB, 12 * GB), "--device cpu"),
        (28, "cuda", Memory(7 * GB, 12 * GB), "--rounding nearest"),
        (28, "cuda", Memory(4 * GB, 6 * GB), None),
        (200, "cuda", Memory(20 * GB, 24 * GB), "--synthetic 0"),  # 23 for the layers in 4 bits
        (28, "cpu", Memory(64 * GB, 0), ""),
        (28, "cpu", Memory(16 * GB, 0), "--rounding nearest"),
    ],
)
def test_the_options_with_which_a_model_finds_room(layers: int, device: str, free: Memory, way: str | None) -> None:
    """Shapes of a 7B, and of one with more layers."""
    assert suggest_options(replace(SEVEN_B, layers=[SEVEN] * layers), device, free, 0.7 * free.host) == way


def test_activations_beyond_the_share_of_the_host_are_the_disks() -> None:
    no_texts = replace(SEVEN_B, texts=0)  # they would be written in 32 bits where memory is endless
    whole = estimate_memory(no_texts, "cpu")
    less = estimate_memory(no_texts, "cpu", share=12 * GB)
    assert whole.disk == 0
    assert less.disk > 1 * GB
    assert less.host < whole.host
    assert estimate_memory(no_texts, "cpu", share=0).disk > less.disk


def test_more_than_is_free_is_said_with_the_way_out(
    built_llama: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConvertOptions(tiny_dir, tmp_path / "out.gguf", samples=2)
    assert dry_run(options, Console(file=StringIO())).too_large == ""
    monkeypatch.setattr("mbq_gguf.dry_run.available", lambda _: 0)
    monkeypatch.setattr("mbq_gguf.dry_run.process_bytes", lambda: 900_000_000)
    console = Console(file=StringIO(), width=200)
    console.print(dry_run(options, console).render())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "GB of memory are needed and 900.0 MB are free: end other programs, or use a machine with more" in said


def test_several_processes_share_the_host(built_llama: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each needs 1.2 GB. Of 0.9 GB that one has and 0.8 that are free, one may take all, each of four 0.2 more than it has."""
    options = ConvertOptions(tiny_dir, tmp_path / "out.gguf", samples=2)
    monkeypatch.setattr("mbq_gguf.dry_run.available", lambda _: 800_000_000)
    monkeypatch.setattr("mbq_gguf.dry_run.process_bytes", lambda: 900_000_000)
    assert dry_run(options, Console(file=StringIO())).too_large == ""
    for name, value in {"TORCHELASTIC_RUN_ID": "here", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    console = Console(file=StringIO(), width=200)
    console.print(dry_run(options, console).render())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "of memory for each of 4 processes and" in said
    assert "are needed and 1.10 GB are free" in said


def sites(width: int, heads: int, kv_heads: int, ffn: int) -> list[Site]:
    rows = width + 2 * kv_heads * width // heads
    return [Site(width, rows), Site(width, width), Site(width, 2 * ffn), Site(ffn, width)]


# Machine A with two threads, beside little other work. Machine B with one, by processor time: its small operations were not measured, and
# 0.45 of machine A's are fitted to its rows.
A = Speed(2 * CPU_SPEED.products, CPU_SPEED.small, 2)
B = Speed(48e9, 0.45 * CPU_SPEED.small, 1)
MEASURED = [  # speed, layers, sites, samples' streams, tokens of samples, texts, seconds of capture, texts and layers
    (B, 1, sites(576, 9, 3, 1536), 24, 4788, 16, (7.7, 12.3, 12.3)),
    (B, 1, sites(1024, 8, 2, 2816), 24, 4788, 16, (6.6, 19.8, 37.5)),
    (B, 2, sites(768, 12, 4, 2048), 48, 9726, 24, (12.4, 22.0, 46.3)),
    (B, 30, sites(576, 9, 3, 1536), 96, 20727, 80, (32.0, 120.3, 30 * 26.0)),  # the reference VLM; two of its layers took 52 s
    (A, 30, sites(576, 9, 3, 1536), 96, 16930, 80, (11.1, 22.0, 30 * 5.7)),  # 38 steps of its texts and four of its layers
]


@pytest.mark.parametrize(("speed", "layers", "layer", "samples", "tokens", "texts", "seconds"), MEASURED)
def test_a_cpu_is_foretold_within_a_third(
    speed: Speed, layers: int, layer: list[Site], samples: int, tokens: int, texts: int, seconds: tuple[float, ...]
) -> None:
    """Each stage, and the sum within a quarter (docs/log.md)."""
    made = texts // 2
    work = Work(
        [layer] * layers,
        ends=0,
        tower=10_100_000,
        vocabulary=49152,
        width=layer[0].columns,
        checkpoint=0,
        files=0,
        streams=samples + texts + made,
        tokens=round(tokens * (1 + made / samples)) + 128 * texts,
        texts=texts,
    )
    found = stage_seconds(work, rates_at(speed))
    stages = [found[stage] for stage in ("capture", "texts", "layers")]
    assert stages == pytest.approx(seconds, rel=1 / 3)
    assert sum(stages) == pytest.approx(sum(seconds), rel=1 / 4)


@pytest.mark.parametrize(("compiled", "seconds"), [(False, 1.44), (True, 0.72)])
def test_rounding_is_foretold_as_it_is_done(compiled: bool, seconds: float) -> None:
    """A layer of the reference VLM, one thread of machine A beside other work, in PyTorch's operations and compiled."""
    rates = rates_at(CPU_SPEED, compiled)
    alone = Rates(**dict.fromkeys(asdict(rates), 0.0) | {"rounded": rates.rounded, "product": rates.product})
    work = Work([], ends=0, tower=0, vocabulary=0, width=576, checkpoint=0, files=0, streams=0, tokens=0, texts=0)
    assert layer_seconds(work, sites(576, 9, 3, 1536), alone) == pytest.approx(seconds, rel=1 / 6)
