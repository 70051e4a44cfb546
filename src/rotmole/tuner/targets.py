"""What can be adapted: linear layers, their widths, and quantised ones that can be trained."""

from __future__ import annotations

from collections.abc import Iterator
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


def _model_type(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return str(getattr(config, "model_type", None) or "")


def read_as_weights(model: nn.Module, path: str) -> frozenset[str]:
    """Return the names of layers beside `path` whose weights a Mamba's kernels read directly.

    PEFT refuses out_proj and conv1d of some of these models for LoRA. dt_proj of the first Mamba is
    never called either: its weight is multiplied by hand.

    Args:
        model: the base model, which may hold the Mamba as one of several parts.
        path: of a module in it.
    """
    around: Any = model
    kind = _model_type(around)
    for name in path.split(".")[:-1]:
        around = getattr(around, name)
        kind = _model_type(around) or kind
    return _READ_AS_WEIGHTS.get(kind, frozenset())


_MAMBA_2 = frozenset({"out_proj", "conv1d"})
_MAMBA_1 = _MAMBA_2 | {"dt_proj"}
_READ_AS_WEIGHTS = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": frozenset({"conv1d", "dt_proj"}),
    "mamba2": _MAMBA_2,
    "bamba": _MAMBA_2,
    "falcon_h1": _MAMBA_2,
    "granitemoehybrid": _MAMBA_2,
    "nemotron_h": _MAMBA_2,
    "zamba2": _MAMBA_2,
}


def target_notices(model: nn.Module, targets: Any, adapted: list[str]) -> Iterator[str]:
    """Yield what target_modules name and nothing was adapted for.

    Args:
        model: with the adapter's layers.
        targets: the setting as the user gave it.
        adapted: paths of the modules that were adapted.
    """
    fused = fused_experts(model)
    some = f"{fused[0]} and {len(fused) - 1} more" if len(fused) > 1 else "".join(fused)
    reason = "hold the weights of several experts in one tensor, which cannot be adapted"
    if isinstance(targets, str):
        if targets.lower() == "all-linear" and fused:
            yield f"target_modules 'all-linear' leaves out {some}: they {reason}"
        return
    # a module that is there and was not adapted was left out by another setting of the user's
    paths = [*adapted, *(path for path, _ in model.named_modules())]
    missing = [
        name
        for name in sorted(targets or ())
        if not any(path == name or path.endswith(f".{name}") for path in paths)
    ]
    if missing:
        names = ", ".join(repr(name) for name in missing)
        hint = f" ({some} {reason})" if fused else ""
        yield f"no linear layer of the model matches {names} of target_modules{hint}"


def fused_experts(model: nn.Module) -> list[str]:
    """Return the paths of the model's own parameters that hold several experts' matrices."""
    fused = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or ".rotmole_experts." in f".{path}.":
            continue
        own = module.named_parameters(recurse=False)
        experts = hasattr(module, "num_experts") or "expert" in type(module).__name__.lower()
        fused += [f"{path}.{name}" for name, value in own if value.dim() == 3 and experts]
    return fused
