"""The README holds what the code says. `python tests/test_docs.py` brings its reference and tables up to date."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from architectures import ARCHITECTURES, SEQUENCES
from tabulate import tabulate

from tensorsurgeon import ops
from tensorsurgeon.cli import commands
from tensorsurgeon.families import REFUSED
from tensorsurgeon.recipe import load_recipes, make_recipe
from tensorsurgeon.report.reference import reference_text

TOP = Path(__file__).parent.parent
README = TOP / "README.md"
REFERENCE = re.compile(r"(?<=JSON schema of recipes\.\n\n).*(?=\n\n## How it is built)", re.DOTALL)
TABLE = re.compile(r"(?<=not compared\.\n\n)\|.*?(?=\n\n)", re.DOTALL)
NONE = re.compile(r"(?<=never re-ordered: ).*?(?=\n\n)", re.DOTALL)


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def architectures_table() -> str:
    """Return what is proved of each architecture, as `test_architectures` and `test_served_architectures` do it."""
    rows = []
    for name, it in ARCHITECTURES.items():
        everything = set(it.refused) == set(SEQUENCES)
        transformers = "" if everything else "logits, cache" if it.cached else "logits"
        refused = "all" if everything else ", ".join(it.refused)
        rows.append([name, transformers, "log probabilities" if it.vllm else "", refused])
    return tabulate(rows, ["model type", "transformers", "vLLM", "refused"], tablefmt="pipe")


def refused_types() -> str:
    """Return the model types of which no sequence can be said, each with its reason."""
    listed = "; ".join(f"`{kind}` ({why})" for kind, why in sorted(REFUSED.items()))
    before = "These are never re-ordered: "
    text = textwrap.fill(f"{before}{listed}.", 116, break_long_words=False, break_on_hyphens=False)
    return text.removeprefix(before)


GENERATED: dict[str, tuple[re.Pattern[str], Callable[[], str]]] = {
    "reference": (REFERENCE, reference_text),
    "architectures": (TABLE, architectures_table),
    "refused": (NONE, refused_types),
}


@pytest.mark.parametrize("part", GENERATED)
def test_what_is_generated_is_what_the_code_says(part: str) -> None:
    pattern, text = GENERATED[part]
    found = pattern.search(README.read_text())
    assert found
    assert found[0] == text()


def command_lines() -> list[str]:
    return re.findall(r"^    (tensorsurgeon .*)$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", command_lines())
def test_commands_of_the_readme_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    group = commands()
    command = group.commands[words[0]]
    command.make_context(words[0], words[1:], resilient_parsing=False)


def test_there_are_commands_in_the_readme() -> None:
    assert len(command_lines()) >= 4


def test_the_recipes_of_the_readme_are_some(tmp_path: Path) -> None:
    one, several = fenced("yaml")
    assert [step.name for step in make_recipe(yaml.safe_load(one)).steps] == ["dequantize", "drop-layers"]
    (tmp_path / "several.yaml").write_text(several)
    dests = [it.dest for it in load_recipes(tmp_path / "several.yaml")]
    gauss = [f"degraded/mult-gauss-{level}-{seed}" for level in (0, 0.35, 0.7, 1.05, 1.4) for seed in (42, 43, 44)]
    assert dests == [*gauss, *(f"degraded/uniform-quant-{level}-0" for level in (1024, 256, 64, 16, 4))]


def test_the_python_of_the_readme_uses_what_there_is() -> None:
    (text,) = fenced("python")
    compile(text, "README.md", "exec")
    used = re.findall(r"ts\.ops\.(\w+)", text)
    assert used
    assert all(name in ops.__all__ for name in used)


@pytest.mark.parametrize("name", re.findall(r"^    (bin/\w+)", README.read_text(), re.MULTILINE))
def test_scripts_of_the_readme_exist_and_can_be_run(name: str) -> None:
    assert (TOP / name).stat().st_mode & 0o111


def test_paths_in_the_readme_exist() -> None:
    paths = re.findall(r"`((?:tests|recipes|bin|\.ci|tensorsurgeon)/[\w./-]*)`", README.read_text())
    assert paths
    assert all((TOP / path).exists() for path in paths)


if __name__ == "__main__":
    whole = README.read_text()
    for pattern, text in GENERATED.values():
        whole = whole.replace(pattern.search(whole)[0], text())  # type: ignore[index]
    README.write_text(whole)
