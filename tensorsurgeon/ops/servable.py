"""What an engine takes of an adapter: profiles as data, and what keeps an adapter from being served rightly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.lora import Lora, LoraModule, half_pairs, shape_problems
from tensorsurgeon.names import layer_name
from tensorsurgeon.roles import find_role

Profile = Literal["vllm", "vllm-minimal", "peft"]


class Target(NamedTuple):
    """What an engine takes: the groups of roles that may have a pair, and whether it takes whole tensors and DoRA."""

    groups: tuple[str, ...]
    whole: bool = False
    dora: bool = False


PROFILES: Mapping[str, Target] = {
    "vllm": Target(("attention", "mlp", "expert", "mixer", "head", "embedding")),
    "vllm-minimal": Target(("attention", "mlp", "expert", "mixer")),
    "peft": Target(("attention", "mlp", "expert", "mixer", "head", "embedding", "router", "other"), True, True),
}
"""vLLM 0.32, `lora/lora_model.py`; the minimal one is what older engines and FP8 kernels took."""

TABLES = ("embedding", "head")
TABLES_SERVED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("cohere", "cohere2"), ("embedding",)),
    **dict.fromkeys(
        (
            "apertus", "exaone", "exaone4", "exaone_moe", "falcon_h1", "granite", "granite_swa", "granitemoe",
            "granitemoehybrid", "granitemoeshared", "granitemoe_swa", "jamba", "lfm2", "lfm2_moe", "llama", "minicpm",
            "mixtral", "nemotron", "nemotron_h", "nemotron-nas", "phimoe", "qwen3", "qwen3_5_text", "qwen3_5_moe_text",
            "qwen3_moe", "solar",
        ),
        ("embedding", "head"),
    ),
}  # fmt: skip
"""For which of head and embeddings vLLM 0.32 takes pairs, by model type: its classes' `embedding_modules`."""

NOT_SERVED = ("layer_replication", "trainable_token_indices", "lora_bias", "megatron_config", "alora_invocation_tokens")
"""Settings that vLLM refuses, or does not heed without a word."""


CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin training that take something out of the base's weights."""


def kind_problems(ckpt: Checkpoint) -> Iterator[str]:
    """Yield why something is no LoRA adapter, or one whose pairs belong to a base that was changed."""
    if not ckpt.is_adapter:
        yield f"{ckpt.sources[0].name}: is no PEFT adapter; it has no adapter_config.json."
        return
    config = ckpt.config.value
    if config.get("peft_type") != "LORA":
        yield f"adapter_config.json: peft_type is {config.get('peft_type')!r}, not 'LORA'."
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE) and not begins_with_principal_parts(ckpt):
        yield (
            f"adapter_config.json: init_lora_weights is {start!r}: the pairs belong to a base that was changed when "
            "training began. Let PEFT convert it when saving (path_initial_model_for_weight_conversion)."
        )


def config_problems(ckpt: Checkpoint) -> Iterator[str]:
    """Yield what in an adapter's config keeps it from being served."""
    yield from kind_problems(ckpt)
    if not ckpt.is_adapter:
        return
    config = ckpt.config.value
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield f"adapter_config.json: {key} is {value!r}; the scale of the pairs is not known."
    for key in NOT_SERVED:
        if config.get(key):
            yield f"adapter_config.json: {key!r} is {config[key]!r}; merge the adapter into its base instead."


def begins_with_principal_parts(ckpt: Checkpoint) -> bool:
    """Tell whether an adapter is PiSSA's, whose pairs belong to a base without its principal part."""
    return str(ckpt.config.value.get("init_lora_weights")).lower() == "pissa"


def named_as_in(lora: Lora, base: Checkpoint | None) -> tuple[Lora, list[str], list[str]]:
    """Return the adapter with its modules called as the base calls them, what was mended, and what could not be."""
    mended: list[str] = []
    problems: list[str] = []
    modules: dict[str, LoraModule] = {}
    odd = [name for name, key in lora.keys.items() if not key.prefixed or ".default" in name]
    if odd:
        mended.append(f"{len(odd)} names are written as PEFT writes them, such as {odd[0]!r}.")
    moved = 0
    for module, held in lora.modules.items():
        known = _known_as(module, base)
        if known is None:
            problems.append(
                f"{module}: "
                + ("the base has no such module." if base else "is not named from the top of the model.")
                + " An engine would report success and apply nothing."
                + ("" if base else " With --base its name can be found out.")
            )
        elif known in modules:
            problems.append(f"{known}: has two pairs, one of them called {module}.")
        else:
            moved += known != module
            modules[known] = held
    if moved:
        mended.append(f"{moved} modules are called as the base calls them.")
    return lora._replace(modules=modules), mended, problems


def _known_as(module: str, base: Checkpoint | None) -> str | None:
    """Return what a module is called in the base; without one, its name where it begins as those of models do."""
    if base is None:
        return None if module.startswith(("layers.", "h.", "self_attn", "mlp")) else module
    if f"{module}.weight" in base or module in base:
        return module
    found = layer_name(f"{module}.weight")
    if found:
        rest = found.rest.removesuffix(".weight")
        name = f"{base.layers.prefix}{found.index}.{rest}"
        return name if f"{name}.weight" in base else None
    last = module.rpartition(".")[2]
    same = [name.removesuffix(".weight") for name in base if name.removesuffix(".weight").rpartition(".")[2] == last]
    if last == "lm_head" and not same:
        return last
    return same[0] if len(same) == 1 else None


def pair_problems(ckpt: Checkpoint, lora: Lora, base: Checkpoint | None, target: Target) -> Iterator[str]:
    """Yield what can neither be served nor mended."""
    config = ckpt.config.value
    transposed = bool(config.get("fan_in_fan_out"))
    if not lora.modules:
        yield "adapter_model.safetensors: holds no pair of factors."
    if base:
        tied = {"lm_head"} - {name.removesuffix(".weight") for name in base}
        yield from shape_problems(
            lora._replace(modules={name: it for name, it in lora.modules.items() if name not in tied}), base, transposed
        )
    for name in lora.unknown:
        yield f"{name}: is of no kind that is known; what it does would be lost."
    if transposed and not target.whole:
        yield "adapter_config.json: fan_in_fan_out is true, which vLLM does not heed; it serves no model that needs it."
    yield from half_pairs(lora)
    for module, (a, b, _, magnitude, _, rank) in lora.modules.items():
        if a is None or b is None:
            continue
        if a.shape[0] != b.shape[1] or a.shape[0] != rank:
            yield (
                f"{module}: A is {list(a.shape)} and B {list(b.shape)}, and the config says rank {rank}; which of "
                "them the scale goes by is not known."
            )
        if magnitude and not target.dora:
            yield (
                f"{module}: is DoRA, whose lengths no pair of factors can hold. Merge it with merge-lora, and extract "
                "a plain adapter from the result with extract-lora."
            )


def broken_values(ckpt: Checkpoint) -> Iterator[str]:
    """Yield the tensors that hold NaN or infinity; all are read."""
    from tensorsurgeon.kernels.finite import count_nonfinite

    for name, tensor in ckpt.tensors.items():
        if sum(count_nonfinite(tensor.read())):
            yield f"{name}: holds NaN or infinity; every answer would."


def dropped_by(lora: Lora, base: Checkpoint, profile: Profile) -> Lora:
    """Return what of an adapter an engine cannot hold."""
    target = target_of(profile, base)
    modules = {name: it for name, it in lora.modules.items() if group_of(name, it, base) not in target.groups}
    return lora._replace(modules=modules, whole={} if target.whole else lora.whole)


def target_of(profile: str, base: Checkpoint | None) -> Target:
    """Return what an engine takes; of head and embeddings vLLM takes pairs for some models only."""
    target = PROFILES[profile]
    if profile != "vllm" or base is None:
        return target
    tables = TABLES_SERVED.get(base.model_type, ())
    return target._replace(groups=tuple(it for it in target.groups if it not in TABLES or it in tables))


def group_of(module: str, held: LoraModule, base: Checkpoint | None) -> str:
    """Return the group of roles that a module belongs to."""
    if held.embedding:
        return "embedding"
    if base and f"{module}.weight" in base.roles:
        return base.roles[f"{module}.weight"].group
    a, b = held.factors
    return find_role(f"{module}.weight", (b.shape[0], a.shape[1])).group
