"""The pages of lens and similarity in a browser: cells, what is said of them, several models, hostile tokens."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from browsing import HOSTILE, Browser
from conftest import MANNEQUIN
from selenium.webdriver.support.ui import Select

from tensorsurgeon.cli import main

TEXTS = ["What is 14 plus 50?", "كم يساوي 14 زائد 50؟"]
UNSEEN = "\u202egnp.\x07\x85\ufeff"
"""Characters that turn the text behind them, ring, break lines, or are nothing at all."""
CELLS = "#lens-tokens"
HEAT = f"document.querySelector('{CELLS}').data[0]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts, and with the mannequin whose tokens are hostile."""
    directory = tmp_path_factory.mktemp("pages")
    (directory / "prompts.txt").write_text("\n".join(TEXTS))
    (directory / "hostile.txt").write_text(f"What is 14 plus 50?\n{HOSTILE}What{UNSEEN}is 14")
    shutil.copytree(MANNEQUIN / "bf16", directory / "model")
    named = json.loads((directory / "model" / "tokenizer.json").read_text())
    for token in named["added_tokens"]:
        token["content"] = {"<|im_end|>": HOSTILE, "<|im_start|>": UNSEEN}.get(token["content"], token["content"])
    (directory / "model" / "tokenizer.json").write_text(json.dumps(named))
    return directory


@pytest.fixture(scope="module")
def pages(place: Path) -> dict[str, Path]:
    mannequin, prompts = str(MANNEQUIN / "bf16"), str(place / "prompts.txt")
    asked = {
        "lens": ["lens", mannequin, prompts, "--beside", str(MANNEQUIN / "tuned"), "--words", "Yes"],
        "hostile": ["lens", str(place / "model"), str(place / "hostile.txt")],
        "similarity": ["similarity", mannequin, prompts],
    }
    for name, words in asked.items():
        assert main([*words, "--html", str(place / f"{name}.html"), "--csv", str(place / name)]) == 0
    return {name: place / f"{name}.html" for name in asked}


@pytest.fixture(scope="module")
def told(place: Path) -> dict[str, Any]:
    """Return what lens tells of both models as JSON, by another run."""
    words = ["lens", str(MANNEQUIN / "bf16"), str(place / "prompts.txt"), "--beside", str(MANNEQUIN / "tuned")]
    with redirect_stdout(StringIO()) as written:
        assert main([*words, "--words", "Yes", "--json"]) == 0
    return dict(json.loads(written.getvalue()))


def lens_rows(told: dict[str, Any], model: str, prompt: int) -> list[list[dict[str, Any]]]:
    """Return what is told of a prompt, depth by depth."""
    rows = [it for it in told["lens"] if (it["model"], it["prompt"]) == (model, prompt)]
    depths = sorted({it["depth"] for it in rows})
    return [[it for it in rows if it["depth"] == depth] for depth in depths]


def chart(browser: Browser, title: str, field: str) -> list[Any]:
    """Return what the traces of a chart hold, but for crosses."""
    node = f"document.querySelector('#charts section[aria-label=\"{title}\"] .panels [role=img]')"
    return list(browser.run(f"{node}.data.filter((it) => it.name !== 'no number').map((it) => it.{field})"))


def test_they_render_without_network_or_error(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.driver.get_log("browser")
        browser.open(page)
        assert browser.driver.get_log("browser") == []
        requests = browser.run("performance.getEntriesByType('resource').map((it) => it.name)")
        assert [name for name in requests if not name.startswith(("data:", "blob:"))] == []


def test_every_cell_is_drawn_with_its_token(browser: Browser, pages: dict[str, Path], told: dict[str, Any]) -> None:
    browser.open(pages["lens"])
    rows = lens_rows(told, "bf16", 1)
    assert browser.run(f"{HEAT}.z") == [[pytest.approx(it["bits"]) for it in line] for line in rows]
    drawn = [it.text for it in browser.find(f"{CELLS} .annotation-text")]
    assert len(drawn) == sum(map(len, rows))
    assert drawn[: len(rows[0])] == [it["top"].replace(" ", "␣").replace("<|endoftext|>", "<|endof…") for it in rows[0]]
    heads = [it.text for it in browser.find(f"{CELLS} .xtick")]
    assert heads == [it["token"].replace(" ", "␣") for it in rows[0]]


def test_hovering_tells_the_most_probable_tokens(
    browser: Browser, pages: dict[str, Path], told: dict[str, Any]
) -> None:
    browser.open(pages["lens"])
    row = lens_rows(told, "bf16", 1)[5][4]
    said = browser.hover(5, 4, CELLS)
    assert f"after 5 layers, at 4 “\u2068{row['token']}\u2069”" in said
    for token, share in zip(row["top tokens"], row["probabilities"], strict=True):
        assert f"{100 * share:.1f} % \u2068{token.replace(' ', '␣')}\u2069" in said.replace("  ", " ")
    assert "bits, final token: rank" in said


def test_several_models_are_compared(browser: Browser, pages: dict[str, Path], told: dict[str, Any]) -> None:
    browser.open(pages["lens"])
    prompts, statistics = (Select(browser.find(f"#lens-{it}")[0]) for it in ("prompt", "statistic"))
    assert [it.text.split(":")[0] for it in prompts.options] == [
        f"{model}, prompt {number}" for model in ("bf16", "tuned") for number in (1, 2)
    ]
    assert TEXTS[1] in prompts.options[3].text
    prompts.select_by_index(3)
    statistics.select_by_visible_text("p(Yes)")
    rows = lens_rows(told, "tuned", 2)
    browser.wait(lambda: len(browser.run(f"{HEAT}.z")[0]) == len(rows[0]))
    assert browser.run(f"{HEAT}.z") == [[pytest.approx(it["p(Yes)"]) for it in line] for line in rows]
    assert chart(browser, "By depth", "name") == ["bf16", "tuned"]
    for measure, column in (("entropy, bits", "bits"), ("share of positions that have settled", "settled")):
        Select(browser.find("#charts select")[0]).select_by_visible_text(measure)
        for model, drawn in zip(("bf16", "tuned"), chart(browser, "By depth", "y"), strict=True):
            assert drawn == [pytest.approx(it[column]) for it in told["depths"] if it["model"] == model]
    settled = chart(browser, "By depth", "hovertext")[1][-1]
    assert settled == "tuned, after 6 layers: share of positions that have settled 1"


def test_hostile_tokens_stay_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])
    last = browser.run(f"{HEAT}.z[6].length") - 1
    assert HOSTILE in browser.hover(6, last, CELLS)
    Select(browser.find("#lens-prompt")[0]).select_by_index(1)
    assert HOSTILE in browser.hover(3, 0, CELLS)
    assert "“\u2068·gnp.···\u2069”" in browser.hover(3, 2, CELLS)
    shown = browser.run(f"document.querySelector('{CELLS}').textContent")
    assert not {*UNSEEN} - {*"gnp."} & {*shown}
    assert browser.run("window.hacked") is None
    assert browser.find("img[src=x]") == []


def test_similarity_draws_layers_and_blocks(browser: Browser, pages: dict[str, Path], place: Path) -> None:
    with open(place / "similarity" / "blocks.csv", encoding="utf-8", newline="") as file:
        blocks = {(int(it["removes"]), int(it["first"])): it for it in csv.DictReader(file)}
    with open(place / "similarity" / "layers.csv", encoding="utf-8", newline="") as file:
        layers = list(csv.DictReader(file))
    browser.open(pages["similarity"])
    assert chart(browser, "By layer", "y") == [[pytest.approx(float(it["influence"])) for it in layers]]
    cells, _ = chart(browser, "By block of layers", "z")
    assert cells == [
        [pytest.approx(float(blocks[size, first]["angular distance"])) if (size, first) in blocks else None
         for first in range(6)] for size in range(1, 7)
    ]  # fmt: skip
    plot = '#charts section[aria-label="By block of layers"] [role=img]'
    distance = float(blocks[3, 2]["angular distance"])
    assert browser.hover(2, 2, plot) == f"layers 2-4: angular distance {distance:.4g}"
    assert not browser.find("#map")[0].is_displayed()


def test_they_fit_a_narrow_window_and_dark_colours(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page, width=400, scheme="dark")
        assert browser.run("document.documentElement.scrollWidth") <= 400
    browser.open(pages["lens"], scheme="dark")
    font = f"document.querySelector('{CELLS}').layout.font.color"
    assert browser.run(font) == "rgb(228, 230, 233)"
    browser.find("#theme")[0].click()
    browser.wait(lambda: browser.run(font) == "rgb(29, 33, 38)")


def test_every_control_has_a_name(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page)
        for it in browser.find("button, select, input, [tabindex='0'], [role=img]"):
            assert it.accessible_name or not it.is_displayed(), it.get_attribute("outerHTML")
