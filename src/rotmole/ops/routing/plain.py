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


class Routed(NamedTuple):
    """What a layer's router said, as far as it is known outside of the fused function.

    Attributes:
        logits_TE: [T, E] scores.
        routing: None where it was made inside; `route` makes it again from the logits.
        index_KT: [K, T] numbers of the chosen experts where it was made inside; None where all
            experts are used, or under torch.compile.
    """

    logits_TE: Tensor
    routing: Routing | None
    index_KT: Tensor | None = None


class Chosen(NamedTuple):
    """The experts a token uses.

    Attributes:
        weight_KT: [K, T] their weights; [E, T] where all are used.
        index_KT: [K, T] their numbers, best first; None where all are used.
        probability_ET: [E, T] softmax over all, where weight_KT is not normalised; else None.
    """

    weight_KT: Tensor
    index_KT: Tensor | None
    probability_ET: Tensor | None


def choose(logits_ET: Tensor, *, top_k: int, selection: str, norm_topk_prob: bool) -> Chosen:
    """Select and weigh experts as `route` does, in fewer operations and without autograd.

    Args:
        logits_ET: [E, T] router scores in at least float32, tokens last.
        top_k, selection, norm_topk_prob: as in `route`, and valid.

    Returns:
        Chosen; equal to `route` up to rounding.

    >>> choose(torch.tensor([[0.0], [1.0], [1.0]]), top_k=2, selection="top_k",
    ...        norm_topk_prob=True).index_KT
    tensor([[1],
            [2]])
    """
    if selection == "dense":
        return Chosen(torch.softmax(logits_ET, dim=0), None, None)
    order = torch.sort(logits_ET, dim=0, descending=True, stable=True)  # equal ones keep order
    index_KT = order.indices[:top_k]
    if norm_topk_prob:
        return Chosen(torch.softmax(order.values[:top_k], dim=0), index_KT, None)
    probability_ET = torch.softmax(logits_ET, dim=0)
    return Chosen(probability_ET.gather(0, index_KT), index_KT, probability_ET)


def spread_chosen(weight_KT: Tensor, index_KT: Tensor | None, experts: int) -> Tensor:
    """Return the weights of all experts [E, T], 0 where not chosen.

    >>> spread_chosen(torch.tensor([[0.75], [0.25]]), torch.tensor([[2], [0]]), 3).T
    tensor([[0.2500, 0.0000, 0.7500]])
    """
    if index_KT is None:
        return weight_KT
    weight_ET = weight_KT.new_zeros(experts, weight_KT.shape[1])
    return weight_ET.scatter_(0, index_KT.long(), weight_KT)
