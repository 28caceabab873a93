"""The logit lens: its numbers against float64 by hand on the states of transformers, its files and its refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MANNEQUIN

import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import UsageError
from tensorsurgeon.forward.lensing import Lens
from tensorsurgeon.forward.readings import most_probable, ranks, read, settled
from tensorsurgeon.registry import Findings

TEXTS = ["What is 14 plus 50?", "Amina had 54 coins and found 65 more, so now she has"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def found(prompts: str) -> Findings:
    return ts.exams.lens(ts.open(MANNEQUIN / "bf16"), prompts, words="Yes", top=4)


@pytest.fixture(scope="module")
def by_hand() -> list[dict[str, Any]]:
    """Return depth by depth what transformers' own states say, in float64: RMSNorm, head and softmax written out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MANNEQUIN / "bf16")
    model = AutoModelForCausalLM.from_pretrained(MANNEQUIN / "bf16", dtype=torch.float32)
    raw: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, args, output: raw.append(output))
    gamma, head = (it.weight.detach().double() for it in (model.model.norm, model.lm_head))
    rows = []
    for prompt, text in enumerate(TEXTS, 1):
        raw.clear()
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(ids, output_hidden_states=True, use_cache=False)
        final = output.logits[0].double().softmax(1)
        for depth, states in enumerate([*output.hidden_states[:-1], raw[0]]):
            wide = states[0].double()
            mean_square = wide.square().mean(1, keepdim=True)
            logits = (wide / (mean_square + model.config.rms_norm_eps).sqrt() * gamma) @ head.T
            share = logits.softmax(1)
            for position in range(len(ids[0])):
                p, q = final[position], share[position]
                rows.append({
                    "prompt": prompt, "position": position, "depth": depth,
                    "entropy": float(-(q * q.log()).sum()),
                    "p": float(q.max()), "top": int(q.argmax()),
                    "final p": float(q[p.argmax()]), "final rank": int((q > q[p.argmax()]).sum()) + 1,
                    "kl": float((p * (p / q).log()).sum()), "rms": float(mean_square[position].sqrt()),
                })  # fmt: skip
    return sorted(rows, key=lambda row: (row["prompt"], row["position"], row["depth"]))


def test_every_number_is_that_of_float64_by_hand(found: Findings, by_hand: list[dict[str, Any]]) -> None:
    rows = found.tables["lens"]
    assert len(rows) == len(by_hand) == 7 * sum(row["last"] is not None for row in found.tables["settled"])
    for row, wanted in zip(rows, by_hand, strict=True):
        assert [row[key] for key in ("prompt", "position", "depth")] == [
            wanted[key] for key in ("prompt", "position", "depth")
        ]
        assert row["top ids"][0] == wanted["top"]
        assert row["final rank"] == wanted["final rank"]
        for key in ("entropy", "p", "final p", "rms"):
            assert row[key] == pytest.approx(wanted[key], rel=2e-4, abs=1e-7)
        assert row["kl"] == pytest.approx(wanted["kl"], rel=2e-4, abs=1e-6)
        assert row["bits"] == pytest.approx(row["entropy"] / 0.6931471805599453)


def test_the_last_layer_says_what_the_model_says(found: Findings) -> None:
    last = [row for row in found.tables["lens"] if row["depth"] == 6]
    assert all(row["kl"] == 0 and row["final rank"] == 1 and row["final p"] == row["p"] for row in last)
    (model,) = found.tables["model"]
    assert model["last layer"] == "bit for bit"
    assert (model["layers"], model["norm"], model["norm has beta"], model["batch"]) == (6, "Qwen3RMSNorm", False, 1)


def test_a_position_has_settled_where_its_first_token_stays(found: Findings) -> None:
    rows = found.tables["lens"]
    for line in found.tables["settled"]:
        column = [
            row["top ids"][0] for row in rows if (row["prompt"], row["position"]) == (line["prompt"], line["position"])
        ]
        assert all(token == column[-1] for token in column[line["settled"] :])
        assert line["settled"] == 0 or column[line["settled"] - 1] != column[-1]
    assert settled([3, 5, 3, 3]) == 2
    assert settled([4]) == 0


def test_the_first_unseen_token_has_a_table_of_its_own(found: Findings) -> None:
    lengths = {
        prompt: max(row["position"] for row in found.tables["lens"] if row["prompt"] == prompt) for prompt in (1, 2)
    }
    assert [(row["prompt"], row["position"]) for row in found.tables["next token"]] == [
        (prompt, lengths[prompt]) for prompt in (1, 2) for _ in range(7)
    ]


def test_the_last_position_alone_is_the_same(prompts: str, found: Findings) -> None:
    alone = ts.exams.lens(ts.open(MANNEQUIN / "bf16"), prompts, words="Yes", top=4, last=True)
    for one, other in zip(alone.tables["lens"], found.tables["next token"], strict=True):
        assert one["top ids"] == other["top ids"]
        assert one["entropy"] == pytest.approx(other["entropy"], rel=1e-4, abs=1e-7)


def test_two_runs_are_the_same_to_the_bit(prompts: str, found: Findings) -> None:
    again = ts.exams.lens(ts.open(MANNEQUIN / "bf16"), prompts, words="Yes", top=4)
    assert again.tables == found.tables


def test_ties_are_broken_by_the_number_of_the_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0, 2.0], [0.0] * 6])
    assert most_probable(logits, 2).tolist() == [[1, 3], [0, 1]]
    assert most_probable(logits, 4).tolist() == [[1, 3, 4, 2], [0, 1, 2, 3]]
    assert most_probable(logits, 9).tolist() == [[1, 3, 4, 2, 5, 0], [0, 1, 2, 3, 4, 5]]
    assert ranks(logits, torch.tensor([[4, 5], [4, 0]])).tolist() == [[3, 5], [5, 1]]


def test_tokens_that_cannot_be_said_add_nothing() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    reading = read(logits, torch.tensor([[1.0, float("-inf"), 0.0]]), 2, [[0, 2]])
    assert float(reading.entropy) == pytest.approx(0.6931471805599453)
    assert float(reading.tracked) == pytest.approx(1)
    p = torch.tensor([1.0, 0.0]).double().softmax(0)
    assert float(reading.kl) == pytest.approx(float((p * (p / 0.5).log()).sum()))


def test_norms_change_what_is_seen_but_not_the_check(prompts: str) -> None:
    ckpt = ts.open(MANNEQUIN / "bf16")
    own, bare, same = (ts.exams.lens(ckpt, prompts, norm=it, last=True) for it in ("own", "none", "no-beta"))
    assert own.tables["lens"] == same.tables["lens"]
    assert own.tables["lens"] != bare.tables["lens"]
    assert bare.tables["model"][0]["norm used"] == "none"


def test_small_memory_changes_only_the_last_digits(prompts: str, found: Findings) -> None:
    from tensorsurgeon.running import Running, run_under

    with run_under(Running(memory=400_000)):
        small = ts.exams.lens(ts.open(MANNEQUIN / "bf16"), prompts, words="Yes", top=4)
    for one, other in zip(small.tables["lens"], found.tables["lens"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-5)


def test_a_lens_that_is_not_the_model_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorsurgeon.errors import RefusedError
    from tensorsurgeon.forward.head import Head

    lens = Lens(ts.open(MANNEQUIN / "bf16"), [[5, 6, 7]])
    once = Head.normed
    monkeypatch.setattr(Head, "normed", lambda self, states, use="own": once(self, once(self, states, use), use))
    with pytest.raises(RefusedError, match="does not give the logits of the model's own forward"):
        list(lens.see(1))


def test_a_page_pictures_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "What is 14 plus 50?"}\n')
    words = ["lens", str(MANNEQUIN / "bf16"), str(chats), "--chat", "--words", "Yes,No", "--json"]
    words += ["--beside", str(MANNEQUIN / "tuned"), "--html", str(tmp_path / "lens.html")]
    assert main([*words, "--csv", str(tmp_path / "csv"), "--plot", str(tmp_path / "plots")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in told["models"]] == ["bf16", "tuned"]
    says = {(row["model"], row["prompt"]): row["says"] for row in told["settled"] if row["last"]}
    assert says["bf16", 1] == "6"
    with open(tmp_path / "csv" / "lens.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(told["lens"])
    assert json.loads(rows[0]["top tokens"]) == told["lens"][0]["top tokens"]
    assert (tmp_path / "csv" / "next-token.csv").exists()
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"by-depth-entropy-bits.png", "lens-prompt-1-bf16.png", "lens-prompt-1-tuned.svg"} <= pictures
    assert (tmp_path / "lens.html").stat().st_size > 10**6


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "none.txt: cannot be read: No such file"),
        ("empty.txt", "\n \n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "x"}\n{"text": "y"}\n[1]\n', r"line 2: has no text as its prompt"),
        ("other.jsonl", '{"prompt": "x", "grop": "y"}\n', r"line 1: 'grop' is none of prompt, group, system"),
        ("long.txt", "one two " * 600, r"prompt 1 has \d+ tokens, and the model's context 512"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=told):
        ts.exams.lens(ts.open(MANNEQUIN / "bf16"), str(tmp_path / name))
