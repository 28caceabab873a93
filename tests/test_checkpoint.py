"""Opening checkpoints: what is read, what travels along, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file, save_file

import make
from tensorsurgeon.checkpoint import Checkpoint, Step, extra_layers, layer_count, open_checkpoint, text_config_path
from tensorsurgeon.errors import CheckpointError, UsageError
from tensorsurgeon.names import LayerStack
from tensorsurgeon.source import CONFIG, INDEX, SINGLE
from tensorsurgeon.tensor import LazyTensor

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a checkpoint of three shards with tensors a to f, two a shard."""
    made = {name: torch.full((4, 2), float(n)) for n, name in enumerate("abcdef", 1)}
    return make.save(tmp_path / "sharded", made, {"model_type": "x", "num_hidden_layers": 2}, shards=3)


def edit_index(directory: Path, edit: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def problems_of(directory: str | Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert caught.value.exit_status == 1
    return caught.value.problems


def as_torch(tensor: LazyTensor) -> torch.Tensor:
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    block = tensor.read()
    return torch.frombuffer(block.data, dtype=torch.uint8).view(dtypes[block.dtype]).reshape(block.shape)


@pytest.mark.parametrize("shards", [1, 3])
def test_all_tensors_are_those_that_safetensors_reads(tmp_path: Path, shards: int) -> None:
    directory = make.fp8(tmp_path / "model", layers=2, shards=shards)
    ckpt = open_checkpoint(directory)
    expected = make.read(directory)
    assert make.same({name: as_torch(ckpt[name]) for name in ckpt}, expected)
    assert len(ckpt) == len(expected)
    assert "lm_head.weight" in ckpt
    assert "lm_head.bias" not in ckpt
    assert ckpt.warnings == ()
    assert ckpt.layers == LayerStack("model.layers.", 2)


def test_a_location_may_be_text_or_a_path(plain: Path) -> None:
    assert list(open_checkpoint(str(plain))) == list(open_checkpoint(plain))
    assert open_checkpoint(str(plain)).sources[0].directory == plain.resolve()


def test_tensors_come_in_the_order_of_the_files(sharded: Path) -> None:
    assert list(open_checkpoint(sharded)) == ["a", "d", "b", "e", "c", "f"]


def test_nothing_is_read_but_headers_and_json(plain: Path) -> None:
    whole = (plain / SINGLE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    with open(plain / SINGLE, "r+b") as file:
        file.truncate(header)
        file.truncate(len(whole))
    assert not as_torch(open_checkpoint(plain)["model.norm.weight"]).any()


def test_metadata_is_merged_and_a_clash_is_told(sharded: Path) -> None:
    for number, shard in enumerate(SHARDS):
        save_file(
            load_file(sharded / shard), sharded / shard, {"format": "pt", "of": str(number), f"only{number}": "x"}
        )
    ckpt = open_checkpoint(sharded)
    assert ckpt.metadata == {"format": "pt", "of": "0", "only0": "x", "only1": "x", "only2": "x"}
    assert ckpt.warnings == tuple(
        f"{shard}: __metadata__ 'of' differs from an earlier shard's, which is kept." for shard in SHARDS[1:]
    )


def test_the_config_keeps_its_text(plain: Path) -> None:
    (plain / CONFIG).write_text('{"num_hidden_layers":4,  "eps": 1e-6}')
    ckpt = open_checkpoint(plain)
    assert ckpt.config.encode() == b'{"num_hidden_layers":4,  "eps": 1e-6}'
    assert ckpt.replace(config={**ckpt.config.value, "x": 1}).config.encode() == (
        b'{"num_hidden_layers": 4, "eps": 1e-6, "x": 1}'
    )


COMPANIONS = [
    "LICENSE", "README.md", "chat_template.jinja", "configuration_x.py", "generation_config.json", "merges.txt",
    "modeling_x.py", "preprocessor_config.json", "tokenizer.json", "tokenizer.model", "1_Pooling/config.json",
    "a/b/c.txt",
]  # fmt: skip
OTHER_WEIGHTS = [
    "consolidated.00.pth", "consolidated.safetensors", "flax_model.msgpack", "model-Q4_K_M.gguf", "model.onnx",
    "model.safetensors.other.safetensors", "onnx/model.onnx", "original/params.json", "params.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "training_args.bin", "optimizer.pt",
]  # fmt: skip


def test_what_is_no_weight_travels_along(plain: Path) -> None:
    for file in COMPANIONS:
        (plain / file).parent.mkdir(parents=True, exist_ok=True)
        (plain / file).write_text("{}")
    ckpt = open_checkpoint(plain)
    assert ckpt.files == {file: plain / file for file in COMPANIONS}
    assert ckpt.warnings == ()


def test_other_weights_are_left_behind_with_a_warning(plain: Path) -> None:
    for file in OTHER_WEIGHTS:
        (plain / file).parent.mkdir(parents=True, exist_ok=True)
        (plain / file).write_bytes(b"\x80never unpickled")
    ckpt = open_checkpoint(plain)
    assert list(ckpt.files) == ["generation_config.json"]
    (warning,) = ckpt.warnings
    assert warning.startswith("left behind, as they hold or describe other weights: ")
    assert set(warning.removesuffix(".").split(": ")[1].split(", ")) == set(OTHER_WEIGHTS)


def test_a_shard_that_the_index_does_not_name_is_left_behind(sharded: Path) -> None:
    save_file({"stale": torch.ones(1)}, sharded / "model-00004-of-00004.safetensors")
    ckpt = open_checkpoint(sharded)
    assert "stale" not in ckpt
    assert "model-00004-of-00004.safetensors" in ckpt.warnings[0]


def test_hidden_files_are_not_looked_at(plain: Path) -> None:
    (plain / ".cache" / "huggingface").mkdir(parents=True)
    (plain / ".cache" / "huggingface" / "x.json").write_text("{}")
    (plain / ".gitattributes").write_text("*.safetensors filter=lfs")
    (plain / ".weights.bin").write_bytes(b"x")
    (plain / ".broken").symlink_to("nowhere")
    ckpt = open_checkpoint(plain)
    assert list(ckpt.files) == ["generation_config.json"]
    assert ckpt.warnings == ()


def test_the_receipt_of_an_earlier_run_does_not_travel(plain: Path) -> None:
    (plain / "tensorsurgeon.json").write_text("{}")
    assert list(open_checkpoint(plain).files) == ["generation_config.json"]


def test_a_tensor_that_the_index_does_not_list_travels_with_a_warning(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("d"))
    ckpt = open_checkpoint(sharded)
    assert "d" in ckpt
    assert ckpt.warnings == (f"{INDEX}: does not list 'd', which {SHARDS[0]} holds; it travels along.",)


def test_links_to_shards_are_followed(sharded: Path, tmp_path: Path) -> None:
    expected = make.read(sharded)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "blobs", str(number)))
    ckpt = open_checkpoint(sharded)
    assert make.same({name: as_torch(ckpt[name]) for name in ckpt}, expected)
    assert set(ckpt.sources[0].headers) == set(SHARDS)
    assert list(ckpt.files) == ["generation_config.json"]


def test_a_broken_link_is_refused(plain: Path) -> None:
    (plain / "tokenizer.json").symlink_to("../blobs/gone")
    (problem,) = problems_of(plain)
    assert problem == f"{plain / 'tokenizer.json'}: is a broken link or not a file; mend or remove it."


def test_broken_links_to_shards_are_all_named(sharded: Path) -> None:
    for shard in SHARDS[:2]:
        (sharded / shard).unlink()
        (sharded / shard).symlink_to("../blobs/gone")
    problems = problems_of(sharded)
    assert len(problems) == 2
    assert all(shard in problem for shard, problem in zip(SHARDS, problems, strict=False))


def test_missing_shards_are_all_named(sharded: Path) -> None:
    for shard in SHARDS[1:]:
        (sharded / shard).unlink()
    assert problems_of(sharded) == tuple(
        f"{INDEX}: names the shard {shard}, which is not in {sharded}; fetch it." for shard in SHARDS[1:]
    )


def test_truncated_shards_are_all_named(sharded: Path) -> None:
    for shard in (SHARDS[0], SHARDS[2]):
        (sharded / shard).write_bytes((sharded / shard).read_bytes()[:-1])
    problems = problems_of(sharded)
    assert [problem.split(":")[0] for problem in problems] == [SHARDS[0], SHARDS[2]]
    assert "'d' ends at byte 64" in problems[0]


def test_a_shard_that_is_a_directory_is_refused(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).mkdir()
    (problem,) = problems_of(sharded)
    assert SHARDS[1] in problem


def test_tensors_that_no_shard_holds_are_all_named(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(ghost=SHARDS[0], spectre=SHARDS[2]))
    assert problems_of(sharded) == (
        f"{INDEX}: puts 'ghost' in {SHARDS[0]}, which does not hold it.",
        f"{INDEX}: puts 'spectre' in {SHARDS[2]}, which does not hold it.",
    )


def test_tensors_in_another_shard_than_the_index_says_are_all_named(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(a=SHARDS[1], f=SHARDS[0]))
    assert problems_of(sharded) == (
        f"{INDEX}: puts 'a' in {SHARDS[1]}, but it is in {SHARDS[0]}.",
        f"{INDEX}: puts 'f' in {SHARDS[0]}, but it is in {SHARDS[2]}.",
    )


def test_tensors_in_two_shards_are_all_named(sharded: Path) -> None:
    everything = load_file(sharded / SHARDS[0]) | load_file(sharded / SHARDS[1])
    save_file(everything, sharded / SHARDS[1])
    problems = problems_of(sharded)
    expected = {f"tensor {it!r} is in {SHARDS[0]} and in {SHARDS[1]}; which one counts is not known." for it in "ad"}
    assert expected <= set(problems)


@pytest.mark.parametrize(
    "file",
    ["../../etc/passwd", "/etc/passwd", "..\\..\\x.safetensors", "sub/x.safetensors", "..", ".", "", "a\nb", "a\x00b"],
)
def test_an_index_cannot_reach_outside_its_directory(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(a=file, b="../other"))
    problems = problems_of(sharded)
    assert len(problems) == 2
    assert problems[0].startswith(f"{INDEX}: {file!r} is not a plain file name")
    assert "'../other'" in problems[1]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x", "a": "y"}}', '{"weight_map": {"a": "\\ud800.safetensors"}}',
        '{"weight_map": null}', '{"weight_map":' * 99_999, "\udcff",
    ],
    ids=lambda text: text[:40] or "empty",
)  # fmt: skip
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = problems_of(sharded)
    assert problem.startswith(f"{sharded / INDEX}: ")
    assert problem.endswith("; it is not an index of shards.")


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["model.pt", "x.gguf"]])
def test_a_directory_of_other_formats_is_told_that_pickle_is_never_read(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / CONFIG).write_text("{}")
    for file in files:
        torch.save({"w": torch.ones(1)}, tmp_path / file)
    (problem,) = problems_of(tmp_path)
    assert ", ".join(files) in problem
    assert "pickle above all, are never read" in problem


def test_several_safetensors_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (problem,) = problems_of(sharded)
    assert all(shard in problem for shard in SHARDS)
    assert "which of them belong to the model cannot be known" in problem


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    neither = f"{tmp_path}: holds neither {SINGLE} nor {INDEX}; weights in other formats are never read."
    assert problems_of(tmp_path) == (neither,)


def test_a_directory_without_a_config_is_refused(plain: Path) -> None:
    (plain / CONFIG).unlink()
    assert problems_of(plain) == (f"{plain}: there is no {CONFIG}; this is not a checkpoint directory.",)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "Expecting value"),
        (b"{'a': 1}", "property name"),
        (b"[]", "not a JSON object"),
        (b"\xff{}", "utf-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        (b'{"a":' * 99_999, "nested too deeply"),
        (b'{"a": "\\udfff"}', "surrogates"),
    ],
    ids=["empty", "quotes", "list", "utf-8", "duplicate", "deep", "surrogate"],
)
def test_a_config_that_is_none_is_refused(plain: Path, text: bytes, complaint: str) -> None:
    (plain / CONFIG).write_bytes(text)
    (problem,) = problems_of(plain)
    assert problem.startswith(f"{plain / CONFIG}: ")
    assert complaint in problem


@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_json_that_is_a_directory_is_refused(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    (sharded / file).mkdir()
    (problem,) = problems_of(sharded)
    assert str(sharded / file) in problem


def test_a_location_that_does_not_exist_is_not_understood(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory, and it is not a hub id") as caught:
        open_checkpoint(tmp_path / "nowhere")
    assert caught.value.exit_status == 2


def test_a_location_that_is_a_file_is_not_understood(plain: Path) -> None:
    with pytest.raises(UsageError, match="is a file; name the directory"):
        open_checkpoint(plain / SINGLE)


@pytest.mark.parametrize(
    "location", ["name", "a/b/c", "org/na me", "../x/y", "org/name@", "-org/name", "https://hf.co/a/b"]
)
def test_what_is_no_hub_id_is_not_fetched(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="it is not a hub id"):
        open_checkpoint(location)


def test_names_of_a_glob_come_in_order_and_none_is_an_error(sharded: Path) -> None:
    ckpt = open_checkpoint(sharded)
    assert ckpt.names("[b-e]") == ["d", "b", "e", "c"]
    assert ckpt.names() == list(ckpt)
    with pytest.raises(UsageError, match="nothing matches 'x\\*'"):
        ckpt.names("x*")


def test_a_function_is_mapped_over_the_tensors_of_a_glob_only(sharded: Path) -> None:
    ckpt = open_checkpoint(sharded)
    replacement = LazyTensor("U8", (1,))
    mapped = ckpt.map(lambda tensor: replacement, "a,f")
    assert [name for name in mapped if mapped[name] is replacement] == ["a", "f"]
    assert list(mapped) == list(ckpt)
    assert all(mapped[name] is ckpt[name] for name in "bcde")
    assert all(it is not replacement for it in ckpt.tensors.values())


def test_a_change_makes_a_new_checkpoint(sharded: Path) -> None:
    ckpt = open_checkpoint(sharded)
    changed = ckpt.warn("one").warn("two", "three").replace(steps=(Step("x", {}),), config={"a": 1})
    assert changed.warnings == ("one", "two", "three")
    assert changed.config.value == {"a": 1}
    assert (ckpt.warnings, ckpt.steps, ckpt.config.value["model_type"]) == ((), (), "x")


def test_the_fingerprint_stands_for_config_and_headers(sharded: Path, tmp_path: Path) -> None:
    def fingerprint(directory: Path) -> str:
        return open_checkpoint(directory).sources[0].fingerprint()

    first = fingerprint(sharded)
    moved = sharded.rename(tmp_path / "moved")
    assert fingerprint(moved) == first
    (moved / "README.md").write_text("x")
    assert fingerprint(moved) == first
    config = (moved / CONFIG).read_text()
    (moved / CONFIG).write_text(config + " ")
    assert fingerprint(moved) != first
    (moved / CONFIG).write_text(config)
    save_file(load_file(moved / SHARDS[0]), moved / SHARDS[0], {"other": "metadata"})
    assert fingerprint(moved) != first


def test_the_stamp_tells_whether_a_file_was_changed(sharded: Path) -> None:
    source = open_checkpoint(sharded).sources[0]
    before = source.stamp()
    assert set(before) == {*SHARDS, CONFIG}
    os.utime(sharded / SHARDS[1], ns=(0, 7))
    assert {file for file, stamp in source.stamp().items() if stamp != before[file]} == {SHARDS[1]}


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({}, ()),
        ({"text_config": {}}, ("text_config",)),
        ({"llm_config": {}}, ("llm_config",)),
        ({"thinker_config": {"text_config": {}}, "talker_config": {}}, ("thinker_config", "text_config")),
        ({"text_config": None, "vision_config": {}}, ()),
    ],
)
def test_where_the_config_of_the_language_model_lies(config: dict[str, Any], path: tuple[str, ...]) -> None:
    assert text_config_path(config) == path


def test_the_language_model_s_config(plain: Path) -> None:
    (plain / CONFIG).write_text(
        '{"thinker_config": {"text_config": {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}}}'
    )
    ckpt = open_checkpoint(plain)
    assert ckpt.text_config == {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    assert (layer_count(ckpt.text_config), extra_layers(ckpt.text_config)) == (4, 1)
    assert (layer_count({}), extra_layers({}), extra_layers({"num_mtp_layers": 2})) == (None, 0, 2)
    assert (layer_count({"num_hidden_layers": None, "n_layer": 3}), extra_layers({"num_mtp_layers": None})) == (3, 0)


OPEN = """
import json, sys
from tensorsurgeon.checkpoint import open_checkpoint
from tensorsurgeon.errors import SurgeonError
for location in sys.argv[1:]:
    try:
        ckpt = open_checkpoint(location)
        found = {"name": ckpt.sources[0].name, "tensors": list(ckpt), "files": list(ckpt.files)}
        found["sum"] = sum(ckpt["a"].read().data)
    except SurgeonError as error:
        found = {"error": type(error).__name__, "status": error.exit_status, "problems": error.problems}
    print(json.dumps(found))
"""


def open_elsewhere(home: Path, *locations: str, **environment: str) -> list[dict[str, Any]]:
    """Open checkpoints in another process, as huggingface_hub reads its settings once, when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key[:3] != "HF_"}
    run = subprocess.run(
        [sys.executable, "-c", OPEN, *locations],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **environment},
        cwd=home, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


# The bytes of 1.0 are 00 00 80 3f; "a" holds eight of them: 8 * (0x80 + 0x3f) = 1528.
COMMIT, OLDER = "c" * 40, "0" * 40


def cache(home: Path, repo: str, snapshots: dict[str, Path], refs: dict[str, str]) -> Path:
    """Lay directories out as the hub's cache does: blobs, links to them in snapshots, and names of commits."""
    root = home / "hub" / ("models--" + repo.replace("/", "--"))
    for commit, directory in snapshots.items():
        for path in sorted(directory.iterdir()):
            blob = root / "blobs" / f"{commit[:8]}{path.name}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = root / "snapshots" / commit / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("..", "..", "blobs", blob.name))
    (root / "refs").mkdir()
    for name, commit in refs.items():
        (root / "refs" / name).write_text(commit)
    return root


def test_hub_ids_are_opened_from_the_cache_without_a_network(sharded: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    older = make.save(tmp_path / "older", {"a": torch.full((3,), 5, dtype=torch.uint8)}, {})
    cache(home, "org/name", {COMMIT: sharded, OLDER: older}, {"main": COMMIT, "v1.0": OLDER})
    partial = cache(home, "org/partial", {COMMIT: sharded}, {"main": COMMIT})
    (partial / "snapshots" / COMMIT / SHARDS[1]).unlink()

    locations = ["org/name", "org/name@v1.0", f"org/name@{OLDER}", "org/partial", "org/missing", "org/name@missing"]
    main, tag, commit, incomplete, missing, revision = open_elsewhere(home, *locations, HF_HUB_OFFLINE="1")
    assert main == {"name": "org/name", "tensors": [*"adbecf"], "files": ["generation_config.json"], "sum": 1528}
    assert tag == {"name": "org/name@v1.0", "tensors": ["a"], "files": ["generation_config.json"], "sum": 15}
    assert commit == {**tag, "name": f"org/name@{OLDER}"}
    assert (incomplete["error"], incomplete["status"]) == ("CheckpointError", 1)
    assert SHARDS[1] in incomplete["problems"][0]
    for failed, repo in ((missing, "org/missing"), (revision, "org/name")):
        assert (failed["error"], failed["status"]) == ("CheckpointError", 1)
        (problem,) = failed["problems"]
        assert problem.startswith(f"{repo}: not a directory here, and not to be had from the hub: ")
        assert "\n" not in problem


class Hub:
    """A hub on this machine that serves one repository and remembers what was fetched."""

    def __init__(self, repo: str, directory: Path) -> None:
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(self.path.split("?")[0])
                file = directory / path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
                if path.startswith(f"/api/models/{repo}/revision/main"):
                    siblings = [{"rfilename": it} for it in hub.listing(directory)]
                    self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
                elif path.startswith(f"/api/models/{repo}/tree/{COMMIT}"):
                    self.answer(json.dumps(hub.tree(directory)).encode())
                elif path.startswith(f"/{repo}/resolve/{COMMIT}/") and file.is_file():
                    if self.command == "GET":
                        hub.fetched.append(file.relative_to(directory).as_posix())
                    self.answer(file.read_bytes(), f'"{file.name}"')
                else:
                    self.answer(b"{}", status=404)

            def answer(self, body: bytes, etag: str = '"x"', status: int = 200) -> None:
                self.send_response(status)
                for header, value in (("ETag", etag), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(body)))):
                    self.send_header(header, value)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def listing(self, directory: Path) -> list[str]:
        return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())

    def tree(self, directory: Path) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": it, "size": (directory / it).stat().st_size, "oid": it}
            for it in self.listing(directory)
        ]


@pytest.fixture
def hub(sharded: Path) -> Iterator[Hub]:
    for file in ("pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "x.gguf", "original/w.pth"):
        (sharded / file).parent.mkdir(exist_ok=True)
        (sharded / file).write_bytes(b"x")
    save_file({"stale": torch.ones(1)}, sharded / "model-00004-of-00004.safetensors")
    (sharded / "tokenizer.json").write_text("{}")
    serving = Hub("org/name", sharded)
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


def test_only_what_is_needed_is_fetched_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    found, missing = open_elsewhere(home, "org/name", "org/missing", HF_ENDPOINT=hub.url)
    assert found == {
        "name": "org/name", "tensors": [*"adbecf"], "files": ["generation_config.json", "tokenizer.json"], "sum": 1528,
    }  # fmt: skip
    assert sorted(hub.fetched) == sorted([CONFIG, "generation_config.json", INDEX, "tokenizer.json", *SHARDS])
    assert (missing["error"], missing["status"], len(missing["problems"])) == ("CheckpointError", 1, 1)
    assert "not to be had from the hub" in missing["problems"][0]

    hub.fetched.clear()
    offline, online = open_elsewhere(home, "org/name", HF_HUB_OFFLINE="1") + open_elsewhere(
        home, "org/name", HF_ENDPOINT=hub.url
    )
    assert offline == online == found
    assert hub.fetched == []


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path) -> None:
    (failed,) = open_elsewhere(tmp_path, "org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert (failed["error"], failed["status"]) == ("CheckpointError", 1)
    assert "\n" not in failed["problems"][0]


def test_a_checkpoint_cannot_be_changed(plain: Path) -> None:
    ckpt: Any = open_checkpoint(plain)
    assert isinstance(ckpt, Checkpoint)
    with pytest.raises(AttributeError):
        ckpt.metadata = {}
