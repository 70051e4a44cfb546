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


def largest(score_ET: Tensor, top_k: int) -> Tensor:
    """Say which K of the E scores of a token are the largest; of equal ones the lower index wins.

    Args:
        score_ET: [E, T] scores, tokens last.
        top_k: K, within 1..E.

    Returns:
        [E, T] bool with K True in every column (none where a score is NaN).

    >>> largest(torch.tensor([[0.0], [1.0], [1.0]]), 1).T
    tensor([[False,  True, False]])
    """
    least_T = torch.topk(score_ET.mT, top_k, dim=-1).values[:, -1]
    above_ET, equal_ET = score_ET > least_T, score_ET == least_T
    room_T = top_k - above_ET.sum(0)
    return above_ET | (equal_ET & (equal_ET.cumsum(0) <= room_T))


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
    logits_ET = at_least_float32(logits_TE).mT.contiguous()
    probability_ET = torch.softmax(logits_ET, dim=0)
    if selection == "dense":
        every_TE = torch.ones_like(logits_TE, dtype=torch.bool)
        return Routing(probability_ET.mT, every_TE, probability_ET.mT)
    selected_ET = largest(logits_ET.detach(), top_k)
    if norm_topk_prob:
        weight_ET = torch.softmax(logits_ET.masked_fill(~selected_ET, -torch.inf), dim=0)
    else:
        weight_ET = probability_ET * selected_ET
    return Routing(weight_ET.mT, selected_ET.mT, probability_ET.mT)
