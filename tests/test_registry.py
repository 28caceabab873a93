"""Operations and exams as declarations: what is read off them, what is refused, and what is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import make
import tensorsurgeon as ts
from tensorsurgeon import registry
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import UsageError
from tensorsurgeon.parameters import Count, Glob, Layers, Location, Size
from tensorsurgeon.registry import Findings, exam, find_operation, operation


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test declare operations without leaving them to the others."""
    monkeypatch.setattr(registry, "OPERATIONS", {})
    monkeypatch.setattr(registry, "EXAMS", {})
    monkeypatch.setattr(registry, "DERIVATIONS", {})


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return ts.open(make.plain(tmp_path_factory.mktemp("registry") / "plain", layers=4))


def declare_everything() -> Callable[..., Checkpoint]:
    @operation
    def do_everything(
        ckpt: Checkpoint,
        layers: Layers,
        times: Count = 2,
        size: Size = 1000,
        kind: Literal["even", "odd"] = "even",
        tensors: Glob | None = None,
        each: bool = False,
        others: Layers | None = None,
    ) -> Checkpoint:
        """Do everything at once.

        A second paragraph.

        Args:
            layers: Layers to take,
                such as 1-2.
            times: How often: twice.
            size: How large.
            kind: Which kind.
            tensors: Which tensors.
            each: One by one.
            others: Other layers.

        Returns:
            Nothing new.

        Raises:
            UsageError: never.
        """
        return ckpt

    return do_everything


@pytest.mark.usefixtures("scratch")
def test_name_and_description_come_from_the_function_and_its_docstring() -> None:
    declare_everything()
    spec = registry.OPERATIONS["do-everything"]
    assert spec.name == "do-everything"
    assert spec.summary == "Do everything at once."
    assert spec.description == "Do everything at once.\n\nA second paragraph."
    assert not spec.takes_location


@pytest.mark.usefixtures("scratch")
def test_parameters_come_from_signature_and_docstring() -> None:
    declare_everything()
    required = inspect.Parameter.empty
    parameters = registry.OPERATIONS["do-everything"].parameters
    assert [(each.name, each.default, each.help) for each in parameters] == [
        ("layers", required, "Layers to take, such as 1-2."),
        ("times", 2, "How often: twice."),
        ("size", 1000, "How large."),
        ("kind", "even", "Which kind."),
        ("tensors", None, "Which tensors."),
        ("each", False, "One by one."),
        ("others", None, "Other layers."),
    ]
    assert [each.name for each in parameters if each.required] == ["layers"]
    assert {each.name: each.choices for each in parameters if each.choices} == {"kind": ("even", "odd")}
    types = {each.name: each.type for each in parameters}
    assert (types["times"], types["size"], types["tensors"], types["each"]) == (int, int, str, bool)
    assert types["layers"] == types["others"] == tuple[int, ...]


@pytest.mark.usefixtures("scratch")
def test_the_docstring_and_the_name_of_the_function_stay() -> None:
    function = declare_everything()
    assert function.__name__ == "do_everything"
    assert str(inspect.signature(function)).startswith("(ckpt: 'Checkpoint', layers: 'Layers', times: 'Count' = 2")


@pytest.mark.usefixtures("scratch")
def test_parameters_without_help_are_an_error_at_declaration() -> None:
    def helpless(ckpt: Checkpoint, first: Count, second: Count, third: Count = 1) -> Checkpoint:
        """Do something.

        Args:
            second: A number.
        """
        return ckpt

    with pytest.raises(TypeError) as caught:
        operation(helpless)
    assert str(caught.value) == "helpless: its docstring does not explain first, third."
    assert registry.OPERATIONS == {}


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    ("name", "given", "parsed"),
    [
        ("layers", "0-2,1", (0, 1, 2, 1)),
        ("layers", 3, (3,)),
        ("layers", [2, 0], (2, 0)),
        ("layers", (5,), (5,)),
        ("layers", range(2), (0, 1)),
        ("others", None, None),
        ("others", "2-1", (2, 1)),
        ("times", 7, 7),
        ("times", "7", 7),
        ("size", "5GB", 5_000_000_000),
        ("size", "2 KiB", 2048),
        ("size", 12, 12),
        ("kind", "odd", "odd"),
        ("tensors", "*.weight", "*.weight"),
        ("each", True, True),
    ],
)
def test_values_are_parsed_by_their_type(name: str, given: Any, parsed: Any) -> None:
    declare_everything()
    checked = registry.OPERATIONS["do-everything"].check({"layers": 0, name: given})
    defaults = {"layers": (0,), "times": 2, "size": 1000, "kind": "even", "tensors": None, "each": False}
    assert checked == {**defaults, "others": None, name: parsed}
    assert type(checked[name]) is type(parsed)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({}, ["do-everything: layers is missing."]),
        (
            {"layers": 0, "tmies": 3},
            ["do-everything: there is no parameter 'tmies'. Did you mean 'times'?"],
        ),
        ({"layers": 0, "zzzzzz": 3}, ["do-everything: there is no parameter 'zzzzzz'."]),
        ({"layers": 0, 7: 3}, ["do-everything: there is no parameter '7'."]),
        ({"layers": "1-"}, ["do-everything: layers: expected the last layer of the range at character 3"]),
        ({"layers": "x"}, ["do-everything: layers: expected a layer number at character 1"]),
        ({"layers": -1}, ["do-everything: layers: -1 is not a layer"]),
        ({"layers": True}, ["do-everything: layers: True is not a layer"]),
        ({"layers": [0, "1"]}, ["do-everything: layers: '1' is not a layer"]),
        ({"layers": None}, ["do-everything: layers: None is of no type"]),
        ({"layers": 1.5}, ["do-everything: layers: 1.5 is of no type"]),
        ({"layers": 0, "times": 0}, ["do-everything: times: Input should be greater than or equal to 1."]),
        ({"layers": 0, "times": "many"}, ["do-everything: times: Input should be a valid integer"]),
        ({"layers": 0, "times": 1.5}, ["do-everything: times: Input should be a valid integer"]),
        ({"layers": 0, "size": "big"}, ["do-everything: size: 'big' is not a size"]),
        ({"layers": 0, "size": 0}, ["do-everything: size: 0 is not a size"]),
        ({"layers": 0, "kind": "evne"}, ["do-everything: kind: Input should be 'even' or 'odd'."]),
        ({"layers": 0, "tensors": ""}, ["do-everything: tensors: String should have at least 1 character"]),
        ({"layers": 0, "each": "perhaps"}, ["do-everything: each: Input should be a valid boolean"]),
        (
            {"layer": 0, "times": 0, "size": "big", "kind": 1},
            [
                "do-everything: layers is missing.",
                "do-everything: times: Input should be greater",
                "do-everything: size: 'big' is not a size",
                "do-everything: kind: Input should be 'even' or 'odd'.",
                "do-everything: there is no parameter 'layer'. Did you mean 'layers'?",
            ],
        ),
    ],
)
def test_wrong_parameters_are_all_said_at_once(given: dict[Any, Any], problems: list[str]) -> None:
    declare_everything()
    with pytest.raises(UsageError) as caught:
        registry.OPERATIONS["do-everything"].check(given)
    assert len(caught.value.problems) == len(problems)
    for found, expected in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(expected)


@pytest.mark.usefixtures("scratch")
def test_hyphens_and_underscores_are_the_same_parameter() -> None:
    @operation
    def cut(ckpt: Checkpoint, max_size: Size) -> Checkpoint:
        """Cut.

        Args:
            max_size: How large.
        """
        return ckpt

    assert registry.OPERATIONS["cut"].check({"max-size": "1kB"}) == {"max_size": 1000}


@pytest.mark.parametrize("layers", ["1-2", "1,2", " 1 - 2 ", [1, 2], (1, 2), range(1, 3)])
def test_a_step_is_recorded_once_and_in_one_spelling(ckpt: Checkpoint, layers: Any) -> None:
    assert ts.ops.drop_layers(ckpt, layers).steps == (("drop-layers", {"layers": "1-2"}),)


@pytest.mark.parametrize(
    ("layers", "spelling"),
    [
        (3, "3"),
        ("3", "3"),
        ([3], "3"),
        ([3, 2, 1], "3-1"),
        ("(0-1)*2", "0-1,0-1"),
        ("0-3/2", "0,2"),
        ([0, 2, 3], "0,2-3"),
        ("2*3", "2,2,2"),
    ],
)
def test_layers_are_recorded_in_their_notation(ckpt: Checkpoint, layers: Any, spelling: str) -> None:
    assert ts.ops.select_layers(ckpt, layers).steps[-1].parameters == {"layers": spelling}


def test_defaults_are_recorded_and_what_is_unset_is_left_out(ckpt: Checkpoint) -> None:
    changed = ts.ops.repeat_layers(ts.ops.reverse_layers(ckpt), layers=1, times="3")
    assert changed.steps == (
        ("reverse-layers", {}),
        ("repeat-layers", {"layers": "1", "times": 3}),
    )
    assert ts.ops.reshard(ckpt, "2MB").steps == (("reshard", {"max_shard_size": 2_000_000}),)
    assert ckpt.steps == ()


def test_what_is_recorded_is_checked_to_the_same_again(ckpt: Checkpoint) -> None:
    for changed in (
        ts.ops.select_layers(ckpt, "0-1,3"),
        ts.ops.keep_layers(ckpt, parity="odd"),
        ts.ops.reshard(ckpt, "1MB"),
        ts.ops.cast(ckpt, "float32", "*norm*"),
    ):
        ((name, parameters),) = changed.steps
        spec = find_operation(name)
        assert spec.recorded(spec.check(parameters)) == parameters


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda it: ts.ops.drop_layers(), "drop-layers: give the checkpoint first."),
        (lambda it: ts.ops.drop_layers(ckpt=it, layers=1), "drop-layers: give the checkpoint first."),
        (lambda it: ts.ops.drop_layers(it, 1, 2, 3), "drop-layers: takes 2 parameters: layers, assume_uniform."),
        (lambda it: ts.ops.drop_layers(it, 1, layers=2), "drop-layers: layers is given twice."),
        (lambda it: ts.ops.drop_layers(it), "drop-layers: layers is missing."),
        (lambda it: ts.ops.drop_layers(it, layres=1), "Did you mean 'layers'?"),
        (lambda it: ts.ops.dequantize("a/model"), "dequantize: the first argument is str, not a Checkpoint"),
        (lambda it: ts.exams.inspect("a/model"), "inspect: the first argument is str, not a Checkpoint"),
        (lambda it: ts.exams.verify(it), "verify: the first argument is Checkpoint, not a directory or hub id"),
        (lambda it: ts.exams.inspect(it, tensor="*"), "there is no parameter 'tensor'. Did you mean 'tensors'?"),
    ],
)
def test_wrong_calls_from_python_are_usage_errors(
    ckpt: Checkpoint, call: Callable[[Checkpoint], object], problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        call(ckpt)
    assert problem in str(caught.value)


def test_parameters_may_be_given_by_place_or_by_name(ckpt: Checkpoint) -> None:
    by_place = ts.ops.repeat_layers(ckpt, "1", 3, True)
    by_name = ts.ops.repeat_layers(ckpt, each=True, times=3, layers="1")
    assert by_place.steps == by_name.steps
    assert list(by_place) == list(by_name)
    assert by_place.layers.count == 6


@pytest.mark.usefixtures("scratch")
def test_an_exam_checks_its_parameters_and_records_no_step(ckpt: Checkpoint, tmp_path: Path) -> None:
    @exam
    def count(model: Location, least: Count = 1) -> Findings:
        """Count.

        Args:
            least: The least.
        """
        return Findings({"model": [{"where": str(model), "least": least}]})

    assert registry.EXAMS["count"].takes_location
    assert registry.OPERATIONS == {}
    assert count(tmp_path, least="4").tables == {"model": [{"where": str(tmp_path), "least": 4}]}
    with pytest.raises(UsageError, match="count: least: Input should be greater"):
        count(str(tmp_path), 0)


@pytest.mark.parametrize("name", ["drop-layers", "drop_layers"])
def test_an_operation_is_found_by_either_spelling(name: str) -> None:
    assert find_operation(name).name == "drop-layers"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("dequantise", " Did you mean 'dequantize'?"), ("drop_layer", " Did you mean 'drop-layers'?"), ("qqqqqq", "")],
)
def test_an_unknown_operation_is_refused_with_the_nearest_name(name: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_operation(name)
    assert caught.value.problems == (f"there is no operation {name!r}.{suggestion}",)


def test_every_operation_tells_in_its_schema_what_its_signature_says() -> None:
    for spec in registry.OPERATIONS.values():
        signature = inspect.signature(getattr(ts.ops, spec.function.__name__))
        _, *parameters = signature.parameters.values()
        schema = spec.model.model_json_schema()
        assert list(schema["properties"]) == [each.name.rstrip("_") for each in parameters]
        assert schema.get("required", []) == [each.name for each in parameters if each.default is each.empty]
        assert all(described["description"] for described in schema["properties"].values())
