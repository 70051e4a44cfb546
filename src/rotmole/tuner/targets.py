"""What can be adapted: linear layers, their widths, and quantised ones that can be trained."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear layer; None for any other module.

    A Conv1D keeps its weight transposed; of an adapted layer it is the base layer that counts.
    """
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features), int(layer.out_features)
    return None


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU.

    On a CPU with AVX512-BF16 it does so at the first forward pass in eval mode. Its kernel for
    packed weights has no backward pass: after the first validation every gradient below such a
    layer would be 0, without a word. And state_dict(), of which every save is made, unpacks: the
    scales, by then bfloat16, are quantised anew, or left transposed if they are not themselves
    quantised, so that the base's own outputs change by up to some per cent (bitsandbytes 0.50,
    functional._convert_weight_packed_for_cpu_inverse).

    Args:
        model: a model; its layers of other kinds are left alone.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment] # no tensor
