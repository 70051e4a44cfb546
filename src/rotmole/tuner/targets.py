"""4-bit bases on a CPU: kept in the format in which bitsandbytes can train and save them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU.

    On a CPU with AVX512-BF16 it does so at the first forward pass in eval mode. Its kernel for
    packed weights has no backward pass: after the first validation every gradient below such a
    layer would be 0, without a word. And state_dict(), of which every save is made, unpacks: the
    scales, by then bfloat16, are quantised anew, or left transposed where they are not themselves
    quantised, so that the base's own outputs change by up to some per cent (bitsandbytes 0.50,
    functional._convert_weight_packed_for_cpu_inverse).

    Args:
        model: a model; its layers of other kinds are left alone.

    Source: our choice.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment] # no tensor


def layer_widths(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer; Conv1D keeps its weight transposed."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features
