"""The README holds what the code says. `python tests/test_docs.py` brings its reference up to date."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tensorsurgeon import ops
from tensorsurgeon.cli import commands
from tensorsurgeon.recipe import make_recipe
from tensorsurgeon.report.reference import reference_text

TOP = Path(__file__).parent.parent
README = TOP / "README.md"
AROUND = re.compile(r"(?<=JSON schema of recipes\.\n\n).*(?=\n\n## How it is built)", re.DOTALL)


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_reference_is_what_the_declarations_say() -> None:
    found = AROUND.search(README.read_text())
    assert found
    assert found[0] == reference_text()


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


def test_the_recipe_of_the_readme_is_one() -> None:
    (text,) = fenced("yaml")
    assert [step.name for step in make_recipe(yaml.safe_load(text)).steps] == ["dequantize", "drop-layers"]


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
    README.write_text(AROUND.sub(lambda _: reference_text(), README.read_text()))
