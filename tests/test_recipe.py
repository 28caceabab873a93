"""Recipes: the forms of a step, values laid over, errors with their lines, and the schema."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import UsageError
from tensorsurgeon.recipe import Recipe, load_recipe, make_recipe, recipe_schema

STEPS = """\
source: org/model
dest: out
steps:
  - dequantize
  - drop-layers: {layers: 1-2}
  - reverse-layers:
  - cast: {dtype: float16}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


def problems_of(directory: Path, text: str, *settings: str) -> list[str]:
    """Return what is said of a recipe, without the directory it lies in."""
    with pytest.raises(UsageError) as caught:
        load_recipe(write(directory, text), settings)
    return [problem.replace(f"{directory}/", "") for problem in caught.value.problems]


def test_a_step_is_a_word_or_a_mapping_or_a_mapping_to_nothing(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, STEPS))
    assert (recipe.source, recipe.dest, recipe.max_shard_size) == ("org/model", "out", None)
    assert recipe.steps == (
        ("dequantize", {}),
        ("drop-layers", {"layers": "1-2"}),
        ("reverse-layers", {}),
        ("cast", {"dtype": "float16"}),
    )


@pytest.mark.parametrize("steps", ["", "steps:\n", "steps: []\n", "steps: null\n"])
def test_a_recipe_may_have_no_steps(tmp_path: Path, steps: str) -> None:
    assert load_recipe(write(tmp_path, f"source: a\ndest: b\n{steps}")).steps == ()


def test_underscores_are_as_good_as_hyphens(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "source: a\ndest: b\nsteps: [drop_layers: {layers: 3}, dequantize]\n"))
    assert [step.name for step in recipe.steps] == ["drop_layers", "dequantize"]


def test_a_name_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "source: 2024-02-30\ndest: 2024-05-17\n"))
    assert (recipe.source, recipe.dest) == ("2024-02-30", "2024-05-17")


def test_the_largest_shard_is_a_size(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "source: a\ndest: b\nmax_shard_size: 2GB\n")).max_shard_size == 2_000_000_000


def test_python_data_makes_the_recipe_that_yaml_makes(tmp_path: Path) -> None:
    last = {"cast": {"dtype": "float16"}}
    steps = ["dequantize", {"drop-layers": {"layers": "1-2"}}, {"reverse-layers": None}, last]
    data = {"source": "org/model", "dest": "out", "steps": steps}
    assert make_recipe(data) == load_recipe(write(tmp_path, STEPS))
    assert make_recipe({**data, "steps": tuple(steps)}) == make_recipe(data)


def test_a_recipe_keeps_its_steps_when_the_data_it_was_made_of_changes() -> None:
    parameters = {"layers": "1"}
    recipe = make_recipe({"source": "a", "dest": "b", "steps": [{"drop-layers": parameters}]})
    parameters["layers"] = "2"
    assert recipe.steps[0].parameters == {"layers": "1"}


def test_the_steps_are_applied_in_order(tmp_path: Path) -> None:
    source = make.plain(tmp_path / "plain", layers=4)
    steps = [{"drop-layers": {"layers": "0"}}, {"drop_layers": {"layers": 0}}, {"reshard": {"max-shard-size": "1MB"}}]
    ckpt = make_recipe({"source": str(source), "dest": "out", "steps": steps}).checkpoint()
    by_hand = ts.ops.reshard(ts.ops.drop_layers(ts.ops.drop_layers(ts.open(source), [0]), [0]), 1_000_000)
    assert ckpt.steps == by_hand.steps
    assert ckpt.tensors == by_hand.tensors
    assert ckpt["model.layers.0.mlp.up_proj.weight"] == ts.open(source)["model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (["source=other"], {"source": "other"}),
        (["dest=2024-01-01"], {"dest": "2024-01-01"}),
        (["source=a=b"], {"source": "a=b"}),
        (["max_shard_size=1MB"], {"max_shard_size": 1_000_000}),
        (["steps.1.layers=10-12"], {1: ("drop-layers", {"layers": "10-12"})}),
        (["steps.1.layers=[1, 2]"], {1: ("drop-layers", {"layers": [1, 2]})}),
        (["steps.1.layers=4", "steps.1.layers=5"], {1: ("drop-layers", {"layers": 5})}),
        (["steps.0.dtype=float32"], {0: ("dequantize", {"dtype": "float32"})}),
        (["steps.2.layers=0-1"], {2: ("reverse-layers", {"layers": "0-1"})}),
        (["steps.3.tensors=*norm*", "steps.3.dtype=float32"],
         {3: ("cast", {"dtype": "float32", "tensors": "*norm*"})}),
    ],
)  # fmt: skip
def test_settings_are_laid_over_a_recipe(tmp_path: Path, settings: list[str], changed: dict[Any, Any]) -> None:
    path = write(tmp_path, STEPS)
    plain, recipe = load_recipe(path), load_recipe(path, settings)
    steps = tuple(changed.get(place, step) for place, step in enumerate(plain.steps))
    assert recipe.steps == steps
    for field in ("source", "dest", "max_shard_size"):
        assert getattr(recipe, field) == changed.get(field, getattr(plain, field))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("steps.1.layers", "--set 'steps.1.layers': write it as steps.1.layers=10-12."),
        ("=3", "--set '=3': write it as"),
        ("steps.=3", "--set 'steps.=3': write it as"),
        ("steps.9.layers=3", "--set 'steps.9.layers=3': the recipe has no such place"),
        ("steps.x.layers=3", "--set 'steps.x.layers=3': the recipe has no such place"),
        ("steps.1=dequantize", "--set 'steps.1=dequantize': the recipe has no such place"),
        ("steps.1.layers.0=3", "--set 'steps.1.layers.0=3': the recipe has no such place"),
        ("stesp.1.layers=3", "--set 'stesp.1.layers=3': the recipe has no such place"),
        ("sorce=a", "recipe.yaml: there is no key 'sorce' in a recipe. Did you mean 'source'?"),
        ("source=", "recipe.yaml:1: source is missing, or is not a text."),
        ("steps.1.layers=[1", "--set 'steps.1.layers=[1': is not YAML: "),
        ("steps.1.layers=x", "recipe.yaml:5: drop-layers: layers: expected a layer number"),
        ("steps.1.layer=3", "recipe.yaml:5: drop-layers: there is no parameter 'layer'. Did you mean 'layers'?"),
        ("steps.0.dtype=int8", "recipe.yaml:4: dequantize: dtype: Input should be 'bfloat16', "),
    ],
)
def test_a_setting_that_fits_nowhere_is_refused(tmp_path: Path, setting: str, problem: str) -> None:
    (found,) = problems_of(tmp_path, STEPS, setting)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("source: a\ndest: b\nstep: []\n", "recipe.yaml:3: there is no key 'step' in a recipe. Did you mean 'steps'?"),
        ("source: a\ndest: b\nzzzzz: 1\n", "recipe.yaml:3: there is no key 'zzzzz' in a recipe."),
        ("dest: b\n", "recipe.yaml: source is missing, or is not a text."),
        ("source: a\ndest:\n", "recipe.yaml:2: dest is missing, or is not a text."),
        ("source: [a]\ndest: b\n", "recipe.yaml:1: source is missing, or is not a text."),
        ("dest: b\nsource: ''\n", "recipe.yaml:2: source is missing, or is not a text."),
        ('source: a\ndest: "a\\0b"\n', "recipe.yaml:2: dest is missing, or is not a text."),
        ("source: a\ndest: b\nsteps:\n  dequantize\n", "recipe.yaml:3: steps are a list."),
        ("source: a\ndest: b\nsteps: {}\n", "recipe.yaml:3: steps are a list."),
        ("source: a\ndest: b\nsteps: false\n", "recipe.yaml:3: steps are a list."),
        ("source: a\ndest: b\nsteps:\n- dequantise\n",
         "recipe.yaml:4: there is no operation 'dequantise'. Did you mean 'dequantize'?"),
        ("source: a\ndest: b\nsteps:\n- drop-layer: {layers: 1}\n",
         "recipe.yaml:4: there is no operation 'drop-layer'. Did you mean 'drop-layers'?"),
        ("source: a\ndest: b\nsteps:\n- dequantize: {dtypo: float16}\n",
         "recipe.yaml:4: dequantize: there is no parameter 'dtypo'. Did you mean 'dtype'?"),
        ("source: a\ndest: b\nsteps:\n- cast: float16\n",
         "recipe.yaml:4: cast: parameters are written as {name: value}."),
        ("source: a\ndest: b\nsteps:\n- dequantize\n- cast: {dtype: float16}\n  reshard: {}\n",
         "recipe.yaml:5: a step is the name of an operation, or that name with its parameters."),
        ("source: a\ndest: b\nsteps:\n- 7\n", "recipe.yaml:4: a step is the name of an operation"),
        ("source: a\ndest: b\nsteps:\n- []\n", "recipe.yaml:4: a step is the name of an operation"),
        ("source: a\ndest: b\nsteps:\n-\n", "recipe.yaml:4: a step is the name of an operation"),
        ("source: a\ndest: b\nsteps: [drop-layers]\n", "recipe.yaml:3: drop-layers: layers is missing."),
        ("source: a\ndest: b\nsteps:\n- drop-layers: {layers: 3-}\n",
         "recipe.yaml:4: drop-layers: layers: expected the last layer of the range at character 3"),
        ("source: a\ndest: b\nsteps:\n- drop-layers: {layers: null}\n",
         "recipe.yaml:4: drop-layers: layers: None is of no type"),
        ("source: a\ndest: b\nmax_shard_size: huge\n", "recipe.yaml:3: max_shard_size: 'huge' is not a size"),
        ("source: a\ndest: b\nsource: c\n", "recipe.yaml:3: the key 'source' occurs twice."),
        ("source: a\ndest: b\nsteps:\n- drop-layers:\n    layers: 1\n    layers: 2\n",
         "recipe.yaml:6: the key 'layers' occurs twice."),
        ("source: a\ndest: b\n3: c\n", "recipe.yaml:3: the key 3 is not a word."),
        ("source: a\ndest: b\n[c]: d\n", "recipe.yaml:3: the key ['c'] is not a word."),
        ("source: [a\n", "recipe.yaml: is not YAML: while parsing a flow sequence"),
        ("source: a\n---\nsource: b\n", "recipe.yaml: is not YAML: expected a single document"),
        ("source: !!int seven\ndest: b\n", "recipe.yaml: is not YAML: invalid literal for int()"),
        ("source: &a [*a]\n", "recipe.yaml: is not YAML: maximum recursion depth"),
        ("source: a\x01\n", "recipe.yaml: is not YAML: unacceptable character"),
        ("", "recipe.yaml: a recipe has the keys source, dest, variants, steps, max_shard_size, target."),
        ("- source: a\n", "recipe.yaml: a recipe has the keys source, dest, variants, steps, max_shard_size, target."),
        ("source\n", "recipe.yaml: a recipe has the keys source, dest, variants, steps, max_shard_size, target."),
    ],
)  # fmt: skip
def test_an_error_says_the_file_and_the_line(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems_of(tmp_path, text)
    assert found.startswith(problem)


def test_all_errors_of_a_recipe_are_said_at_once(tmp_path: Path) -> None:
    text = """\
sorce: a
dest: ''
steps:
  - dequantise
  - drop-layers: {layer: 3}
  - cast: bfloat16
  - cast: {dtype: float16}
    reshard: {}
  - repeat-layers:
      layers: 3-
      times: 0
      times: 1
  - !!python/object/apply:os.system {}
max_shard_size: huge
"""
    found = problems_of(tmp_path, text, "stesp.0.layers=3")
    expected = [
        "recipe.yaml:12: the key 'times' occurs twice.",
        "recipe.yaml:13: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is refused",
        "--set 'stesp.0.layers=3': the recipe has no such place",
        "recipe.yaml:1: there is no key 'sorce' in a recipe. Did you mean 'source'?",
        "recipe.yaml: source is missing",
        "recipe.yaml:2: dest is missing",
        "recipe.yaml:4: there is no operation 'dequantise'. Did you mean 'dequantize'?",
        "recipe.yaml:5: drop-layers: layers is missing.",
        "recipe.yaml:5: drop-layers: there is no parameter 'layer'. Did you mean 'layers'?",
        "recipe.yaml:6: cast: parameters are written as",
        "recipe.yaml:7: a step is the name of an operation",
        "recipe.yaml:9: repeat-layers: layers: expected the last layer",
        "recipe.yaml:9: repeat-layers: times: Input should be greater than or equal to 1.",
        "recipe.yaml:13: a step is the name of an operation",
        "recipe.yaml:14: max_shard_size: 'huge' is not a size",
    ]
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)


@pytest.mark.parametrize(
    "text",
    [
        "source: !!python/object/apply:os.system ['touch {witness}']\ndest: b\n",
        "source: a\ndest: b\nsteps: !!python/object/apply:os.system ['touch {witness}']\n",
        "source: a\ndest: b\nsteps:\n- !!python/object/new:os.system ['touch {witness}']\n",
        "source: a\ndest: b\nsteps:\n- dequantize: !!python/object/apply:os.system {{command: 'touch {witness}'}}\n",
        "source: !!python/name:os.system\ndest: b\n",
        "!!python/object/apply:os.system ['touch {witness}']\n",
        "? !!python/object/apply:os.system ['touch {witness}']\n: b\n",
    ],
)
def test_python_objects_in_yaml_are_refused_and_run_nothing(tmp_path: Path, text: str) -> None:
    witness = tmp_path / "witness"
    found = problems_of(tmp_path, text.format(witness=witness))
    assert any("tag:yaml.org,2002:python/" in problem for problem in found)
    assert not witness.exists()


def test_python_objects_in_a_setting_are_refused_and_run_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    found = problems_of(tmp_path, STEPS, f"dest=!!python/object/apply:os.system ['touch {witness}']")
    assert "tag:yaml.org,2002:python/object/apply:os.system" in found[0]
    assert not witness.exists()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"source": "a", "dest": "b", 3: 4}, "recipe: there is no key 3 in a recipe."),
        ({"source": "a", "dest": "b", "steps": [{3: {}}]}, "recipe: a step is the name of an operation"),
        ({"source": "a", "dest": "b", "steps": [{"cast": {3: 4, "dtype": "float16"}}]}, "recipe: cast: there is no"),
        ({"source": "a", "dest": "b", "steps": "cast"}, "recipe: steps are a list."),
        ([], "recipe: a recipe has the keys"),
    ],
)
def test_python_data_is_checked_like_yaml(data: Any, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe(data)
    (found,) = caught.value.problems
    assert found.startswith(problem)


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"source: \xff\n", "can't decode byte 0xff")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert reason in str(caught.value)


def test_the_schema_has_every_operation_with_its_parameters() -> None:
    schema = recipe_schema()
    choices = schema["properties"]["steps"]["items"]["anyOf"]
    words = [choice["const"] for choice in choices if "const" in choice]
    forms = {choice["required"][0]: choice for choice in choices if "const" not in choice}
    assert words == list(forms) == [name.replace("_", "-") for name in words]
    assert {name.replace("-", "_") for name in words} == set(ts.ops.__all__)
    for name, form in forms.items():
        _, *parameters = inspect.signature(getattr(ts.ops, name.replace("-", "_"))).parameters.values()
        described = form["properties"][name]
        assert (form["type"], list(form["properties"]), form["additionalProperties"]) == ("object", [name], False)
        assert described["additionalProperties"] is False
        words = {each.name.rstrip("_"): each.default is each.empty for each in parameters}
        assert list(described["properties"]) == list(words)
        assert described.get("required", []) == [word for word, required in words.items() if required]


def test_the_schema_says_what_a_recipe_needs_and_allows() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["source", "dest"]
    assert schema["additionalProperties"] is False
    assert sorted(schema["properties"]) == sorted([*Recipe.__dataclass_fields__, "variants"])
    assert json.loads(json.dumps(schema)) == schema
