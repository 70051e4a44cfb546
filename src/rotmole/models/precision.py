"""The device, the number format and the quantisation of a model."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError, ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATION_PACKAGE = {
    "bnb-8bit": "bitsandbytes",
    "bnb-4bit-nf4": "bitsandbytes",
    "torchao-int8": "torchao",
}
_MARGIN = 1.3  # without it, two runs on one machine could choose differently at a near tie


def choose_device(section: ModelSection) -> torch.device:
    """Return the device: that of `model.device`, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        ModelError: this machine does not have the device.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [name for name, is_present in present.items() if is_present]
    kind = available[0] if section.device == "auto" else section.device
    if kind not in available:
        raise ModelError(
            f"model.device: {kind!r} is not available on this machine, which has "
            f"{', '.join(available)}; use model.device: auto."
        )
    if kind == "cuda":  # torchrun starts one process for each GPU
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(kind)


def choose_dtype(section: ModelSection, device: torch.device) -> torch.dtype:
    """Return the number format: that of `model.dtype`, else bfloat16 if it is faster.

    With ``auto`` it is on CUDA bfloat16 if the GPU supports it, on MPS float32, and on the CPU
    bfloat16 if `bfloat16_is_faster`.
    """
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and bfloat16_is_faster():
        return torch.bfloat16
    return torch.float32


@lru_cache(maxsize=1)
def bfloat16_is_faster(seconds: float = 0.5) -> bool:
    """Return whether a matrix product on the CPU is 1.3 times as fast in bfloat16 as in float32.

    Both are timed in turns and the best times compared. A processor without bfloat16 instructions
    is several times slower in bfloat16, one with them is two to four times faster, so the margin
    keeps the answer stable.

    Args:
        seconds: duration of the measurement.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 512, generator=generator)
    right = torch.randn(512, 1024, generator=generator)
    operands = {dtype: (left.to(dtype), right.to(dtype)) for dtype in best}
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while True:
            for dtype, (a, b) in operands.items():
                start = time.perf_counter()
                torch.matmul(a, b)
                best[dtype] = min(best[dtype], time.perf_counter() - start)
            if time.perf_counter() > end:
                return best[torch.float32] > _MARGIN * best[torch.bfloat16]


def quantization_config(section: ModelSection, dtype: torch.dtype) -> Any:
    """Return the quantization_config argument of ``from_pretrained``.

    Args:
        dtype: number format of the computation and of everything that is not quantised.

    Returns:
        A transformers quantisation configuration, or None for ``quantization: none``.

    Raises:
        ConfigError: the package for the quantisation is not installed.

    Source: Dettmers et al., LLM.int8() (2208.07339) and QLoRA (2305.14314); torchao int8 weights.
    """
    if section.quantization == "none":
        return None
    package = QUANTIZATION_PACKAGE[section.quantization]
    if find_spec(package) is None:
        raise ConfigError(
            f"model.quantization: {section.quantization} needs the package {package}: "
            "pip install 'rotmole[quant]'."
        )
    import transformers

    if section.quantization == "bnb-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if section.quantization == "bnb-4bit-nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())
