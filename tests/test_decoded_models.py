"""What foreign libraries quantised, decoded, loads in transformers whole, and vLLM computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_oracles import MADE, opened
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import tensorsurgeon as ts
from serving import Job, Request, answers

NOT_OF_TRANSFORMERS = ("mlx_moe", "mlx_moe_global_scale")
"""MLX stacks experts under names of its own, which its own library alone loads."""

TOKENS = torch.randint(3, 30, (2, 20), generator=torch.Generator().manual_seed(0))
SERVED = [
    place for place in MADE
    if place.name in ("fp8_block", "ct_int4_g32", "mxfp4", "gptq_v1_sym", "autoawq_gemm_g128", "modelopt_nvfp4")
]  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def decode(place: Path, dest: Path, dtype: str = "float32") -> Path:
    ts.write(ts.ops.dequantize(opened(place), dtype), dest)
    return dest


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    config = AutoConfig.from_pretrained(directory)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model, info


@pytest.mark.parametrize(
    "place", [it for it in MADE if it.name not in NOT_OF_TRANSFORMERS], ids=lambda place: place.name
)
def test_a_decoded_checkpoint_loads_with_every_key(place: Path, tmp_path: Path) -> None:
    _, info = load(decode(place, tmp_path / "dest"))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return of each model the log probabilities of transformers and of vLLM."""
    top = tmp_path_factory.mktemp("decoded")
    jobs, wanted = [], []
    for place in SERVED:
        dest = decode(place, top / place.name)
        with torch.no_grad():
            logits = load(dest)[0](TOKENS).logits
        wanted.append(logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0])
        jobs.append(Job(dest, [Request(row) for row in TOKENS.tolist()]))
    found = (torch.tensor([it.prompt_logprobs for it in each]) for each in answers(jobs, timeout=2400))
    return dict(zip([place.name for place in SERVED], zip(wanted, found, strict=True), strict=True))


@pytest.mark.serving
@pytest.mark.parametrize("name", [place.name for place in SERVED])
def test_vllm_computes_of_a_decoded_checkpoint_what_transformers_does(
    name: str, served: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    wanted, found = served[name]
    assert (found - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.1
