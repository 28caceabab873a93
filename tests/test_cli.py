"""The command line: exit statuses, streams, help, JSON, and the same bytes as Python and YAML give."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import make
import tensorsurgeon as ts
from tensorsurgeon import cli
from tensorsurgeon.registry import DERIVATIONS, EXAMS, OPERATIONS

EXIT_STATUS = "Exit status: 0 done, 1 failed, 2 not understood, 3 an exam found something wrong, 130 interrupted."
COMMANDS = [*EXAMS, *OPERATIONS, *DERIVATIONS, "run", "reference"]


class Said(NamedTuple):
    """What a command line gave: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Said:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Said(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.plain(tmp_path_factory.mktemp("cli") / "plain", layers=3, shards=2)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.fp8(tmp_path_factory.mktemp("cli") / "fp8", layers=3)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of everything below a directory, folders and the top included."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in (directory, *directory.rglob("*"))}


def words(text: str) -> str:
    return " ".join(text.split())


def test_status_0_results_on_standard_output_and_nothing_on_standard_error(run: Run, plain: Path) -> None:
    said = run("inspect", plain)
    assert (said.status, said.err) == (0, "")
    assert "Qwen3ForCausalLM" in said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_parameter_and_ends_with_the_exit_statuses(run: Run, command: str) -> None:
    said = run(command, "--help")
    assert (said.status, said.err) == (0, "")
    shown = words(said.out)
    assert shown.endswith(EXIT_STATUS)
    spec = {**EXAMS, **OPERATIONS, **DERIVATIONS}.get(command)
    for parameter in spec.parameters if spec else ():
        operand = parameter.required and command not in OPERATIONS
        assert (f"{parameter.word.upper()}: " if operand else f"--{parameter.word.replace('_', '-')}") in shown
        assert words(parameter.help) in shown
    if command in (*OPERATIONS, "run"):
        for option in ("--dry-run", "--json", "--memory", "--threads", "--max-shard-size", "--shards", "--overwrite"):
            assert option in shown
        assert "-q, --quiet" in shown
        assert "-n, --dry-run" in shown


def test_help_of_all_lists_every_command_and_ends_with_the_exit_statuses(run: Run) -> None:
    said = run("--help")
    assert said.status == 0
    assert words(said.out).endswith(EXIT_STATUS)
    listed = [line.split()[0] for line in said.out.split("Commands:")[1].splitlines() if line.startswith("  ")]
    assert set(COMMANDS) <= set(listed)


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == Said(0, f"{ts.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspcet", "{plain}"], 2, "there is no command 'inspcet'. Did you mean 'inspect'?"),
        (["drop_layers", "{plain}", "{dest}"], 2, "there is no command 'drop_layers'. Did you mean 'drop-layers'?"),
        (["zzzzzz"], 2, "there is no command 'zzzzzz'."),
        (["--vresion"], 2, "Did you mean '--version'?"),
        (["inspect", "--jsn", "{plain}"], 2, "'--json'"),
        (["drop-layers", "{plain}", "{dest}", "--layer", "1"], 2, "Did you mean '--layers'?"),
        (["drop-layers", "{plain}", "{dest}"], 2, "Missing option '--layers'"),
        (["drop-layers", "{plain}"], 2, "Missing argument 'DEST'"),
        (["drop-layers", "{plain}", "{dest}", "--layers", "1-"], 2, "drop-layers: layers: expected the last layer"),
        (["drop-layers", "{plain}", "{dest}", "--layers", "9"], 2, "there is no layer 9; the model has 3 layers"),
        (["drop-layers", "{plain}", "{dest}", "--layers", "0-2"], 1, "a model keeps at least one layer"),
        (["repeat-layers", "{plain}", "{dest}", "--layers", "1", "--times", "0"], 2, "repeat-layers: times: Input"),
        (["cast", "{plain}", "{dest}", "--dtype", "int8"], 2, "'int8' is not one of 'bfloat16'"),
        (["cast", "{plain}", "{dest}", "--dtype", "float16", "--tensors", "x"], 2, "nothing matches 'x'"),
        (["cast", "{fp8}", "{dest}", "--dtype", "float16"], 1, "Run 'dequantize' first."),
        (["dequantize", "{plain}", "{dest}"], 1, "nothing is quantised here"),
        (["dequantize", "{fp8}", "{dest}", "--memory", "lots"], 2, "'--memory': 'lots' is not a size"),
        (["dequantize", "{fp8}", "{dest}", "--memory", "1kB"], 1, "--memory allows 1 kB"),
        (["dequantize", "{fp8}", "{dest}", "--max-shard-size", "0"], 2, "'--max-shard-size': '0' is not a size"),
        (["dequantize", "{fp8}", "{dest}", "--max-shard-size", ""], 2, "'--max-shard-size': '' is not a size"),
        (["reshard", "{fp8}", "{dest}", "--max-shard-size", "5XB"], 2, "max_shard_size: '5XB' is not a size"),
        (["dequantize", "{fp8}", "{dest}", "--threads", "0"], 2, "'--threads'"),
        (["dequantize", "{fp8}", "{dest}", "--threads", "two"], 2, "'--threads'"),
        (["dequantize", "{fp8}", "{dest}", "--shards", "3"], 2, "'--shards': '3' is not a part"),
        (["dequantize", "{fp8}", "{dest}", "--shards", "3/2"], 2, "write it as 3/16"),
        (["dequantize", "{fp8}", "{dest}", "--shards", "0/2"], 2, "write it as 3/16"),
        (["dequantize", "{fp8}", "{dest}", "--shards", "a/b"], 2, "write it as 3/16"),
        (["dequantize", "{fp8}", "{fp8}"], 1, "sources are never written to"),
        (["dequantize", "{fp8}", "{fp8}/inside"], 1, "sources are never written to"),
        (["dequantize", "{fp8}", "{full}"], 1, "exists already"),
        (["dequantize", "{fp8}", "{full}", "--dry-run"], 1, "exists already"),
        (["dequantize", "{fp8}", "{full}", "--overwrite"], 1, "only replaces what tensorsurgeon wrote"),
        (["inspect", "{dest}"], 2, "there is no such directory"),
        (["inspect", "{full}/note.txt"], 2, "is a file; name the directory"),
        (["inspect", "{full}"], 1, "there is no config.json; this is not a checkpoint directory"),
        (["inspect", "{plain}", "--tensors", "x*"], 2, "nothing matches 'x*'"),
        (["inspect", "{plain}", "--tensors", ""], 2, "inspect: tensors: String should have at least 1 character"),
        (["verify", "{dest}"], 2, "there is no such directory"),
        (["run", "{dest}/recipe.yaml"], 2, "cannot be read"),
        (["run", "{full}/note.txt"], 2, "a recipe has the keys"),
    ],
)
def test_errors_go_to_standard_error_with_their_status(
    run: Run, plain: Path, fp8: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    places = {"plain": plain, "fp8": fp8, "dest": tmp_path / "dest", "full": full}
    said = run(*(argument.format(**places) for argument in arguments))
    assert (said.status, said.out) == (status, "")
    assert message in words(said.err)
    assert "Traceback" not in said.err
    assert contents(full) == {"note.txt": b"mine"}
    assert not (tmp_path / "dest").exists()


def test_a_destination_below_a_file_is_an_error_without_a_traceback(run: Run, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    said = run("reverse-layers", plain, tmp_path / "note.txt" / "dest", "-q")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith("error: ")
    assert "note.txt" in said.err
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_all_that_is_wrong_is_said_each_on_a_line_of_its_own(run: Run, plain: Path, tmp_path: Path) -> None:
    said = run("repeat-layers", plain, tmp_path / "dest", "--layers", "x", "--times", "-1")
    assert said.status == 2
    beginnings = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[2].strip() for line in beginnings] == ["layers", "times"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("config.json", b'{"architectures": 5, "quantization_config": {"weight_block_size": 5}, "model_type": []}'),
        ("config.json", b'{"architectures": [1], "quantization_config": {"weight_block_size": "x"}}'),
        ("config.json", b'{"num_hidden_layers": -1, "layer_types": 5, "text_config": []}'),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}'),
        ("model-00001-of-00002.safetensors", b""),
        ("model-00001-of-00002.safetensors", b"\xff" * 64),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_damage_gives_a_traceback(
    run: Run, plain: Path, tmp_path: Path, command: str, file: str, content: bytes
) -> None:
    damaged = shutil.copytree(plain, tmp_path / "damaged")
    (damaged / file).write_bytes(content)
    said = run(command, damaged)
    assert said.status in (0, 1, 3)
    assert (said.status == 3) == (command == "verify")
    assert "Traceback" not in said.err


def test_status_3_where_an_exam_finds_something_wrong(run: Run, plain: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(plain, tmp_path / "damaged")
    (damaged / "model-00001-of-00002.safetensors").unlink()
    said = run("verify", damaged)
    assert (said.status, said.err) == (3, "")
    assert "problem: model.safetensors.index.json: names the shard model-00001-of-00002.safetensors" in said.out


def test_status_130_where_interrupted(run: Run, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "write_plan", interrupted)
    said = run("drop-layers", plain, tmp_path / "dest", "--layers", "1", "-q")
    assert (said.status, said.out) == (130, "")
    assert said.err.strip() == "interrupted; the same command goes on where it stopped."


def test_a_process_exits_with_the_status(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tensorsurgeon", "inspect", tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path}: there is no config.json")


def test_a_reader_that_goes_away_gets_no_traceback(plain: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tensorsurgeon", "inspect", plain, "--tensors", "*"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["inspect", "{plain}"], ["model", "dtypes", "roles", "shards", "problems"]),
        (["inspect", "{plain}", "--tensors", "*norm*"], ["tensors", "problems"]),
        (["verify", "{plain}"], ["checks", "problems"]),
        (["reference"], ["$schema", "title", "type", "properties", "required", "additionalProperties"]),
        (["run", "{recipe}"], ["plan", "receipt", "seconds"]),
        (["reverse-layers", "{plain}", "{dest}"], ["plan", "receipt", "seconds"]),
    ],
)
def test_json_is_all_that_is_printed(
    run: Run, plain: Path, tmp_path: Path, arguments: list[str], keys: list[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {plain}\ndest: {tmp_path / 'written'}\n")
    places = {"plain": plain, "dest": tmp_path / "dest", "recipe": recipe}
    said = run(*(argument.format(**places) for argument in arguments), "--json")
    assert (said.status, said.err) == (0, "")
    assert list(json.loads(said.out)) == keys


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_dry_run_of_every_operation_prints_json_and_writes_nothing(
    run: Run, plain: Path, fp8: Path, tmp_path: Path, name: str
) -> None:
    ts.write(ts.ops.extract_lora(ts.open(plain), base=str(fp8), rank=4), adapter := tmp_path / "adapter")
    save_file({"directions": torch.eye(192)[:3].contiguous()}, tmp_path / "directions.safetensors")
    given = {
        "cast": ["--dtype", "float16"],
        "keep-layers": ["--first", "2"],
        "stitch": ["--layers", "base:0-1,other:1", "--models", f"other={plain}"],
        "extract-lora": ["--base", fp8, "--rank", "4"],
        "merge-lora": ["--adapter", adapter],
        "perturb": ["--method", "ablate", "--level", "0.5", "--group", "mlp"],
        "project": ["--directions", tmp_path / "directions.safetensors"],
        "quantize": ["--format", "fp8-block"],
    }
    needs_layers = any(each.name == "layers" and each.required for each in OPERATIONS[name].parameters)
    options = given.get(name, ["--layers", "1"] if needs_layers else [])
    source = {"dequantize": fp8, "sanitize-lora": adapter}.get(name, plain)
    before = listing(tmp_path), listing(source.parent)
    said = run(name, source, tmp_path / "dest", *options, "--dry-run", "--json")
    assert (said.status, said.err) == (0, "")
    plan = json.loads(said.out)
    assert [list(step) for step in plan["steps"]] == [[name]]
    assert plan["bytes_to_write"] > sum(shard["bytes"] for shard in plan["shards"]) > 0
    assert (listing(tmp_path), listing(source.parent)) == before


def test_a_dry_run_prints_what_is_then_written(run: Run, fp8: Path, tmp_path: Path) -> None:
    arguments = ["dequantize", fp8, tmp_path / "dest", "--max-shard-size", "1MB"]
    plan = json.loads(run(*arguments, "-n", "--json").out)
    assert json.loads(run(*arguments, "--json").out)["plan"] == plan
    written = {path.name: path.stat().st_size for path in (tmp_path / "dest").glob("*.safetensors")}
    assert written == {shard["file"]: shard["bytes"] for shard in plan["shards"]}
    assert len(written) > 1
    assert (
        sum(len(content) for name, content in contents(tmp_path / "dest").items() if name != "tensorsurgeon.json")
        == (plan["bytes_to_write"])
    )


def test_the_plan_and_the_result_are_told_and_quiet_tells_nothing(run: Run, plain: Path, tmp_path: Path) -> None:
    told = run("reverse-layers", plain, tmp_path / "told")
    assert told.err == ""
    assert "reverse-layers" in told.out
    assert told.out.splitlines()[-1].startswith(f"wrote {tmp_path / 'told'}: ")
    assert run("reverse-layers", plain, tmp_path / "quiet", "-q") == Said(0, "", "")
    assert contents(tmp_path / "quiet") == contents(tmp_path / "told")


def test_overwrite_replaces_our_own_output_and_without_it_nothing_is_replaced(
    run: Run, plain: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    assert run("drop-layers", plain, dest, "--layers", "0", "-q").status == 0
    before = contents(dest)
    refused = run("drop-layers", plain, dest, "--layers", "1", "-q")
    assert refused.status == 1
    assert "exists already; choose another place, or replace it with --overwrite" in refused.err
    assert contents(dest) == before
    assert run("drop-layers", plain, dest, "--layers", "1", "-q", "--overwrite").status == 0
    assert json.loads((dest / "tensorsurgeon.json").read_text())["steps"] == [{"drop-layers": {"layers": "1"}}]
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_parts_are_completed_by_a_run_without_shards(run: Run, plain: Path, tmp_path: Path) -> None:
    arguments = ["reverse-layers", plain, tmp_path / "dest", "--max-shard-size", "300kB"]
    part = run(*arguments, "--shards", "2/2")
    assert part.status == 0
    assert part.out.splitlines()[-1] == (
        f"wrote a part of the shards; run without --shards to complete {tmp_path / 'dest'}."
    )
    assert not (tmp_path / "dest").exists()
    assert run(*arguments, "-q").status == 0
    assert run("reverse-layers", plain, tmp_path / "whole", "--max-shard-size", "300kB", "-q").status == 0
    assert contents(tmp_path / "dest") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("source", "apply", "yaml", "arguments"),
    [
        ("fp8", lambda it: ts.ops.dequantize(it), "dequantize", ["dequantize"]),
        ("fp8", lambda it: ts.ops.dequantize(it, "float32"), "dequantize: {dtype: float32}",
         ["dequantize", "--dtype", "float32"]),
        ("fp8", lambda it: ts.ops.drop_layers(it, [0, 1]), "drop-layers: {layers: [0, 1]}",
         ["drop-layers", "--layers", "0-1"]),
        ("plain", lambda it: ts.ops.cast(it, "float16", "*proj*"), "cast: {dtype: float16, tensors: '*proj*'}",
         ["cast", "--dtype", "float16", "--tensors", "*proj*"]),
        ("plain", lambda it: ts.ops.repeat_layers(it, 1, 3, True), "repeat_layers: {layers: 1, times: 3, each: true}",
         ["repeat-layers", "--layers", "1", "--times", "3", "--each"]),
    ],
)  # fmt: skip
def test_python_yaml_and_command_line_write_the_same_bytes(
    run: Run, plain: Path, fp8: Path, tmp_path: Path,
    source: str, apply: Callable[[ts.Checkpoint], ts.Checkpoint], yaml: str, arguments: list[str],
) -> None:  # fmt: skip
    directory = {"plain": plain, "fp8": fp8}[source]
    ts.write(apply(ts.open(directory)), tmp_path / "python", max_shard_size="1MB")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {directory}\ndest: {tmp_path / 'yaml'}\nmax_shard_size: 1MB\nsteps:\n- {yaml}\n")
    assert run("run", recipe, "-q").status == 0
    assert run(*arguments, directory, tmp_path / "cli", "-q", "--max-shard-size", "1MB").status == 0
    written = contents(tmp_path / "python")
    assert {"config.json", "generation_config.json", "tensorsurgeon.json"} < set(written)
    assert contents(tmp_path / "yaml") == written
    assert contents(tmp_path / "cli") == written


def test_settings_of_run_are_laid_over_the_recipe(run: Run, plain: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: nowhere\ndest: {tmp_path / 'dest'}\nsteps: [drop-layers: {{layers: 9}}]\n")
    said = run("run", recipe, "--set", f"source={plain}", "--set", "steps.0.layers=0-1", "-n", "--json")
    assert said.status == 0
    assert json.loads(said.out)["steps"] == [{"drop-layers": {"layers": "0-1"}}]


def test_the_reference_has_every_operation_and_exam_with_every_parameter(run: Run) -> None:
    text = run("reference").out
    headings = [line for line in text.splitlines() if line.startswith("#### ")]
    others = {
        "diff": "MODEL OTHER", "noise": "MODEL QUANTIZED", "report": "RESULTS...", "sweep": "STUDY",
        "lens": "MODEL PROMPTS", "similarity": "MODEL PROMPTS",
    }  # fmt: skip
    operands = [(name, "SRC DEST") for name in OPERATIONS]
    operands += [(name, others.get(name, "MODEL")) for name in EXAMS]
    operands += [("collect", "MODEL PROMPTS OUT"), ("directions", "ACTIVATIONS OUT")]
    assert headings == [f"#### `{name} {operand}`" for name, operand in operands]
    for section, (name, _) in zip(text.split("#### ")[1:], operands, strict=True):
        spec = {**OPERATIONS, **EXAMS, **DERIVATIONS}[name]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == [each.name for each in spec.parameters]
        assert all(each.help in row for row, each in zip(rows, spec.parameters, strict=True))
    assert "| `dtype` | `bfloat16` | What the weights become. One of `bfloat16`, `float16`, `float32`. |" in text
