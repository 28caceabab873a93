"""Formats that are known by name and not decoded, each with the reason."""

from __future__ import annotations

from tensorsurgeon.quantized.parts import Parts, Settings

REPACKED = "is packed for one kernel of a GPU; only the checkpoint that it was made from can be decoded"
METHODS = {
    "quark": "AMD Quark", "hqq": "HQQ", "aqlm": "AQLM", "vptq": "VPTQ", "spqr": "SpQR", "eetq": "EETQ",
    "quanto": "Quanto", "higgs": "HIGGS", "fp_quant": "FP-Quant", "bitnet": "BitNet", "sinq": "SINQ",
    "exl2": "EXL2", "exl3": "EXL3", "gguf": "GGUF", "bitblas": "BitBLAS", "ipex": "IPEX",
}  # fmt: skip
"""Values of `quant_method` that have no decoder here."""

PARTS = {
    ".trellis": "EXL3, whose weights are a trellis code",
    ".svdquant_lora_a": "NVFP4 with a low-rank correction (SVDQuant)",
    ".B_24": "Marlin 2:4, which " + REPACKED,
}
"""Parts that no format here has, and what they show."""

LAYOUTS = {
    "marlin": REPACKED, "marlin_24": REPACKED, "marlin-24": REPACKED, "bitblas": REPACKED, "gemv_fast": REPACKED,
    "llm-awq": REPACKED, "machete": REPACKED, "ipex": REPACKED, "exllama": REPACKED,
}  # fmt: skip
"""Values of `checkpoint_format`, `format` or `version` of a known method that are not decoded."""


def refusal(settings: Settings, parts: Parts) -> str | None:
    """Return why a module is not decoded, where its format is known by name."""
    for part in PARTS.keys() & parts.tensors.keys():
        return f"{parts.module}{part}: is {PARTS[part]}; it is not decoded."
    if settings.method in METHODS:
        return f"{settings.where}: quant_method {settings.method!r} is {METHODS[settings.method]}; it is not decoded."
    if settings.method in ("gptq", "awq"):
        for key in ("checkpoint_format", "format", "version"):
            layout = str(settings.values.get(key)).lower()
            if layout in LAYOUTS:
                return f"{settings.where}: {key} {layout!r} {LAYOUTS[layout]}."
    return None
