"""llama-server's web page, built by the real npm and used in a real browser: drop a picture, ask a question, read the answer."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp import page, pin
from mbq_gguf.llama_cpp.build import build
from mbq_gguf.llama_cpp.machine import find_tool
from mbq_gguf.llama_cpp.server import Server
from test_server import EVAL
from tiny_pair import write_pair
from workshop_tree import Workshop

WAIT_SECONDS = 60
SCRIPT = "const fs = require('fs'), out = process.env.LLAMA_UI_OUT_DIR; fs.mkdirSync(out); fs.writeFileSync(out + '/index.html', 'a page')"
# A file dropped by a script is what a file dropped by hand is to the page.
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), character => character.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "scene.png", {type: "image/png"}));
const target = document.querySelector("[role=main]");
for (const kind of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
"""


@pytest.fixture
def sources(workshop: Workshop) -> Path:
    """A page of one file, whose package has no dependency: npm needs no network for it."""
    if find_tool("npm") is None:
        pytest.skip("npm is not installed")
    folder = workshop.tree / page.FOLDER
    folder.mkdir(parents=True)
    package: dict[str, Any] = {"name": "tiny", "version": "1.0.0", "scripts": {"build": "node build.cjs"}}
    (folder / "package.json").write_text(json.dumps(package))
    lock = {"name": "tiny", "version": "1.0.0", "lockfileVersion": 3, "packages": {"": {"name": "tiny", "version": "1.0.0"}}}
    (folder / "package-lock.json").write_text(json.dumps(lock))
    (folder / "build.cjs").write_text(SCRIPT)
    return folder


def find(workshop: Workshop, choice: str) -> Path | None:
    return page.find_page(choice, workshop.tree, pin.read_pin(), workshop.console)


def test_the_page_is_built_once_and_lies_where_the_build_looks_for_it(workshop: Workshop, sources: Path) -> None:
    tree = build(source=workshop.tree, console=workshop.console)
    assert (tree / page.RESULT / "index.html").read_text() == "a page"
    assert not (sources / "dist").exists(), "the source is never written to"
    (workshop.patch / "src" / "mbq-answer.h").write_text("#define MBQ_ANSWER 0x2a\n")
    assert build(source=workshop.tree, console=workshop.console) != tree
    assert workshop.printed().count("building the web page") == 1
    without = build(source=workshop.tree, page="off", console=workshop.console)
    assert not (without / page.RESULT).exists()
    assert len(workshop.builds()) == 3, "a build with the page is another than one without"
    assert [path.name for path in (workshop.cache / "pages").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        ("throw new Error('no page today')", "Error: no page today"),
        ("", "it made no index.html"),
    ],
)
def test_one_that_cannot_be_built(workshop: Workshop, sources: Path, break_it: str, says: str) -> None:
    (sources / "build.cjs").write_text(break_it)
    assert find(workshop, "auto") is None
    sentence = workshop.printed().splitlines()[-1]
    assert sentence.startswith("llama-server gets no web page: npm could not build it (")
    assert says in sentence
    assert "run `mbq-gguf build --page on` to try again" in sentence
    before = workshop.printed().count("building the web page")
    assert find(workshop, "auto") is None
    assert workshop.printed().count("building the web page") == before, "auto tries once a day"
    with pytest.raises(UserError, match="npm could not build it"):
        find(workshop, "on")


def test_a_registry_that_does_not_answer(workshop: Workshop, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    lock = json.loads((sources / "package-lock.json").read_text())
    lock["packages"][""]["dependencies"] = {"far": "1.0.0"}
    lock["packages"]["node_modules/far"] = {"version": "1.0.0", "resolved": "http://127.0.0.1:9/far.tgz", "integrity": "sha512-AAAA"}
    (sources / "package-lock.json").write_text(json.dumps(lock))
    package = json.loads((sources / "package.json").read_text()) | {"dependencies": {"far": "1.0.0"}}
    (sources / "package.json").write_text(json.dumps(package))
    tree = build(source=workshop.tree, console=workshop.console)
    assert not (tree / page.RESULT).exists()
    assert "llama-server gets no web page: npm could not build it (" in workshop.printed()
    assert "127.0.0.1:9" in workshop.printed()


@pytest.mark.parametrize(
    ("node", "says"),
    [(None, "node and npm were not found: install node 20.19"), ("v18.20.4", "node v18.20.4 is too old: install node 20.19")],
)
def test_without_a_node_that_is_new_enough(
    workshop: Workshop, sources: Path, monkeypatch: pytest.MonkeyPatch, node: str | None, says: str
) -> None:
    program = workshop.root / "node"
    program.write_text(f"#!/bin/sh\necho {node}\n")
    program.chmod(0o755)
    monkeypatch.setattr(page, "find_tool", lambda name: program if node else None)
    assert find(workshop, "auto") is None
    assert f"llama-server gets no web page: {says}" in workshop.printed()
    with pytest.raises(UserError, match=says.split(":")[0]):
        find(workshop, "on")


@pytest.fixture(scope="module")
def served(built_llama: Path, reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (built_llama / page.RESULT / "index.html").is_file():
        pytest.skip("this llama.cpp was built without the page: mbq-gguf build --page on")
    pair = write_pair(reference_dir, tmp_path_factory.mktemp("served"))
    with Server(*pair, ["--threads", "2", "--ctx-size", "2048", "--temp", "0"], port=8197) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed: apt install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def test_a_picture_is_dropped_and_asked_about(browser: Any, served: Server) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    line = json.loads((EVAL / "eval.jsonl").read_text().splitlines()[0])
    wait = WebDriverWait(browser, WAIT_SECONDS)

    def element(by: str, what: str) -> Any:
        return wait.until(lambda driver: next((found for found in driver.find_elements(by, what) if found.is_displayed()), None))

    browser.get(f"{served.url}/")
    element(By.XPATH, "//button[contains(., 'Enter API Key')]").click()
    element(By.ID, "api-key-input").send_keys(served.key + Keys.ENTER)
    box = element(By.CSS_SELECTOR, "[role=textbox], textarea")
    browser.execute_script(DROP, base64.b64encode((EVAL / line["image"]).read_bytes()).decode())
    element(By.CSS_SELECTOR, "img[src^='data:image'], img[src^='blob:']")
    box.send_keys(line["turns"][0]["question"] + Keys.ENTER)
    answer = element(By.CSS_SELECTOR, "[aria-label='Assistant message with actions']")
    expected = line["turns"][0]["answer"]
    wait.until(lambda driver: expected in answer.text)
    asked = element(By.CSS_SELECTOR, "[aria-label='User message with actions']")
    assert line["turns"][0]["question"] in asked.text
