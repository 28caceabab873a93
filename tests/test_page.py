"""The page of findings, in a browser: it draws, answers to pointer and keys, and holds what is hostile inert."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from browsing import HOSTILE, Browser
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import made_up
from tensorsurgeon.errors import DestinationError, UsageError
from tensorsurgeon.registry import Findings
from tensorsurgeon.report.page import write_page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    hostile = made_up.autopsy(2)
    rows = [{**row, "name": HOSTILE, "role": HOSTILE} for row in hostile.tables["tensors"]]
    details = [{**hostile.details[1], "name": HOSTILE}]
    findings = {
        "one": made_up.autopsy(6),
        "two": made_up.noise(6),
        "hostile": Findings({"model": [{"name": HOSTILE}], HOSTILE: rows}, (f"{HOSTILE}: {HOSTILE}",), details),
        "plain": Findings({"shards": [{"file": f"{n}", "bytes": 10 - n} for n in range(1200)]}),
    }
    for name, found in findings.items():
        write_page(found, HOSTILE if name == "hostile" else f"Findings of {name}", directory / f"{name}.html")
    return {name: directory / f"{name}.html" for name in findings}


def drawn(browser: Browser) -> list[list[float | None]]:
    return browser.run("document.getElementById('heatmap').data[0].z")


def test_it_renders_without_network_or_error(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.driver.get_log("browser")
        browser.open(page)
        assert browser.driver.get_log("browser") == []
        requests = browser.run("performance.getEntriesByType('resource').map((it) => it.name)")
        assert [name for name in requests if not name.startswith(("data:", "blob:"))] == []
    policy = browser.find("meta[http-equiv=Content-Security-Policy]")[0].get_attribute("content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_it_shows_the_model_its_problems_and_its_tables(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    assert browser.text("h1") == "Findings of one"
    assert "8,190,735,360" in browser.text("#model")
    assert "7 elements are NaN" in browser.text("#problems")
    assert [it.text for it in browser.find("#tables summary")] == ["tensors 75 rows", "shards 5 rows"]
    assert browser.run("document.querySelectorAll('#heatmap .heatmaplayer image').length") == 1
    browser.open(pages["two"])
    assert "No problem was found." in browser.text("#problems")


def test_a_cell_answers_to_hover_and_click(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    hover = browser.hover(1, 4)
    assert "model.layers.3.self_attn.q_proj.weight" in hover
    assert "deviation 0.02" in hover
    assert "BF16, 4096x4096" in hover
    name = "model.layers.2.mlp.down_proj.weight"
    browser.to_cell(9, 3).click().perform()
    browser.wait(lambda: browser.text("#detail-title") == name)
    (detail,) = (it for it in made_up.autopsy(6).details if it["name"] == name)
    counts = [*detail["histogram"]["negative"], detail["histogram"]["zero"], *detail["histogram"]["positive"]]
    bars = browser.run("document.querySelector('#plots div').data[0]")
    assert sum(y * width for y, width in zip(bars["y"], bars["width"], strict=True)) == pytest.approx(sum(counts))
    figures = [it.text.split("\n")[0] for it in browser.find("#plots figcaption")]
    assert figures == ["Values", "Largest magnitude by row", "Largest magnitude by column"]
    assert "12288" in browser.text("#facts")


def test_the_keyboard_moves_and_selects(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    heatmap = browser.find("#heatmap")[0]
    browser.run("document.getElementById('heatmap').focus()")
    assert "model.layers.3.self_attn.k_proj.weight" in browser.text("#cell")
    heatmap.send_keys(Keys.ARROW_RIGHT)
    assert "layer 4, attention k" in browser.text("#cell")
    outlined = browser.run("document.getElementById('heatmap').layout.shapes.map((it) => it.x0)")
    assert set(outlined) == {3.5, 4.5}
    heatmap.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    assert browser.text("#detail-title") == "model.layers.4.self_attn.o_proj.weight"
    assert "Singular values" in browser.text("#plots")
    heatmap.send_keys(Keys.ARROW_LEFT * 9)
    assert browser.text("#cell") == "outside of layers, attention o: no tensor"


def test_every_control_has_a_name(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"])
    for control in browser.find("button, select, input, [tabindex='0']"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")


def test_statistic_and_scale_change_the_heatmap(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    first = drawn(browser)
    Select(browser.find("#statistic")[0]).select_by_visible_text("kurtosis")
    browser.wait(lambda: drawn(browser) != first)
    assert "in kurtosis" in browser.text("#outliers")
    assert browser.find("#log")[0].is_selected()
    logarithmic = drawn(browser)
    browser.find("#log")[0].click()
    browser.wait(lambda: drawn(browser) != logarithmic)
    assert drawn(browser)[1][1] == pytest.approx(made_up.autopsy(6).tables["tensors"][1]["kurtosis"])
    Select(browser.find("#statistic")[0]).select_by_visible_text("mean")
    scale = browser.wait(lambda: browser.run("document.getElementById('heatmap').layout.coloraxis"))
    assert scale["cmin"] == -scale["cmax"]


def test_an_outlier_can_be_chosen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    Select(browser.find("#statistic")[0]).select_by_visible_text("largest")
    massive = "model.layers.3.mlp.down_proj.weight"
    (button,) = (it for it in browser.find("#outliers-list button") if it.text == massive)
    button.click()
    assert browser.text("#detail-title") == massive
    browser.find("#problems button")[0].click()
    assert browser.text("#detail-title") == "model.layers.3.self_attn.k_proj.weight"


def test_counts_can_be_linear(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    kind = "document.querySelector('#plots div').layout.yaxis.type"
    assert browser.run(kind) == "log"
    browser.find("#plots input")[0].click()
    assert browser.run(kind) != "log"


def test_two_models_share_one_scale(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"])
    scales = browser.run(
        "document.getElementById('heatmap').data.filter((it) => it.type === 'heatmap').map((it) => it.coloraxis)"
    )
    assert scales == ["coloraxis", "coloraxis"]
    assert [it.text for it in browser.find("#heatmap .annotation")] == ["base", "noisy"]
    Select(browser.find("#grid")[0]).select_by_visible_text("change")
    browser.wait(lambda: browser.run("document.getElementById('heatmap').data.length") == 2)
    browser.run("choose('model.layers.1.mlp.up_proj.weight', 'noisy')")
    labels = browser.run("document.querySelector('#plots div').data.map((it) => it.name)")
    assert labels == ["base", "noisy"]
    assert "Values compared, base" in browser.text("#plots")


def test_colours_follow_the_system_and_the_button(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], scheme="dark")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    font = "document.getElementById('heatmap').layout.font.color"
    assert [browser.run(background), browser.run(font)] == ["rgb(21, 23, 27)", "rgb(228, 230, 233)"]
    browser.find("#theme")[0].click()
    browser.wait(lambda: browser.run(font) == "rgb(29, 33, 38)")
    assert browser.run(background) == "rgb(253, 253, 252)"


def test_hostile_text_stays_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])
    assert browser.text("h1") == HOSTILE
    assert HOSTILE in browser.text("#model")
    assert browser.text("#detail-title") == HOSTILE
    assert HOSTILE in browser.text("#heatmap .ytick")
    assert HOSTILE in browser.hover(0, 1)
    browser.find("#tables summary")[0].click()
    browser.wait(lambda: HOSTILE in browser.text("#tables tbody"))
    assert browser.run("window.hacked") is None
    assert browser.find("img[src=x]") == []


def test_tables_are_sorted_and_filtered(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["plain"])
    assert len(browser.find("#tables tbody tr")) == 1000
    assert browser.text("#tables [role=status]") == "1,000 of 1,200 rows"
    head = browser.find("#tables thead button")[1]
    for first in ("10", "-1,189"):
        head.click()
        assert browser.text("#tables tbody .number") == first
    browser.find("#tables input")[0].send_keys("1199")
    assert browser.text("#tables tbody tr") == "1199 -1,189"


def test_it_fits_a_narrow_window(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("one", "two"):
        browser.open(pages[name], width=400)
        assert browser.run("document.documentElement.scrollWidth") <= 400


def test_a_large_model_is_a_page_of_less_than_six_megabytes(tmp_path: Path) -> None:
    write_page(made_up.autopsy(64), "large", tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 6e6


def test_the_same_findings_are_the_same_page(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_page(made_up.autopsy(2), "same", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert sorted(it.name for it in tmp_path.iterdir()) == ["one", "other"]


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="there is no directory .*nowhere; make it first"):
        write_page(made_up.autopsy(1), "x", tmp_path / "nowhere" / "page.html")


def test_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r'--html needs plotly: pip install "tensorsurgeon\[report\]"'):
        write_page(made_up.autopsy(1), "x", tmp_path / "page.html")
