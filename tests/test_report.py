"""What `report` reads and tells of a sweep: against numbers worked out by NumPy from the same records."""

from __future__ import annotations

import csv
import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import swept
from PIL import Image
from swept import changed_study, probe, question, text, write_study

import tensorsurgeon as ts
from tensorsurgeon.charts import Chart, Panel, Point, Series, scaled
from tensorsurgeon.cli import main
from tensorsurgeon.errors import DestinationError, ResultsError, UsageError
from tensorsurgeon.evaluate.layer_changes import layer_change
from tensorsurgeon.evaluate.outcome_measures import is_geometric
from tensorsurgeon.evaluate.result_tables import VARIANTS
from tensorsurgeon.evaluate.results import NOTEBOOK_FIELDS
from tensorsurgeon.registry import Findings


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("swept") / "noise"
    return swept.levels(directory, values=(0.35, 1.4), groups=("attention", "mlp"), repeats=2)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    windows = [(1, first) for first in range(6)] + [(2, 0), (2, 2), (2, 4)]
    return swept.layers(tmp_path_factory.mktemp("swept") / "layers", delete=windows, double=[(1, 2), (1, 4)])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A study of three variants and two repetitions, with a text, made by hand."""
    return write_study(tmp_path / "made", text(0, 2.0), text(1, 4.0), text(2, 3.0))


def report(*places: Path, **options: Any) -> Findings:
    return ts.exams.report([str(it) for it in places], **options)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


def by_repetition(directory: Path, variant: str, value: Any, kind: str) -> np.ndarray[Any, Any]:
    """Return the mean of a value over the records of each repetition of a variant."""
    held = [it for it in lines(directory) if it["variant"] == variant and it["record"] == kind]
    repetitions = sorted({it["repeat_index"] for it in held})
    return np.array([np.mean([value(it) for it in held if it["repeat_index"] == one]) for one in repetitions])


def chart(findings: Findings, title: str, measure: str) -> Chart:
    return next(it for it in findings.charts if (it.title, it.measure) == (title, measure))


def points(findings: Findings, title: str, measure: str, panel: int = 0, series: int = 0) -> Sequence[Point]:
    return chart(findings, title, measure).panels[panel].series[series].points


def test_every_measure_is_its_mean_and_deviation_over_repetitions(noise: Path) -> None:
    rows = {it["variant"]: it for it in report(noise).tables[VARIANTS]}
    assert len(rows) == 5
    base = np.log(by_repetition(noise, "baseline", lambda it: it["perplexity"], "text")).mean()
    for name, row in rows.items():
        perplexity = by_repetition(noise, name, lambda it: it["perplexity"], "text")
        damage = np.log(perplexity) - base
        asked = {
            "perplexity": perplexity,
            "damage": damage,
            "times the baseline": np.exp(damage),
            "right": by_repetition(noise, name, lambda it: it["right"], "question"),
            "entropy": by_repetition(noise, name, lambda it: it["entropy_nats"], "probe"),
            "mass of affirm": by_repetition(noise, name, lambda it: it["mass"]["affirm"], "probe"),
            "tokens of long answers": by_repetition(noise, name, lambda it: it["tokens"], "open"),
        }
        if name != "baseline":
            asked["kl"] = by_repetition(noise, name, lambda it: it["kl"], "probe")
        for measure, values in asked.items():
            assert len(values) == 2
            assert row[measure] == pytest.approx(values.mean(), rel=1e-12, abs=1e-15), measure
            assert row[f"{measure}, std"] == pytest.approx(values.std(ddof=1), rel=1e-9, abs=1e-15), measure
        assert row["n"] == 2
        math_right = [it["right"] for it in lines(noise) if it["variant"] == name and it["prompt_group"] == "math"]
        assert row["right: math"] == pytest.approx(np.mean(math_right))


def test_variants_are_sorted_by_damage_and_the_worst_are_named(noise: Path) -> None:
    findings = report(noise)
    rows = findings.tables[VARIANTS]
    assert [it["damage"] for it in rows] == sorted(it["damage"] for it in rows)
    # Noise of 1.4 deviations ruins a model, of 0.35 it does not: the study's first finding.
    assert {it["variant"] for it in rows[-2:]} == {"mult-gauss-attention-1.4", "mult-gauss-mlp-1.4"}
    (summary,) = findings.summary
    worst = rows[-1]
    assert (
        f"{worst['variant']} hurt most: perplexity {worst['perplexity']:.3g} ± {worst['perplexity, std']:.2g}"
        in summary
    )
    assert "5 variants of" in summary
    assert "each 2 times. All 70 records are there." in summary
    assert findings.problems == ()


def test_a_level_is_drawn_with_its_spread_by_group(noise: Path) -> None:
    findings = report(noise)
    levels = findings.tables["levels"]
    assert [(it["method"], it["group"], it["level"]) for it in levels] == [
        ("mult-gauss", group, level) for group in ("attention", "mlp") for level in (0.35, 1.4)
    ]
    (panel,) = chart(findings, "By level", "perplexity").panels
    assert [it.label for it in panel.series] == ["attention", "mlp"]
    assert panel.ticks == [(0.35, "0.35"), (1.4, "1.4")]
    drawn = [(it.at, it.value, it.spread) for one in panel.series for it in one.points]
    assert drawn == [(it["level"], it["perplexity"], it["perplexity, std"]) for it in levels]
    assert panel.baseline == by_repetition(noise, "baseline", lambda it: it["perplexity"], "text").mean()
    assert "By variant" not in {it.title for it in findings.charts}


def test_the_importance_of_layers_and_windows(layers: Path) -> None:
    findings = report(layers)
    perplexity = {it["variant"]: it["perplexity"] for it in lines(layers) if it["record"] == "text"}
    (deleted, doubled) = chart(findings, "By layer", "damage").panels
    assert (deleted.title, doubled.title) == ("deleted", "doubled")
    assert [(it.at, it.value) for it in deleted.series[0].points] == [
        (layer, pytest.approx(math.log(perplexity[f"delete-{layer}"] / perplexity["baseline"]))) for layer in range(6)
    ]
    assert [it.at for it in doubled.series[0].points] == [2, 4]
    (windows,) = chart(findings, "By window of layers", "perplexity").panels
    assert {it.label: [point.at for point in it.points] for it in windows.series} == {
        "1 layer": [0, 1, 2, 3, 4, 5], "2 layers": [0, 2, 4],
    }  # fmt: skip
    assert windows.series[1].points[1].value == perplexity["delete-2-3"]
    # Without its first layer the mannequin is ruined, without a later one hardly hurt.
    importance = [it.value for it in deleted.series[0].points]
    assert max(importance) == importance[0] > 10 * min(importance)
    least = min(range(6), key=lambda it: importance[it])
    assert f"Of single layers deleted, {least} mattered least and 0 most." in findings.summary[0]
    assert {it["layers"] for it in findings.tables["layers"]} >= {"0", "2-3", "4-5"}


def test_several_studies_are_one_report(noise: Path, layers: Path) -> None:
    findings = report(noise, layers)
    assert len(findings.summary) == 2
    rows = findings.tables[VARIANTS]
    assert [it["damage"] for it in rows] == sorted(it["damage"] for it in rows)
    assert {it["study"] for it in rows} == {"noise", "layers"}
    assert [it.title for it in chart(findings, "By level", "damage").panels] == ["noise: mult-gauss"]
    assert findings.pivots[0].column == ("study", "variant")
    with pytest.raises(UsageError, match="is given twice"):
        report(noise, noise)


def test_two_languages(tmp_path: Path) -> None:
    suite = {"extends": "bilingual", "bilingual": {"each": 1, "tokens": 6}}
    tells: dict[str, dict[str, Any]] = {"baseline": {}, "shorter": {"layers": [0, 1, 2, 3, 4]}}
    make = {"baseline": lambda _: [], "shorter": lambda _: [{"drop-layers": {"layers": "5"}}]}
    directory = swept.sweep(tmp_path / "two", make, tells, suite=suite)
    findings = report(directory)
    for row in findings.tables[VARIANTS]:
        for language in ("en", "zh"):
            held = [it for it in lines(directory) if it["variant"] == row["variant"] and it["language"] == language]
            assert len(held) == 5
            assert row[f"right in {language}"] == np.mean([it["right"] for it in held])
            same = [it["answer_language"] == language for it in held]
            assert row[f"{language} answered in {language}"] == np.mean(same)
    assert findings.tables["study"][0]["damage is"] == "the share of right answers below the baseline's"


def test_the_first_answer_and_its_language(tmp_path: Path) -> None:
    def answered(number: int, word: int | None, language: str = "zh") -> dict[str, Any]:
        more = {"language": "zh", "answer_word": word, "answer_token": word, "answer_language": language, "cjk": 0.5}
        return question(0, word is not None, **more) | {"record": "bilingual", "prompt_id": f"{number}-zh"}

    directory = write_study(tmp_path / "zh", answered(0, 2), answered(1, 5), answered(2, None, "en"), variants=1)
    (row,) = report(directory).tables[VARIANTS]
    assert row["right in zh"] == pytest.approx(2 / 3)
    assert row["first answer in zh, word"] == 3.5
    assert row["zh answered in zh"] == pytest.approx(2 / 3)
    assert row["damage"] == 0


def test_damage_without_texts_is_divergence_and_without_probes_lost_answers(tmp_path: Path) -> None:
    probes = write_study(tmp_path / "probes", probe(0, None), probe(1, 0.5), probe(2, 0.25))
    findings = report(probes)
    assert [(it["variant"], it["damage"]) for it in findings.tables[VARIANTS]] == [("v0", 0), ("v2", 0.25), ("v1", 0.5)]
    assert "Damage is the mean divergence of the probes from the baseline's, in nats." in findings.summary[0]
    right = {(0, "a"): True, (0, "b"): True, (1, "a"): False, (1, "b"): False, (2, "a"): True, (2, "b"): False}
    answers = [question(variant, it, group=group) for (variant, group), it in right.items()]
    findings = report(write_study(tmp_path / "answers", *answers))
    assert [(it["variant"], it["damage"]) for it in findings.tables[VARIANTS]] == [("v0", 0), ("v2", 0.5), ("v1", 1)]
    assert [it["right: a"] for it in findings.tables[VARIANTS]] == [1, 1, 0]


def test_of_several_texts_the_one_that_the_baseline_reads_tells_of_damage(tmp_path: Path) -> None:
    read = {(0, "far"): 1e8, (0, "near"): 3.0, (1, "far"): 1e6, (1, "near"): 9.0, (2, "far"): 1e9, (2, "near"): 4.0}
    records = [text(variant, value) | {"prompt_id": name} for (variant, name), value in read.items()]
    findings = report(write_study(tmp_path / "texts", *records))
    rows = findings.tables[VARIANTS]
    assert [(it["variant"], it["damage"]) for it in rows] == [
        ("v0", 0), ("v2", pytest.approx(math.log(4 / 3))), ("v1", pytest.approx(math.log(3))),
    ]  # fmt: skip
    assert (rows[2]["perplexity of far"], rows[2]["perplexity of near"]) == (1e6, 9)
    assert rows[2]["times the baseline"] == pytest.approx(3)
    assert "Damage is log perplexity of near above the baseline's" in findings.summary[0]


def test_a_study_without_baseline(tmp_path: Path) -> None:
    findings = report(write_study(tmp_path / "alone", text(0, 2.0), text(1, 4.0), variants=2, baseline=None))
    assert [it["damage"] for it in findings.tables[VARIANTS]] == [math.log(2), math.log(4)]
    assert "Damage is log perplexity." in findings.summary[0]
    assert "times the baseline" not in findings.tables[VARIANTS][0]


def test_one_variant_only(tmp_path: Path) -> None:
    findings = report(write_study(tmp_path / "one", text(0, 2.0), probe(0, None), question(0, True), variants=1))
    (row,) = findings.tables[VARIANTS]
    assert (row["damage"], row["perplexity"], row["right"], row["n"]) == (0, 2, 1, 1)
    assert "The baseline has perplexity 2, 100% right." in findings.summary[0]


def test_numbers_that_are_none_are_worst_and_a_problem(made: Path) -> None:
    with (made / "records.jsonl").open("a") as file:
        file.write(json.dumps(text(1, math.nan, 1)) + "\n" + json.dumps(text(2, 5.0, 1)) + "\n")
        file.write(json.dumps(probe(2, None, None)) + "\n" + json.dumps(probe(0, None)) + "\n")
    findings = report(made)
    rows = findings.tables[VARIANTS]
    assert [it["variant"] for it in rows] == ["v0", "v2", "v1"]
    assert (rows[2]["perplexity"], rows[2]["no number"]) == (4, 1)
    assert rows[1]["perplexity"] == 4
    assert findings.problems == (
        "made: v1: perplexity, times the baseline are no number in 1 of 2 repetitions.",
        "made: v2: kl, entropy, mass of affirm, mass of deny are no number in 1 of 2 repetitions.",
    )
    assert main(["report", str(made)]) == 3


def test_what_has_no_number_at_all_is_a_cross(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "broken", text(0, 2.0), text(1, None), text(2, 3.0))
    findings = report(directory)
    assert [it["variant"] for it in findings.tables[VARIANTS]] == ["v0", "v2", "v1"]
    assert points(findings, "By variant", "perplexity")[2] == Point(2, None, None, "v1: perplexity is no number")
    assert "1 variant gave no numbers at times, the worst v1." in findings.summary[0]
    assert main(["report", str(directory), "--plot", str(tmp_path / "plots")]) == 3


def test_a_perplexity_beyond_all_numbers_of_times_is_told(tmp_path: Path) -> None:
    (_, row) = report(write_study(tmp_path / "far", text(0, 1e-300), text(1, 1e300), variants=2)).tables[VARIANTS]
    assert row["damage"] == pytest.approx(600 * math.log(10))
    assert row["times the baseline"] is None


@pytest.mark.parametrize("kept", [0.01, 0.02, 0.3, 0.5, 0.77, 0.999])
def test_a_killed_sweep_is_read_up_to_where_it_came(noise: Path, tmp_path: Path, kept: float) -> None:
    directory = Path(shutil.copytree(noise, tmp_path / "killed"))
    records = directory / "records.jsonl"
    whole = records.read_bytes()
    part = whole[: int(len(whole) * kept)]
    records.write_bytes(part)
    findings = report(directory)
    assert findings.tables["study"][0]["records"] == part.count(b"\n")
    assert "The last line is cut off and was left out." in findings.summary[0]
    so_far = "So far there are" if b"\n" in part else "There are no records yet."
    assert so_far in findings.summary[0]


def test_a_last_line_without_its_end_that_is_whole_counts(made: Path) -> None:
    records = made / "records.jsonl"
    records.write_text(records.read_text().rstrip("\n"))
    findings = report(made)
    assert findings.tables["study"][0]["records"] == 3
    assert "cut off" not in findings.summary[0]


@pytest.mark.parametrize("records", [None, "", "\n", '{"record": "te'])
def test_nothing_there_yet(made: Path, tmp_path: Path, records: str | None) -> None:
    (made / "records.jsonl").unlink()
    if records is not None:
        (made / "records.jsonl").write_text(records)
    findings = report(made)
    assert "There are no records yet." in findings.summary[0]
    assert list(findings.tables) == ["study"]
    assert main(["report", str(made), "--html", str(tmp_path / "page.html"), "--plot", str(tmp_path / "plots")]) == 0


def test_how_many_records_are_missing_is_said(made: Path) -> None:
    with (made / "records.jsonl").open("a") as file:
        file.write(json.dumps(question(0, True)) + "\n")
    assert "So far there are 4 of 6 records, of 3 variants." in report(made).summary[0]


def test_of_records_given_again_the_later_counts(made: Path) -> None:
    with (made / "records.jsonl").open("a") as file:
        file.write(json.dumps(text(1, 8.0)) + "\n")
    findings = report(made)
    assert findings.tables[VARIANTS][2]["perplexity"] == 8
    assert "Of 1 record there is a later one, which counts." in findings.summary[0]


def test_fields_and_kinds_that_a_later_sweep_may_add_are_left_out(made: Path) -> None:
    before = report(made)
    study = json.loads((made / "study.json").read_text())
    (made / "study.json").write_text(json.dumps({**study, "mood": "calm"}))
    more = [{**it, "mood": "calm", "engine": {"engine": "other"}} for it in lines(made)]
    more.append({"record": "song", "variant": "v0"})
    (made / "records.jsonl").write_text("".join(json.dumps(it) + "\n" for it in more))
    after = report(made)
    assert after.tables == before.tables
    assert "1 record of other kinds was left out." in after.summary[0]


def test_all_that_is_wrong_is_said_at_once(made: Path) -> None:
    bad = [
        text(0, 2.0) | {"perplexity": "low"},
        text(7, 2.0),
        {key: value for key, value in question(0, True).items() if key != "right"},
        text(0, 2.0) | {"repeat_index": -1},
    ]
    (made / "records.jsonl").write_text("".join(json.dumps(it) + "\n" for it in bad) + "{]\n[1]\n")
    with pytest.raises(ResultsError) as raised:
        report(made)
    where = f"{made / 'records.jsonl'}: line"
    assert raised.value.problems == (
        f"{where} 1: perplexity: Input should be a valid number.",
        f"{where} 2: study.json has no variant 'v7'. Did you mean 'v2'?",
        f"{where} 3: right: Field required.",
        f"{where} 4: repeat_index: Input should be greater than or equal to 0.",
        f"{where} 5: is no record; what wrote it was disturbed: 'sweep --force' measures again.",
        f"{where} 6: is no record; what wrote it was disturbed: 'sweep --force' measures again.",
    )


def test_many_faults_are_counted(made: Path) -> None:
    (made / "records.jsonl").write_text("{]\n" * 40)
    with pytest.raises(ResultsError) as raised:
        report(made)
    assert len(raised.value.problems) == 13
    assert raised.value.problems[-1] == f"{made / 'records.jsonl'}: and 28 more faults."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": [{"name": "v0"}, {"name": "v0"}]}, "variant 'v0' is there twice"),
        ({"baseline": "gone"}, "the baseline 'gone' is none of the variants"),
        ({"variants": "all"}, "variants: Input should be a valid list"),
        ({"repeats": 0}, "repeats: Input should be greater than or equal to 1"),
        ({"name": None}, "name: Input should be a valid string"),
    ],
)
def test_a_broken_study_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultsError, match=f"study.json: {message}"):
        report(changed_study(tmp_path / "x", changes))


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_a_study_that_is_no_json_object_is_refused(made: Path, content: str) -> None:
    (made / "study.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ResultsError, match="study.json: is no JSON object"):
        report(made)


def test_what_is_no_directory_of_results_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        report(made, tmp_path / "one", tmp_path)
    assert raised.value.problems == tuple(
        f"{it}: there is no study.json; name a directory that 'sweep' has written."
        for it in (tmp_path / "one", tmp_path)
    )
    with pytest.raises(UsageError, match="the first argument is int, not directories"):
        ts.exams.report(7)  # type: ignore[arg-type]


def test_one_directory_may_be_given_as_a_path(made: Path) -> None:
    assert ts.exams.report(made).tables == report(made).tables  # type: ignore[arg-type]


def test_the_array_holds_every_record_and_the_fields_of_notebooks(noise: Path, tmp_path: Path) -> None:
    report(noise, array=str(tmp_path / "all.json"))
    array = json.loads((tmp_path / "all.json").read_text())
    assert [{key: row[key] for key in it} for row, it in zip(array, lines(noise), strict=True)] == lines(noise)
    assert all(set(NOTEBOOK_FIELDS) <= set(it) for it in array)
    told = [it for it in array if it["record"] == "question" and it["level_value"] == 1.4]
    assert told
    assert all(it["degradation_method"] == "mult-gauss" and it["perplexity"] for it in told)


@pytest.mark.parametrize(("place", "message"), [("no/a.json", "there is no directory"), (".", "is a directory")])
def test_an_array_that_cannot_be_written_is_told_first(made: Path, tmp_path: Path, place: str, message: str) -> None:
    (made / "study.json").write_text("{")
    with pytest.raises(DestinationError, match=message):
        report(made, array=str(tmp_path / place))


def test_the_command_prints_and_writes_tables(noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(noise), "--csv", str(tmp_path / "csv"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["summary"] == list(report(noise).summary)
    with (tmp_path / "csv" / "variants-the-least-damaged-first.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(it["variant"], float(it["damage"])) for it in rows] == [
        (it["variant"], it["damage"]) for it in told[VARIANTS]
    ]
    assert main(["report", str(noise)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("noise: A study of the mannequin.")
    assert "mult-gauss-mlp-1.4" in text
    assert main(["report"]) == 2


def test_figures_are_drawn_of_all_charts(noise: Path, layers: Path, tmp_path: Path) -> None:
    findings = report(noise, layers)
    few = [it for it in findings.charts if it.measure in ("damage", "mean probability of label sets")]
    kinds = {it.kind for it in few}
    assert kinds == {"curves", "bars", "map", "stack"}
    from tensorsurgeon.report.figures import write_figures

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_figures(findings._replace(charts=few), tmp_path)
    pictures = [Image.open(it) for it in paths if it.suffix == ".png"]
    assert len(pictures) == len(few)
    assert all(len(it.convert("RGB").getcolors(2**20) or ()) > 20 for it in pictures)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([0, 1, 2, 3], None),
        ([0, 2, 3], ("deleted", 1, 1)),
        ([0, 3], ("deleted", 1, 2)),
        ([2, 3], ("deleted", 0, 2)),
        ([0, 2], None),
        ([0, 0, 1, 2, 3], ("doubled", 0, 1)),
        ([0, 1, 2, 1, 2, 3], ("doubled as a block", 1, 2)),
        ([0, 1, 1, 2, 2, 3], ("doubled", 1, 2)),
        ([0, 0, 1, 2, 2, 3], None),
        ([0, 1, 1, 1, 2, 3], None),
        ([0, 1, 1, 3], None),
        ([3, 2, 1, 0], None),
        ([0, 2, 1], None),
        ([], ("deleted", 0, 4)),
        (None, None),
    ],
)
def test_what_a_selection_did_to_layers(kept: list[int] | None, expected: tuple[str, int, int] | None) -> None:
    assert layer_change(kept, 4) == expected


@pytest.mark.parametrize(
    ("chosen", "order"), [(None, ["v0", "v1", "v2"]), ("kl", ["v0", "v2", "v1"]), ("right", ["v1", "v0", "v2"])]
)
def test_a_study_says_what_tells_of_damage(tmp_path: Path, chosen: str | None, order: list[str]) -> None:
    records = [text(0, 2.0), text(1, 3.0), text(2, 4.0), probe(0, None), probe(1, 0.5), probe(2, 0.25)]
    records += [question(0, True), question(1, True), question(2, False), question(0, False, group="logic")]
    records += [question(1, True, group="logic"), question(2, False, group="logic")]
    findings = report(write_study(tmp_path / "chosen", *records, damage=chosen))
    rows = findings.tables["variants, the least damaged first"]
    assert [it["variant"] for it in rows] == order
    damage = {it["variant"]: it["damage"] for it in rows}
    expected = {None: math.log(2), "kl": 0.25, "right": 0.5}[chosen]
    assert damage["v2"] == pytest.approx(expected)


def test_where_nothing_tells_of_damage_nothing_is_said_of_it(tmp_path: Path) -> None:
    study = write_study(tmp_path / "mute", text(0, 2.0, level_value=0.5), text(1, 3.0, level_value=1.0), damage="kl")
    findings = report(study)
    assert "damage" not in findings.summary[0].lower()
    assert "damage" not in findings.tables["variants, the least damaged first"][0]


@pytest.mark.parametrize(("least", "signed"), [(-4.0, True), (-0.3, True), (-0.01, False), (0.0, False), (None, False)])
def test_colours_tell_signs_where_values_go_far_to_both_sides(least: float | None, signed: bool) -> None:
    points = [Point(0, least, None, ""), Point(1, 5.0, None, "")]
    assert scaled("t", "m", "map", "a", [Panel("", [Series("", points)], [])]).signed == signed


def test_a_change_that_two_variants_make_is_drawn_once_and_blocks_apart(tmp_path: Path) -> None:
    kept = {0: [0, 1, 2, 3], 1: [1, 2, 3], 2: [1, 2, 3], 3: [0, 1, 2], 4: [0, 1, 1, 2, 2, 3], 5: [0, 1, 2, 1, 2, 3]}
    records = [text(it, 2.0 + it, layers=layers, source_layers=4) for it, layers in kept.items()]
    findings = report(write_study(tmp_path / "twice", *records, variants=len(kept)))
    (deleted,) = chart(findings, "By layer", "perplexity").panels
    assert [(it.at, it.value) for it in deleted.series[0].points] == [(0, 3.0), (3, 5.0)]
    assert [(it["change"], it["layers"], it["perplexity"]) for it in findings.tables["layers"]] == [
        ("deleted", "0", 3.0), ("deleted", "3", 5.0), ("doubled", "1-2", 6.0), ("doubled as a block", "1-2", 7.0),
    ]  # fmt: skip


def test_geometric_levels_are_recognised_and_run_as_the_study_does(tmp_path: Path) -> None:
    assert is_geometric([1024, 256, 64, 16, 4])
    assert is_geometric([2, 7, 23, 76, 256])
    assert is_geometric([0, 0.01, 0.1, 1])
    assert not is_geometric([0, 0.35, 0.7, 1.05, 1.4])
    assert not is_geometric([1, 100])
    records = [text(it, 2.0 + it, level_value=value, degradation_method="grid")
               for it, value in enumerate((64, 16, 4))]  # fmt: skip
    (panel,) = chart(report(write_study(tmp_path / "grid", *records)), "By level", "perplexity").panels
    assert [label for _, label in panel.ticks] == ["64", "16", "4"]
    assert np.diff([at for at, _ in panel.ticks]) == pytest.approx([math.log10(4)] * 2)
    records = [text(it, 2.0 + it, level_value=value) for it, value in enumerate((0, 0.1, 1, 10))]
    (panel,) = chart(report(write_study(tmp_path / "zero", *records, variants=4)), "By level", "damage").panels
    assert [at for at, _ in panel.ticks] == pytest.approx([-2, -1, 0, 1])


def test_the_only_number_that_varies_is_a_level(tmp_path: Path) -> None:
    variants = [{"name": f"v{it}", "values": {"rank": 2**it, "side": "out", "seed": 1}} for it in range(3)]
    directory = write_study(tmp_path / "rank", *(text(it, 2.0 + it) for it in range(3)))
    directory = changed_study(tmp_path / "ranks", {"variants": variants})
    (directory / "records.jsonl").write_text("".join(json.dumps(text(it, 2.0 + it)) + "\n" for it in range(3)))
    assert [(it["method"], it["group"], it["level"]) for it in report(directory).tables["levels"]] == [
        ("rank", "side out, seed 1", 2**it) for it in range(3)
    ]
    (directory / "study.json").write_text(
        json.dumps(
            json.loads((directory / "study.json").read_text())
            | {"variants": [{"name": f"v{it}", "values": {"rank": 2**it}} for it in range(3)]}
        )
    )
    assert [it["group"] for it in report(directory).tables["levels"]] == ["all"] * 3
    assert "rank: damage" in report(directory).summary[0]
