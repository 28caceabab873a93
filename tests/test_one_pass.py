"""Many models in one pass over their layers: against each of them really written, and loaded by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, load
from architectures import make as make_architecture
from test_forward import STREAMED, prompts

import tensorsurgeon as ts
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError, RefusedError, SurgeonError, UsageError
from tensorsurgeon.forward.one_pass import Answered, OnePass
from tensorsurgeon.forward.paths import Wanted
from tensorsurgeon.forward.shelf import Shelf
from tensorsurgeon.ops import drop_layers, perturb, repeat_layers, reverse_layers, select_layers, stitch
from tensorsurgeon.running import Running, run_under

DEPTH = 9
ASKED = frozenset(map(tuple, prompts(21, 12, seed=3)))
TEXTS = frozenset(map(tuple, prompts(30, 17, seed=4)))


def make(directory: Path, name: str, depth: int | None = DEPTH) -> Path:
    """Make a model whose norms are random, and whose head is scaled up so that what is wrong is seen in the logits."""
    longer = {"num_hidden_layers": depth} if depth else {}
    model = load(make_architecture(ARCHITECTURES[name], directory, **longer))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


def arranged(source: Checkpoint, depth: int) -> Iterator[Checkpoint]:
    """Yield deletions, windows, skips, doublings, repetitions and reversals."""
    yield source
    for size in (1, 2, 3, 4):
        yield from (drop_layers(source, f"{at}-{at + size - 1}") for at in range(depth - size + 1))
    yield from (select_layers(source, f"0-{depth - 1}/{step}") for step in (2, 3))
    yield from (repeat_layers(source, str(at)) for at in range(depth))
    yield from (repeat_layers(source, f"{at}-{at + 2}") for at in range(0, depth - 2, 2))
    yield from (select_layers(source, f"0-{at},{at}*3,{at + 1}-{depth - 1}") for at in range(depth - 1))
    yield from (reverse_layers(source, f"{at}-{at + 3}") for at in range(0, depth - 3, 2))
    yield reverse_layers(source, f"0-{depth - 1}")


def damaged(source: Checkpoint) -> Iterator[Checkpoint]:
    """Yield perturbations by level and seed, of layers alone and of the embedding, and those of changed stacks."""
    for level in (0.02, 0.1, 0.3):
        yield from (perturb(source, method="mult-gauss", level=level, group="mlp", seed=seed) for seed in range(8))
    yield from (perturb(source, method="mult-gauss", level=0.1, group="embedding", seed=seed) for seed in range(2))
    yield perturb(repeat_layers(source, "2"), method="mult-gauss", level=0.1, group="attention", seed=1)
    yield drop_layers(perturb(source, method="mult-gauss", level=0.1, group="attention", seed=1), "4")


def run(models: list[Checkpoint], batch: int = 1) -> tuple[OnePass, dict[int, Answered]]:
    made = OnePass([Wanted(it, ASKED, TEXTS) for it in models], batch=batch)
    called: list[int] = []
    made.run(called.append)
    assert sum(called) == made.costs.calls
    return made, dict(made.answers())


def require_same(models: list[Checkpoint], found: dict[int, Answered], directory: Path) -> None:
    """Demand of each model, written and loaded, the same logits and log probabilities, to the bit."""
    assert found.keys() == set(range(len(models)))
    for number, ckpt in enumerate(models):
        place = directory / str(number)
        ts.write(ckpt, place)
        model, answered = load(place), found[number]
        assert answered.logits.keys() == ASKED
        with torch.inference_mode():
            for prompt in ASKED:
                expected = model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1).logits[0, -1]
                assert torch.equal(torch.from_numpy(answered.logits[prompt]), expected)
            for prompt in TEXTS:
                logits = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].double()
                given = torch.tensor(prompt[1:])[:, None]
                chosen = logits.gather(1, given)[:, 0]
                expected = chosen - logits.logsumexp(1)
                scored = answered.scores[prompt]
                assert torch.equal(torch.from_numpy(scored.logprobs), expected)
                assert torch.equal(torch.from_numpy(scored.greedy), chosen >= logits.max(1).values)


@pytest.mark.slow
def test_eighty_variants_are_those_really_written_to_the_bit_in_less_than_seven_tenths_of_the_calls(
    tmp_path: Path,
) -> None:
    source = ts.open(make(tmp_path / "source", "llama"))
    models = [*arranged(source, DEPTH), *damaged(source)]
    assert len(models) >= 80
    made, found = run(models)
    costs = made.costs
    print(costs)
    assert costs.calls < 0.7 * costs.naive
    assert costs.naive == sum(it.layers.count for it in models) * len(ASKED | TEXTS)
    require_same(models, found, tmp_path)


ARRANGED: tuple[Callable[[Checkpoint], Checkpoint], ...] = (
    lambda source: source,
    lambda source: drop_layers(source, "1"),
    lambda source: drop_layers(source, "0-2"),
    lambda source: repeat_layers(source, "3"),
    lambda source: reverse_layers(source, "1-4"),
    lambda source: select_layers(source, "0,2,4,5"),
    lambda source: perturb(source, method="mult-gauss", level=0.05, group="mlp", seed=3),
)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # transformers' GPTBigCode uses it
@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in STREAMED]
)
def test_all_families_give_what_each_variant_gives_by_itself(tmp_path: Path, name: str) -> None:
    """Windows, experts, soft-caps, states, and whatever else a layer may be told by its number."""
    source = ts.open(make(tmp_path / "source", name, None))
    models = []
    for arrange in ARRANGED:
        with suppress(SurgeonError):  # what the config of a family cannot say
            models.append(arrange(source))
    assert len(models) > 1
    made, found = run(models)
    # Of a family whose layers cannot be arranged only the perturbed model is left, and it shares no layer.
    assert made.costs.calls < made.costs.naive or len(models) == 2
    require_same(models, found, tmp_path)


def test_deletions_and_doublings_take_one_pass_and_each_layer_is_read_once(plain: Path) -> None:
    source = ts.open(plain)
    models = [drop_layers(source, str(at)) for at in range(4)] + [repeat_layers(source, str(at)) for at in range(4)]
    # In whatever order they come, and without the model itself.
    for given in (models, models[::-1]):
        costs = OnePass([Wanted(it, ASKED) for it in given]).costs
        assert (costs.passes, costs.layers, costs.naive_layers) == (1, 4, 4 * 3 + 4 * 5)
        # 0; 1 alone, after 0 and after 00; and so on: of each length of prefix what is shared is run once.
        assert costs.calls < costs.naive


def test_a_reversal_takes_another_pass(plain: Path) -> None:
    source = ts.open(plain)
    assert OnePass([Wanted(source, ASKED)]).costs.passes == 1
    assert OnePass([Wanted(reverse_layers(source, "0-3"), ASKED)]).costs.passes == 1
    assert OnePass([Wanted(source, ASKED), Wanted(reverse_layers(source, "0-3"), ASKED)]).costs.passes == 2


def test_quantised_weights_are_decoded_as_they_are_read(tmp_path: Path, fp8: Path) -> None:
    source = ts.open(fp8)
    models = [source, drop_layers(source, "2"), repeat_layers(source, "1")]
    made, found = run(models)
    assert (made.costs.passes, made.costs.layers) == (1, 4)
    require_same([ts.ops.dequantize(it, "float32") for it in models], found, tmp_path)


def test_stitches_share_the_layers_of_both_models(tmp_path: Path, plain: Path) -> None:
    source = ts.open(plain)
    ts.write(perturb(source, method="mult-gauss", level=0.1, group="mlp", seed=1), tmp_path / "other")
    other = ts.open(tmp_path / "other")
    cuts = [stitch(source, f"base:0-{at},other:{at + 1}-3", {"other": other}) for at in range(3)]
    made, found = run([source, *cuts])
    assert (made.costs.passes, made.costs.layers) == (1, 4 + 3)
    require_same([source, *cuts], found, tmp_path)


def test_models_are_run_only_on_what_they_are_asked(plain: Path) -> None:
    source = ts.open(plain)
    one, other = sorted(ASKED)
    wanted = [Wanted(source, frozenset([one])), Wanted(drop_layers(source, "3"), frozenset([one, other]))]
    made = OnePass(wanted)
    made.run()
    # The last layer is run on what the whole model is asked alone.
    assert made.costs.calls == 3 * 2 + 1
    assert list(dict(made.answers())[0].logits) == [one]


def test_batches_move_only_the_last_digits(tmp_path: Path) -> None:
    source = ts.open(make(tmp_path / "source", "gemma3_text", None))
    models = [source, drop_layers(source, "2"), repeat_layers(source, "1")]
    (_, alone), (_, together) = run(models), run(models, batch=3)
    for number, one in alone.items():
        for prompt, logits in one.logits.items():
            torch.testing.assert_close(
                torch.from_numpy(together[number].logits[prompt]), torch.from_numpy(logits), rtol=1e-5, atol=1e-4
            )
        for prompt, scored in one.scores.items():
            assert together[number].scores[prompt].logprobs == pytest.approx(scored.logprobs, abs=1e-4)


def test_states_on_disk_give_the_same_bits(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ts.open(plain)
    models = [source, *(drop_layers(source, str(at)) for at in range(4)), reverse_layers(source, "0-3")]
    made, held = run(models)
    assert made.costs.filed == 0
    largest = made.costs.peak
    monkeypatch.setattr(Shelf, "__init__", small(Shelf.__init__))
    filed, found = run(models)
    # The place of states that are dropped is used again: the file is never larger than the most that is needed.
    file = filed.shelf._scratch._path
    assert file
    assert 0 < file.stat().st_size <= largest
    for number, one in held.items():
        for prompt, logits in one.logits.items():
            assert (found[number].logits[prompt] == logits).all()
        for prompt, scored in one.scores.items():
            assert (found[number].scores[prompt].logprobs == scored.logprobs).all()


def small(made: object) -> object:
    def init(self: Shelf) -> None:
        made(self)  # type: ignore[operator]
        self._room = 0

    return init


def test_a_head_in_slices_scores_alike(plain: Path) -> None:
    models = [ts.open(plain)]
    _, held = run(models)
    with run_under(Running(memory=2 * 192 * 4 * 100)):
        made, found = run(models)
        assert len(next(iter(made.paths.kin.values())).head.slices) > 1
    for prompt, logits in held[0].logits.items():
        assert found[0].logits[prompt] == pytest.approx(logits, abs=1e-5)
    for prompt, scored in held[0].scores.items():
        assert found[0].scores[prompt].logprobs == pytest.approx(scored.logprobs, abs=1e-5)
        assert (found[0].scores[prompt].greedy == scored.greedy).all()


def test_what_is_not_finite_stays_so_and_hurts_no_other_model(plain: Path) -> None:
    source = ts.open(plain)
    broken = perturb(source, method="add-gauss", level=1e38, group="mlp", seed=1)
    _, found = run([source, broken])
    _, alone = run([source])
    for prompt, logits in alone[0].logits.items():
        assert (found[0].logits[prompt] == logits).all()
        assert not torch.isfinite(torch.from_numpy(found[1].logits[prompt])).any()


def test_what_cannot_be_run_is_refused(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(UsageError, match="the model's context 256"):
        OnePass([Wanted(ts.open(plain), frozenset([tuple(range(257))]))])
    sharing = make_architecture(ARCHITECTURES["gemma3n_text"], tmp_path / "sharing")
    with pytest.raises(RefusedError, match="cannot be run layer by layer"):
        OnePass([Wanted(ts.open(sharing), ASKED)])
    source = ts.open(plain)
    less = source.replace(tensors={name: it for name, it in source.tensors.items() if "layers.2.mlp" not in name})
    with pytest.raises(CheckpointError, match="misses"):
        OnePass([Wanted(source, ASKED), Wanted(less, ASKED)])
