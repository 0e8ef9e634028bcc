"""The common reader of sets: three shapes, line ends, byte order marks, and errors with file and line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.calibration.dataset import read_jsonl
from mbq_gguf.conversations import Scene, Turn, read_scenes
from mbq_gguf.errors import UsageError
from mbq_gguf.evaluate.exact_match import load_questions
from PIL import Image

OURS = {"image": "cat.png", "turns": [{"question": "What?", "answer": "A cat."}, {"question": "Where?", "answer": "Here."}]}
LLAVA = {
    "id": 7,
    "image": "cat.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Here."},
    ],
}


def openai(picture: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Here."},
        ]
    }


SHAPES = [
    OURS,
    LLAVA,
    openai({"type": "image_url", "image_url": {"url": "cat.png"}}),
    openai({"type": "image", "image": "cat.png"}),
    openai({"type": "image"}) | {"images": ["cat.png"]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    return tmp_path


def write(folder: Path, *lines: object, end: str = "\n", mark: bytes = b"") -> Path:
    path = folder / "set.jsonl"
    path.write_bytes(mark + "".join(json.dumps(line, ensure_ascii=False) + end for line in lines).encode())
    return path


@pytest.mark.parametrize("line", SHAPES, ids=["ours", "llava", "openai url", "openai path", "openai images"])
def test_shapes(line: object, folder: Path) -> None:
    wanted = (Turn(question="What?", answer="A cat."), Turn(question="Where?", answer="Here."))
    path = write(folder, line)
    assert read_scenes(path) == [Scene(folder / "cat.png", wanted)]
    (sample,) = read_jsonl(path)  # what convert and imatrix read
    assert sample.turns == tuple((q.question, q.expected) for q in load_questions(path)) == (("What?", "A cat."), ("Where?", "Here."))


def test_a_picture_in_the_line(folder: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode((folder / "cat.png").read_bytes()).decode()
    (scene,) = read_scenes(write(folder, openai({"type": "image_url", "image_url": {"url": url}})))
    assert scene.image.read_bytes() == (folder / "cat.png").read_bytes()


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array(indent: int | None, folder: Path) -> None:
    """As LLaVA's sets are published, in one line or many."""
    path = folder / "set.json"
    path.write_text(json.dumps(SHAPES, indent=indent))
    scenes = read_scenes(path)
    assert [scene.place for scene in scenes] == [f"{path}, item {number}" for number in range(1, len(SHAPES) + 1)]
    assert all(scene.turns == scenes[0].turns for scene in scenes)
    path.write_text(json.dumps([OURS, OURS | {"image": "dog.png"}], indent=indent))
    with pytest.raises(UsageError, match=r"set\.json, item 2: .*dog\.png cannot be read .*: correct or remove the item"):
        read_scenes(path)


@pytest.mark.parametrize("text", ["[1]\n[2]", '[{"image"', "[" * 100000], ids=["lines of arrays", "cut", "deep"])
def test_an_array_that_is_none(text: str, folder: Path) -> None:
    path = folder / "set.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"set\.json cannot be read as a JSON array"):
        read_scenes(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"], ids=["unix", "windows", "old mac", "empty lines"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["bare", "byte order mark"])
def test_line_ends(end: str, mark: bytes, folder: Path) -> None:
    odd = {"image": "cat.png", "turns": [{"question": "What?", "answer": "one\u2028two\u0085"}]}
    scenes = read_scenes(write(folder, odd, OURS, end=end, mark=mark))
    assert [len(scene.turns) for scene in scenes] == [1, 2]
    assert scenes[0].turns[0].answer == "one\u2028two\u0085"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("text", "line 2"),
        ({"image": "cat.png"}, "turns: Field required"),
        ({"image": "cat.png", "turns": []}, "turns: List should have at least 1 item"),
        ({"image": "cat.png", "turns": [{"question": "What?", "answer": None}]}, "a question has no answer"),
        ({"image": "cat.png", "turns": [{"question": "What?", "answer": ""}]}, "answer: String should have at least 1"),
        ({"image": "cat.png", "turns": [{"question": "What?", "anwser": "A cat."}]}, "anwser: Extra inputs"),
        ({"image": "cat.png", "turns": [{"question": 3, "answer": "A cat."}]}, "question: Input should be a valid string"),
        (OURS | {"image": "dog.png"}, "dog.png cannot be read (there is no such file)"),
        (OURS | {"image": "a" * 3000 + ".png"}, "cannot be read (file name too long)"),
        ({"conversations": LLAVA["conversations"]}, "it has 0 pictures"),
        (LLAVA | {"image": ["cat.png", "cat.png"]}, "it has 2 pictures"),
        (LLAVA | {"conversations": [{"from": "gpt", "value": "Hello"}]}, "'gpt' is out of turn"),
        (LLAVA | {"conversations": [{"from": "human", "value": "What?"}]}, "a question has no answer"),
        (openai({"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}), "is a URL"),
        (openai({"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}), "line 2"),
        (
            {"messages": [{"role": "user", "content": "What?"}, {"role": "tool", "content": "x"}], "image": "cat.png"},
            "'tool' is out of turn",
        ),
    ],
)
def test_faults_have_file_and_line(line: object, words: str, folder: Path) -> None:
    path = write(folder, OURS, line)
    for read in (read_scenes, read_jsonl, load_questions):
        with pytest.raises(UsageError) as caught:
            read(path)  # type: ignore[operator]
        assert str(caught.value).startswith(f"{path}, line 2")
        assert words in str(caught.value)


def test_a_lone_surrogate(folder: Path) -> None:
    path = folder / "set.jsonl"
    path.write_text('{"image": "cat.png", "turns": [{"question": "\\ud800?", "answer": "A cat."}]}')
    with pytest.raises(UsageError, match="line 1: Invalid JSON: "):
        read_scenes(path)


def test_other_encodings(folder: Path) -> None:
    path = folder / "set.jsonl"
    path.write_bytes(json.dumps(OURS).encode("utf-16"))
    with pytest.raises(UsageError, match=r"set\.jsonl, line 1 is not valid UTF-8: "):
        read_scenes(path)


def test_questions_alone(folder: Path) -> None:
    path = write(folder, {"image": "cat.png", "turns": [{"question": "What?", "answer": None}]})
    assert load_questions(path, unanswered=True)[0].expected == ""
