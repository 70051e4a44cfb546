"""Where a model runs, in which number format, and whether its weights are quantised."""

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
_MARGIN = 1.3  # a near tie must not make two runs on one machine choose differently


def choose_device(section: ModelSection) -> torch.device:
    """Choose the device: the one asked for, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        ModelError: a device was asked for that this machine does not have.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if section.device == "auto":
        return _device(next(name for name, here in present.items() if here))
    if not present[section.device]:
        here = ", ".join(name for name, found in present.items() if found)
        raise ModelError(
            f"model.device: {section.device!r} is not available here; this machine has {here}. "
            "Use model.device: auto."
        )
    return _device(section.device)


def _device(kind: str) -> torch.device:
    """Give each process that torchrun starts its own card."""
    return (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        if kind == "cuda"
        else torch.device(kind)
    )


def choose_dtype(section: ModelSection, device: torch.device) -> torch.dtype:
    """Choose the number format: the one asked for, else bfloat16 where it is the faster one.

    Args:
        device: where the model will run.

    Returns:
        float32 or bfloat16 for ``auto``: on CUDA bfloat16 where supported, on MPS float32, on the
        CPU what `bfloat16_is_faster` finds.
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
    """Time one matrix product in both formats on the CPU, in turns, and compare the best times.

    A processor without bfloat16 instructions emulates them several times slower than float32; one
    with them is two to four times faster. So the margin of 1.3 keeps the answer stable.

    Args:
        seconds: how long the probe may take.

    Returns:
        Whether bfloat16 is at least 1.3 times as fast.
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
    """Build what ``from_pretrained(quantization_config=...)`` wants.

    Args:
        dtype: the format of computation and of all that is not quantised.

    Returns:
        A transformers quantisation configuration, or None for ``quantization: none``.

    Raises:
        ConfigError: the package that quantises is not installed.

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
