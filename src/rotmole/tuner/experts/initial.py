"""How the parameters of an adapter start, from nothing or from the base layer's weight."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rotmole.errors import ConfigError
from rotmole.ops.initial import gaussian, sparse_mask, svd_segments
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.tuner.experts.experts import SHARED, Experts


@torch.no_grad()
def draw(experts: Experts, init_weights: bool | str, A_density: float = 1.0) -> None:
    """Draw all parameters; but for False the output starts at the base model's.

    A, vector gates: Kaiming uniform (a = sqrt 5) of each expert, that is uniform in +-1/sqrt(D); A
    normal with "gaussian". Router and other linear gates: Linear's default, the same bound of their
    own fan-in. Learned keys: normal, so that the logits of router "attention" start as large as
    those of "linear". B, the mix of router "hybrid" and the parameters that ROTATIONS names: 0.
    With False nothing is 0, for tests.

    Args:
        experts: the parameters of one layer; those named `residual_*` become 0.
        init_weights: True, False, "gaussian" or "svd". "svd" draws as True: see `take_segments`.
        A_density: share of each row's entries of A that are not zero.
    """
    zero: tuple[str, ...] = ()
    if init_weights:
        zero = ("expert_B", "router_mix", *ROTATIONS[experts.spec.rotation].zero)
        if experts.spec.shared is not None:
            gates = ROTATIONS[experts.spec.shared.rotation].zero
            zero += ("shared_B", *[SHARED + name for name in gates])
    for tensor, parameter in experts.named_parameters():
        full_name = experts.whole_name(tensor)
        name = full_name.removeprefix(SHARED)
        if full_name in zero or name.startswith("residual_"):
            nn.init.zeros_(parameter)
        elif name in ("expert_A", "A") and init_weights == "gaussian":
            parameter.copy_(gaussian(_three(parameter)))
        elif name in {"rotation_center", "radar_pair_angle", "router_key"}:
            nn.init.normal_(parameter)
        else:
            fan_in = parameter.shape[0 if name.startswith("radar_") else -1]
            if name in ("expert_B", "B"):
                fan_in = parameter.shape[1]
            elif name == "router_threshold_bias":
                fan_in = experts.expert_A.shape[-1]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    if A_density < 1:
        for tensor, parameter in experts.named_parameters():
            if experts.whole_name(tensor) == "expert_A":
                parameter.mul_(sparse_mask(_three(parameter), A_density).to(parameter.device))


def _three(parameter: Tensor) -> tuple[int, int, int]:
    first, second, third = parameter.shape
    return first, second, third


@torch.no_grad()
def take_segments(experts: Experts, base_layer: nn.Module) -> None:
    """Start experts at segments of the base weight's SVD, and remember where they started.

    The base weight is left alone. What balanced gates would add at the start, (s / E) sum_e
    B0_e^T A0_e x, is subtracted in rank space from copies that are never trained; see GOAT in
    docs/family.md. Quantised base weights are read through PEFT. Does nothing where the base weight
    is on the meta device.

    Args:
        experts: the parameters of one layer, with `residual_A` and `residual_B`.
        base_layer: a linear layer, Conv1D or quantised linear layer.

    Raises:
        ConfigError: the weight has too few singular directions.
    """
    number, rank, outputs = experts.expert_B.shape
    narrow = min(outputs, experts.expert_A.shape[-1])
    if number * rank > narrow:
        raise ConfigError(
            f"init_weights is 'svd': {number} experts of rank {rank} need {number * rank} singular "
            f"directions, and a module's weight has {narrow}; lower num_experts or r, or leave "
            "narrow modules out"
        )
    if base_layer.weight.device.type == "meta":
        return
    weight = base_weight(base_layer)
    A_ERD, B_ERO = svd_segments(weight, number, rank, experts.spec.scale)
    for name, value in (("A", A_ERD), ("B", B_ERO)):
        getattr(experts, f"expert_{name}").copy_(value)
        getattr(experts, f"residual_{name}").copy_(value)


def base_weight(base_layer: nn.Module) -> Tensor:
    """Return W [O, D] of a linear layer, Conv1D or quantised linear layer, as it computes."""
    from peft.utils.integrations import dequantize_module_weight

    # of a copy: on a CPU, peft 0.21 leaves an 8-bit layer without its scales
    plain = type(base_layer.weight) is nn.Parameter
    weight: Tensor = dequantize_module_weight(base_layer if plain else copy.deepcopy(base_layer))
    return weight.T if isinstance(base_layer, Conv1D) else weight
