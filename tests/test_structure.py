"""How the package is built: the direction of imports, what stays unloaded, names, docstrings, sizes of modules."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import make
import tensorsurgeon as ts
from tensorsurgeon import cli
from tensorsurgeon.registry import DERIVATIONS, EXAMS, OPERATIONS
from tensorsurgeon.report.reference import reference_text

PACKAGE = Path(ts.__file__).parent
NAME = "tensorsurgeon"

ORDER = (
    ("_version", "errors", "charts"),
    ("sizes", "progress", "yaml_lines"),
    ("format",),
    ("reading",),
    ("document", "tensor", "notation", "nearest", "metadata"),
    ("names", "shaping", "variants"),
    ("config",),
    ("fields",),
    ("rules",),
    ("families", "known_fields"),
    ("running", "roles", "scratch"),
    ("fused",),
    ("kernels",),
    ("source",),
    ("checkpoint",),
    ("lora", "groups"),
    ("quantized",),
    ("renaming",),
    ("module_lists",),
    ("arrangement", "engines"),
    ("sequence",),
    ("plan", "parameters", "signature"),
    ("registry",),
    ("receipt", "sharing", "durable"),
    ("stream",),
    ("writer",),
    ("ops",),
    ("mergekit",),
    ("recipe",),
    ("forward",),
    ("evaluate",),
    ("exams", "derivations"),
    ("report",),
    ("options",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Every module or folder of the package; each imports only what stands before it, or lies in its own folder."""

LEAVES = {"_version": set(), "charts": set(), "errors": set(), "progress": set(), "sizes": {"errors"}}

LIGHT = (
    "_version", "charts", "errors", "sizes", "progress", "format", "reading", "document", "tensor", "notation",
    "nearest",
    "names", "shaping", "variants", "yaml_lines", "metadata",
    "config", "fields", "rules", "known_fields", "families", "source", "checkpoint", "roles", "renaming",
    "module_lists", "arrangement", "sequence", "lora", "running", "scratch", "fused", "groups",
    "engines", "plan", "parameters", "signature", "registry", "receipt", "sharing", "stream",
    "durable", "writer", "quantized", "ops", "mergekit", "derivations", "recipe", "options", "cli", "report",
    "__init__", "__main__",
    "exams/__init__", "exams/cancellation", "exams/change_tables", "exams/changes", "exams/claims", "exams/documents",
    "evaluate/__init__", "evaluate/bilingual", "evaluate/choosing", "evaluate/digest", "evaluate/engine",
    "evaluate/grading", "evaluate/labels", "evaluate/layer_changes", "evaluate/ledger", "evaluate/outcome_measures",
    "evaluate/outcomes", "evaluate/prompts", "evaluate/records", "evaluate/result_charts", "evaluate/result_tables",
    "evaluate/result_words", "evaluate/results", "evaluate/serving", "evaluate/study", "evaluate/suite",
    "evaluate/suite_parts", "evaluate/tables",
    "exams/duplicates", "exams/evaluation", "exams/health", "exams/integrity", "exams/lensing", "exams/lines",
    "exams/overview", "exams/reporting", "exams/resemblance", "exams/selection", "exams/streaming", "exams/sweeping",
    "exams/verdict",
)  # fmt: skip
"""Modules that start at once: none of them imports a library of numbers, not even later for its own use."""

HEAVY = ("torch", "numpy", "numba", "transformers", "safetensors", "huggingface_hub", "tqdm", "accelerate")
NUMERIC = ("torch", "numpy", "numba", "transformers")

LONG: dict[str, str] = {
    "exams/verdict": "the rules of autopsy, each with what finds it",
    "tensor": "one class: all that a tensor can be made of, and how it is read",
    "roles": "a table with a rule for each name of a module",
}
"""Modules of more than 260 lines, with the reason."""


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module as a tree, by its path in the package without `.py`."""
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported module or name in full, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_top(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)


def unit(module: str) -> str:
    return module.split("/")[0]


def own_units(names: Iterator[str]) -> set[str]:
    """Return the units of this package among imported names; the package itself stands for its version."""
    return {name.split(".")[1] for name in names if name.startswith(f"{NAME}.")}


def test_every_module_has_its_place_in_the_order() -> None:
    placed = [name for rank in ORDER for name in rank]
    assert len(placed) == len(set(placed))
    assert {unit(module) for module in modules()} == set(placed)


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    rank = {name: place for place, names in enumerate(ORDER) for name in names}
    here = unit(module)
    for other in own_units(imports(modules()[module])) - {here}:
        assert rank[other] < rank[here], f"{module} imports {other}"


def test_leaves_import_next_to_nothing() -> None:
    for module, allowed in LEAVES.items():
        assert own_units(imports(modules()[module])) <= allowed


def test_modules_of_one_folder_do_not_import_each_other_in_a_circle() -> None:
    trees = modules()
    graph = {
        module: {
            name.removeprefix(f"{NAME}.").rpartition(".")[0].replace(".", "/")
            for name in imports(tree)
            if name.startswith(f"{NAME}.{unit(module)}.")
        }
        - {module}
        for module, tree in trees.items()
        if "/" in module and not module.endswith("__init__")
    }
    while graph:
        ready = [module for module, needed in graph.items() if not needed & graph.keys()]
        assert ready, f"a circle among {sorted(graph)}"
        graph = {module: needed for module, needed in graph.items() if module not in ready}


@pytest.mark.parametrize("module", [module for module in modules() if module in LIGHT or unit(module) in LIGHT])
def test_light_modules_import_no_library_of_numbers(module: str) -> None:
    found = {name.split(".")[0] for name in imports(modules()[module])}
    assert not found & set(NUMERIC)
    at_top = set(imports_at_top(modules()[module]))
    assert not {name for name in at_top if name.startswith((f"{NAME}.kernels", f"{NAME}.exams.meta"))}


def test_only_functions_that_compute_load_the_kernels() -> None:
    users = {
        module: {name.split(".")[1] for name in imports(tree) if name.startswith(f"{NAME}.kernels.")}
        for module, tree in modules().items()
        if unit(module) != "kernels"
    }
    assert {module for module, used in users.items() if used} == {
        "derivations/subspaces", "lora", "ops/accounting", "ops/arranging", "ops/directions_file", "ops/dtypes",
        "ops/extracting", "ops/merging", "ops/perturbation", "ops/principal", "ops/projecting", "ops/projection",
        "ops/quantizing", "ops/sanitizing", "ops/servable", "quantized/awq", "quantized/bitsandbytes",
        "quantized/compressed_tensors_packed", "quantized/compressed_tensors_sparse", "quantized/decoding",
        "quantized/fp8", "quantized/gptq", "quantized/mlx", "quantized/modelopt", "quantized/mxfp4_experts",
        "quantized/torchao", "evaluate/installing", "exams/alignment", "exams/cancellation", "exams/changes",
        "exams/health",
        "exams/integrity", "exams/lines", "exams/residuals", "exams/vitals",
    }  # fmt: skip


def loaded_by(script: str, directory: Path) -> set[str]:
    """Return which heavy libraries a fresh interpreter has loaded after a script."""
    report = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\n{report}"], capture_output=True, text=True, cwd=directory, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "script",
    [
        "import tensorsurgeon",
        "import tensorsurgeon.cli",
        "from tensorsurgeon.cli import main; assert main(['inspect', 'fp8']) == 0",
        "from tensorsurgeon.cli import main; assert main(['dequantize', 'fp8', 'never', '--dry-run']) == 0",
        "from tensorsurgeon.cli import main; assert main(['select-layers', 'fp8', 'written', '--layers', '1,0']) == 0",
        "from tensorsurgeon.cli import main; assert main(['reference', '--json']) == 0",
    ],
)
def test_what_needs_no_numbers_loads_no_library_of_them(tmp_path: Path, script: str) -> None:
    make.fp8(tmp_path / "fp8", layers=2)
    assert loaded_by(script, tmp_path) == set()
    assert (tmp_path / "written").exists() == ("written" in script)


def test_what_needs_numbers_loads_a_library_of_them(tmp_path: Path) -> None:
    make.fp8(tmp_path / "fp8", layers=2)
    script = "from tensorsurgeon.cli import main; assert main(['dequantize', 'fp8', 'written', '-q']) == 0"
    assert {"numpy", "numba"} <= loaded_by(script, tmp_path)


def test_the_exported_names() -> None:
    assert ts.__all__ == [
        "Checkpoint", "__version__", "derivations", "exams", "levels", "load_recipe", "load_recipes", "make_recipe",
        "open", "ops", "write",
    ]  # fmt: skip
    assert ts.ops.__all__ == [
        "cast", "dequantize", "drop_layers", "extract_lora", "keep_layers", "merge_lora", "perturb", "project",
        "quantize", "repeat_layers", "reshard", "reverse_layers", "sanitize_lora", "select_layers", "stitch",
    ]  # fmt: skip
    assert ts.exams.__all__ == [
        "autopsy", "diff", "evaluate", "inspect", "lens", "noise", "report", "similarity", "sweep", "verify",
    ]  # fmt: skip
    assert ts.derivations.__all__ == ["collect", "directions"]
    for module in (ts, ts.ops, ts.exams, ts.derivations):
        assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(("folder", "registry"), [("ops", OPERATIONS), ("exams", EXAMS), ("derivations", DERIVATIONS)])
def test_what_is_declared_is_exported_and_in_every_face(folder: str, registry: dict[str, object]) -> None:
    exported = {name.replace("_", "-") for name in getattr(ts, folder).__all__}
    declared = {
        node.name.replace("_", "-")
        for module, tree in modules().items()
        if unit(module) == folder
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(it, ast.Name) and it.id in ("operation", "exam", "derivation") for it in node.decorator_list)
    }
    assert declared == exported == set(registry)
    assert declared <= set(cli.commands().commands)
    assert all(f"#### `{name} " in reference_text() for name in declared)


def public(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield every public class, function and method, but not what is defined inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield inside + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{inside}{node.name}.")


@pytest.mark.parametrize("module", modules())
def test_every_module_and_public_name_has_a_docstring(module: str) -> None:
    tree = modules()[module]
    assert ast.get_docstring(tree)
    assert [name for name, node in public(tree) if not ast.get_docstring(node)] == []  # type: ignore[arg-type]


def test_modules_are_short_but_for_those_with_a_reason() -> None:
    lines = {module: len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in modules()}
    assert {module for module, count in lines.items() if count > 260} == set(LONG)
    assert max(lines.values()) < 400
