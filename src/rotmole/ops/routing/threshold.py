"""The learned threshold of selection "threshold": how probable an expert must be for a token."""

from __future__ import annotations

import torch
from torch import Tensor

from rotmole.ops.precision import at_least_float32, without_autocast


def threshold_shapes(D: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the parameters of the threshold.

    >>> threshold_shapes(8)
    {'router_threshold_weight': (1, 8), 'router_threshold_bias': (1,)}
    """
    return {"router_threshold_weight": (1, D), "router_threshold_bias": (1,)}


def threshold_of(x_TD: Tensor, weight_1D: Tensor, bias_1: Tensor, *, experts: int) -> Tensor:
    """Return how probable an expert must be for a token: tau = sigmoid(w.x + b) / E.

    Args:
        x_TD: [T, D] layer input.
        weight_1D, bias_1: [1, D] and [1].
        experts: E; below 1/E at least one expert of every token passes.

    Returns:
        [T, 1] in at least float32.

    Source: AdaMoLE (arXiv 2405.00361), tau_max = 1/E as its code sets it.

    >>> threshold_of(torch.ones(3, 2), torch.zeros(1, 2), torch.zeros(1), experts=4)[0]
    tensor([0.1250])
    """
    with without_autocast(x_TD):
        # a copy, because the product with one row depends in its last bit on where the row lies in
        # memory, which loading without a copy (low_cpu_mem_usage) leaves to chance
        weight_1D = at_least_float32(weight_1D).clone()
        logit_T1 = x_TD.to(weight_1D.dtype) @ weight_1D.T + at_least_float32(bias_1)
        return torch.sigmoid(logit_T1) / experts
