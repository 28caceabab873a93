"""The page of a study in a browser: charts that can be read, measures that can be chosen, answers side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import swept
from browsing import HOSTILE, Browser
from selenium.webdriver.support.ui import Select
from swept import probe, question, text, write_study

from tensorsurgeon.cli import main
from tensorsurgeon.evaluate.result_tables import VARIANTS

LEVELS = {"v0": 0.0, "v1": 0.5, "v2": 1.0, "v3": 2.0}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The mannequin without layers, and studies made by hand: noise, numbers that are none, hostile text, nothing."""
    directory = tmp_path_factory.mktemp("studies")
    noise = [
        text(it, 2.0 + 10 * level + repetition * level, repetition, level_value=level, degradation_method="noise",
             param_group_name="mlp") for it, level in enumerate(LEVELS.values()) for repetition in (0, 1)
    ]  # fmt: skip
    hostile = {"prompt_id": HOSTILE, "prompt_group": HOSTILE, "prompt_text": HOSTILE}
    told = [
        text(0, 2.0, prompt_id=HOSTILE), text(1, 4.0, prompt_id=HOSTILE),
        probe(0, None, mass={HOSTILE: 0.5}), probe(1, 0.1, mass={HOSTILE: 0.5}),
        question(0, True, output=HOSTILE, **hostile), question(1, False, output="<b>", **hostile),
    ]  # fmt: skip
    names = [{"name": it, "values": {}} for it in (HOSTILE, "v1")]
    hostile_records = [{**it, "variant": HOSTILE if it["variant"] == "v0" else "v1"} for it in told]
    return {
        "layers": swept.layers(directory / "layers", delete=[(1, 0), (1, 2), (1, 3), (2, 2), (2, 3)]),
        "noise": write_study(directory / "noise", *noise, variants=4, repeats=2),
        "broken": write_study(directory / "broken", text(0, 2.0), text(1, None), text(2, 3.0)),
        "hostile": hostile_study(directory / "hostile", names, hostile_records),
        "empty": write_study(directory / "empty"),
    }  # fmt: skip


def hostile_study(directory: Path, variants: list[dict[str, Any]], records: list[dict[str, Any]]) -> Path:
    write_study(directory, *records)
    study = json.loads((directory / "study.json").read_text())
    changes = {"name": HOSTILE, "about": HOSTILE, "variants": variants, "baseline": HOSTILE}
    (directory / "study.json").write_text(json.dumps({**study, **changes}))
    return directory


@pytest.fixture(scope="module")
def pages(studies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    for name, place in studies.items():
        status = main(["report", str(place), "--html", str(directory / f"{name}.html")])
        assert status == (3 if name == "broken" else 0)
    return {name: directory / f"{name}.html" for name in studies}


def told(studies: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what the command tells of a study as JSON."""
    main(["report", str(studies[name]), "--json"])
    return dict(json.loads(capsys.readouterr().out))


def drawn(browser: Browser, title: str, field: str, panel: int = 0) -> list[Any]:
    """Return what the traces of a panel hold, but for crosses."""
    node = f"document.querySelectorAll('#charts section[aria-label=\"{title}\"] .panels [role=img]')[{panel}]"
    return list(browser.run(f"{node}.data.filter((it) => it.name !== 'no number').map((it) => it.{field})"))


def control(browser: Browser, title: str, kind: str) -> Any:
    return browser.find(f'#charts section[aria-label="{title}"] {kind}')[0]


def test_it_renders_without_network_or_error(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.driver.get_log("browser")
        browser.open(page)
        assert browser.driver.get_log("browser") == []
        requests = browser.run("performance.getEntriesByType('resource').map((it) => it.name)")
        assert [name for name in requests if not name.startswith(("data:", "blob:"))] == []


def test_a_stranger_reads_what_was_found(
    browser: Browser, pages: dict[str, Path], studies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    findings = told(studies, "layers", capsys)
    browser.open(pages["layers"])
    assert browser.text("#summary") == findings["summary"][0]
    assert "delete-0 hurt most" in browser.text("#summary")
    assert "baseline" in browser.text("#model")
    titles = [it.text for it in browser.find("#charts h2")]
    assert titles == ["By layer", "By window of layers", "What words are worth"]
    rows = [it.text for it in browser.find("#tables details[open] tbody tr")]
    assert [it.split()[0] for it in rows] == [it["variant"] for it in findings[VARIANTS]]
    assert [it.text.rsplit(" ", 2)[0] for it in browser.find("#tables summary")] == [
        VARIANTS, "layers", "every repetition", "probes", "answers",
    ]  # fmt: skip


def test_the_importance_of_layers_is_drawn(
    browser: Browser, pages: dict[str, Path], studies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    single = [it for it in told(studies, "layers", capsys)["layers"] if it["size"] == 1]
    browser.open(pages["layers"])
    control(browser, "By layer", "input").click()
    assert drawn(browser, "By layer", "x") == [[it["first"] for it in single]]
    assert drawn(browser, "By layer", "y")[0] == pytest.approx([it["damage"] for it in single])
    Select(control(browser, "By layer", "select")).select_by_visible_text("kl")
    control(browser, "By layer", "input").click()
    values = drawn(browser, "By layer", "y")[0]
    Select(control(browser, "By layer", "select")).select_by_visible_text("right")
    assert drawn(browser, "By layer", "y")[0] == [it["right"] for it in single]
    assert values != drawn(browser, "By layer", "y")[0]
    hints = drawn(browser, "By layer", "hovertext")[0]
    assert hints[0].startswith("0 deleted: right ")


def test_windows_are_cells_by_start_and_size(
    browser: Browser, pages: dict[str, Path], studies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    damage = {(it["size"], it["first"]): it["damage"] for it in told(studies, "layers", capsys)["layers"]}
    browser.open(pages["layers"])
    if control(browser, "By window of layers", "input").is_selected():
        control(browser, "By window of layers", "input").click()
    cells, _ = drawn(browser, "By window of layers", "z")
    expected = [[damage.get((size, first)) for first in (0, 2, 3)] for size in (1, 2)]
    assert [[it if it is None else pytest.approx(it) for it in line] for line in expected] == cells


def test_levels_have_bands_of_their_spread_and_a_scale(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["noise"])
    Select(control(browser, "By level", "select")).select_by_visible_text("perplexity")
    box = control(browser, "By level", "input")
    if box.is_selected():
        box.click()
    band, line = drawn(browser, "By level", "y")
    means = [2 + 10.5 * level for level in LEVELS.values()]
    spreads = [level / 2**0.5 for level in LEVELS.values()]
    assert line == pytest.approx(means)
    upper = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    lower = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    assert band == pytest.approx([*upper, *reversed(lower)])
    box.click()
    _, logarithmic = drawn(browser, "By level", "y")
    assert [10**it for it in logarithmic] == pytest.approx(means)
    assert drawn(browser, "By level", "hovertext")[1][3] == "noise 2: perplexity 23 ± 1.4 (n = 2)"


def test_what_is_no_number_is_a_cross_and_a_problem(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["broken"])
    node = "document.querySelector('#charts [role=img]')"
    crosses = browser.run(f"{node}.data.find((it) => it.name === 'no number').hovertext")
    assert crosses == ["v1: damage is no number"]
    assert "v1: perplexity, times the baseline are no number" in browser.text("#problems")


def test_answers_are_read_side_by_side(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["layers"])
    columns = [Select(it).first_selected_option.text for it in browser.find("#pivots thead select")]
    assert (columns[0], columns[-1], len(columns)) == ("baseline", "delete-0", 3)
    assert len(browser.find("#pivots tbody tr")) == 4
    (row,) = (it for it in browser.find("#pivots tbody tr") if "What is 14 plus 50?" in it.text)
    said = [it.text for it in row.find_elements("css selector", "td")]
    assert said[0].startswith("64\n✓ right")
    assert "✗ not right" in said[2]
    browser.find("#pivots input")[0].send_keys("minus 36")
    assert len(browser.find("#pivots tbody tr")) == 1
    assert browser.text("#pivots [role=status]") == "1 of 4 rows"
    browser.find("#pivots .controls button")[0].click()
    assert len(browser.find("#pivots thead select")) == 4
    Select(browser.find("#pivots thead select")[3]).select_by_visible_text("delete-2-3")
    assert len(browser.find("#pivots tbody td")) == 4
    browser.find("#pivots thead button")[0].click()
    names = [Select(it).first_selected_option.text for it in browser.find("#pivots thead select")]
    assert names == [*columns[1:], "delete-2-3"]


def test_hostile_text_stays_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])
    assert HOSTILE in browser.text("#summary")
    assert HOSTILE in browser.text("#charts .ytick")
    assert HOSTILE in browser.text("#pivots .said")
    for select in (it for it in browser.find("#charts select") if it.is_displayed()):
        for place in range(len(Select(select).options)):
            Select(select).select_by_index(place)
    assert browser.run("window.hacked") is None
    assert browser.find("img[src=x]") == []


def test_every_control_has_a_name(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["layers"])
    for it in browser.find("button, select, input, [tabindex='0'], [role=img]"):
        assert it.accessible_name or not it.is_displayed(), it.get_attribute("outerHTML")


def test_it_fits_a_narrow_window_and_dark_colours(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("layers", "noise", "hostile"):
        browser.open(pages[name], width=400, scheme="dark")
        assert browser.run("document.documentElement.scrollWidth") <= 400
    font = "document.querySelector('#charts [role=img]').layout.font.color"
    assert browser.run(font) == "rgb(228, 230, 233)"
    browser.find("#theme")[0].click()
    browser.wait(lambda: browser.run(font) == "rgb(29, 33, 38)")


def test_a_study_without_records_says_so(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["empty"])
    assert "There are no records yet." in browser.text("#summary")
    assert browser.find("#charts section") == []
    assert browser.find("#pivots section") == []
