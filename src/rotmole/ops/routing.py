"""The scaling gate: router scores -> which experts a token uses, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.precision import at_least_float32, without_autocast

SELECTIONS = ("top_k", "dense")


class Routing(NamedTuple):
    """What the scaling gate decided.

    Attributes:
        weight_TE: [T, E] weight of each expert, exactly 0 where it is not selected.
        selected_TE: [T, E] True where the expert is selected.
        probability_TE: [T, E] softmax over all experts, for balance losses and reports.
    """

    weight_TE: Tensor
    selected_TE: Tensor
    probability_TE: Tensor


def router_logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """Score every expert for every token: logits = x W_router^T, in at least float32.

    Args:
        x_TD: [T, D] layer input.
        router_ED: [E, D] router weight, one row an expert, no bias.

    Returns:
        [T, E] logits.
    """
    with without_autocast(x_TD):
        router_ED = at_least_float32(router_ED)
        return torch.nn.functional.linear(x_TD.to(router_ED.dtype), router_ED)


def route(
    logits_TE: Tensor, *, top_k: int, selection: str = "top_k", norm_topk_prob: bool = True
) -> Routing:
    """Select experts and weigh them.

        S = the K largest logits of a token;  p = softmax(logits)
        g = softmax of the K selected logits        (norm_topk_prob, the default)
        g = p on S, 0 elsewhere                     (norm_topk_prob false, as in Switch)
        g = p everywhere                            (selection "dense")

    The first form equals p renormalised over S, but its gradient at K = 1 is exactly zero, where
    dividing leaves rounding noise that Adam would turn into a random walk. Of equal logits the
    expert with the lower index wins, on every machine.

    Args:
        logits_TE: [T, E] router scores.
        top_k: K, how many experts a token uses; ignored by "dense".
        selection: "top_k" or "dense".
        norm_topk_prob: whether the selected weights sum to one.

    Returns:
        Routing, in at least float32.

    Raises:
        ValueError: an unknown selection, or top_k outside 1..E.

    Source: top-k softmax gates after Shazeer et al. 2017 (arXiv 1701.06538); Switch: 2101.03961.

    >>> route(torch.tensor([[0.0, 1.0, 1.0]]), top_k=2).weight_TE
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    experts = logits_TE.shape[-1]
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}; it must be one of {', '.join(SELECTIONS)}")
    if selection == "top_k" and not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; it must lie in 1..{experts}, the number of experts")
    logits_TE = at_least_float32(logits_TE)
    probability_TE = torch.softmax(logits_TE, dim=-1)
    if selection == "dense":
        every_TE = torch.ones_like(probability_TE, dtype=torch.bool)
        return Routing(probability_TE, every_TE, probability_TE)
    order_TE = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices
    selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    selected_TE = selected_TE.scatter(-1, order_TE[..., :top_k], True)
    if norm_topk_prob:
        weight_TE = torch.softmax(logits_TE.masked_fill(~selected_TE, -torch.inf), dim=-1)
    else:
        weight_TE = probability_TE * selected_TE
    return Routing(weight_TE, selected_TE, probability_TE)
