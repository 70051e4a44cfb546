"""Selections beside the plain one: sigmoid scores, a bias, top-p, a threshold, experts' choice.

routing.py's `route` has the usual form (softmax, top-k or dense); `select` takes every setting and
hands the usual form on to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.routing.plain import Routing, route

SCORINGS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Selection:
    """One row of the table of selections.

    Attributes:
        name: the value of the `selection` setting.
        rule: what is selected and with what weight, in ASCII.
        scorings: which values of `scoring` it is defined for.
        normalises: whether `norm_topk_prob` means anything.
        sequences: whether it looks at the other tokens of a sequence.
    """

    name: str
    rule: str
    scorings: tuple[str, ...] = ("softmax",)
    normalises: bool = True
    sequences: bool = False


_TABLE = (
    Selection("top_k", "the K best; g = s over their sum", SCORINGS),
    Selection("dense", "all; g = s over their sum", SCORINGS),
    Selection("top_p", "the fewest best with mass >= p; g = s over their sum"),
    Selection("threshold", "p_e >= tau(x); g = p - tau over its sum", normalises=False),
    Selection(
        "expert_choice", "each expert's best tokens of a sequence; g = p",
        normalises=False, sequences=True,
    ),
)  # fmt: skip

SELECTIONS: dict[str, Selection] = {row.name: row for row in _TABLE}


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


def _best(rank_by_TE: Tensor, count: int) -> Tensor:
    """Mark the `count` largest of each token; of equal ones the lower index wins."""
    order_TE = torch.sort(rank_by_TE.detach(), dim=-1, descending=True, stable=True).indices
    marked_TE = torch.zeros_like(rank_by_TE, dtype=torch.bool)
    return marked_TE.scatter(-1, order_TE[..., :count], True)


def _weighed(log_TE: Tensor, score_TE: Tensor, selected_TE: Tensor, normalise: bool) -> Tensor:
    """Return s over the sum of the selected s (log_TE is log s plus a constant), or s itself.

    As a softmax of logarithms the gradient of a single selected expert is exactly zero.
    """
    if normalise:
        return torch.softmax(log_TE.masked_fill(~selected_TE, -torch.inf), dim=-1)
    return score_TE * selected_TE


def _ranked(
    logits_TE: Tensor,
    *,
    selection: str,
    scoring: str,
    top_k: int,
    norm_topk_prob: bool,
    bias_E: Tensor | None,
) -> Routing:
    """top_k and dense with sigmoid scores, with a bias, or with both."""
    if scoring == "sigmoid":
        log_TE, score_TE = logsigmoid(logits_TE), torch.sigmoid(logits_TE)
        probability_TE = torch.softmax(log_TE, dim=-1)
    else:
        log_TE = logits_TE
        score_TE = probability_TE = torch.softmax(logits_TE, dim=-1)
    if selection == "dense":
        selected_TE = torch.ones_like(logits_TE, dtype=torch.bool)
    else:
        # by logits where nothing is added: scores of large logits are equal, the logits are not
        rank_by_TE = logits_TE if bias_E is None else score_TE + bias_E.to(score_TE.dtype)
        selected_TE = _best(rank_by_TE, top_k)
    weight_TE = _weighed(log_TE, score_TE, selected_TE, norm_topk_prob)
    return Routing(weight_TE, selected_TE, probability_TE)


def _constant(logits_TE: Tensor, *, top_k: int, each: float, bias_E: Tensor | None) -> Routing:
    """Top-k of given scores where every selected expert has the same weight: no gradient."""
    rank_by_TE = logits_TE if bias_E is None else logits_TE + bias_E.to(logits_TE.dtype)
    selected_TE = _best(rank_by_TE, top_k)
    chosen_TE = selected_TE.to(logits_TE.dtype)
    return Routing(chosen_TE * each, selected_TE, chosen_TE / top_k)


def _top_p(logits_TE: Tensor, *, top_p: float, norm_topk_prob: bool) -> Routing:
    probability_TE = torch.softmax(logits_TE, dim=-1)
    order_TE = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices
    sorted_TE = probability_TE.detach().gather(-1, order_TE)
    before_TE = torch.cumsum(sorted_TE, dim=-1).roll(1, dims=-1)  # mass of those more probable
    before_TE[..., :1] = 0
    selected_TE = torch.zeros_like(order_TE, dtype=torch.bool)
    selected_TE = selected_TE.scatter(-1, order_TE, before_TE < top_p)
    weight_TE = _weighed(logits_TE, probability_TE, selected_TE, norm_topk_prob)
    return Routing(weight_TE, selected_TE, probability_TE)


def _threshold(logits_TE: Tensor, *, tau_T1: Tensor) -> Routing:
    probability_TE = torch.softmax(logits_TE, dim=-1)
    margin_TE = torch.relu(probability_TE - tau_T1)
    tiny = torch.finfo(margin_TE.dtype).tiny
    weight_TE = margin_TE / margin_TE.sum(-1, keepdim=True).clamp(min=tiny)
    return Routing(weight_TE, probability_TE >= tau_T1, probability_TE)


def _expert_choice(
    logits_TE: Tensor, *, capacity: int, sequences: int, mask_T: Tensor | None
) -> Routing:
    probability_TE = torch.softmax(logits_TE, dim=-1)
    experts = logits_TE.shape[-1]
    if not logits_TE.shape[0]:
        return Routing(probability_TE, probability_TE.bool(), probability_TE)
    by_sequence = probability_TE.detach().reshape(sequences, -1, experts)
    valid_NS = torch.ones_like(by_sequence[..., 0], dtype=torch.bool)
    if mask_T is not None:
        valid_NS = mask_T.to(logits_TE.device).bool().reshape(valid_NS.shape)
    count_N = (capacity * valid_NS.sum(1) // experts).clamp(min=1)
    offered = by_sequence.masked_fill(~valid_NS.unsqueeze(-1), -torch.inf)
    order = torch.sort(offered, dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order)
    index_S = torch.arange(order.shape[1], device=order.device)[None, :, None].expand_as(order)
    place = place.scatter(1, order, index_S)  # each token's place in each expert's order
    selected = (place < count_N[:, None, None]) & valid_NS.unsqueeze(-1)
    selected_TE = selected.flatten(0, 1)
    return Routing(probability_TE * selected_TE, selected_TE, probability_TE)


def select(
    logits_TE: Tensor,
    *,
    selection: str = "top_k",
    scoring: str = "softmax",
    top_k: int = 1,
    norm_topk_prob: bool = True,
    top_p: float = 1.0,
    tau_T1: Tensor | None = None,
    bias_E: Tensor | None = None,
    weight: str = "learned",
    sequences: int = 1,
    mask_T: Tensor | None = None,
) -> Routing:
    """Select experts and weigh them, by any of the selections.

        s = softmax over all experts, or sigmoid of each logit;  p = s over its sum
        top_k          S = the K largest s + bias;       g = s over its sum in S, or s
        dense          S = all;                          g likewise
        top_p          S = the fewest largest p with sum >= top_p;             g likewise
        threshold      S = {e: p_e >= tau};  g = max(p - tau, 0) over its sum, 0 if that is 0
        expert_choice  in each sequence every expert takes the max(1, floor(c n / E)) of its n
                       unpadded tokens where its p is largest;  g = p;  c = top_k
        constant weights: S = the K largest logits + bias;  g = 1/K ("mean") or 1 ("one")

    Where a single expert is selected and weights are normalised, its weight is the constant 1 and
    the router gets no gradient there; norm_topk_prob False avoids that. The bias counts for the
    selection alone. Of equals the lower index (expert; for expert_choice earlier token) wins, on
    every machine.

    Args:
        logits_TE: [T, E] router scores.
        selection: a name in SELECTIONS.
        scoring: "softmax" or "sigmoid" (top_k and dense only).
        top_k: K; for expert_choice c, the experts a token has on average.
        norm_topk_prob: whether the selected weights sum to one (top_k, dense, top_p).
        top_p: mass that top_p wants, 0 < top_p <= 1.
        tau_T1: [T, 1] threshold, as from `threshold_of`.
        bias_E: [E] added to the scores for the selection (top_k only).
        weight: "learned", or constant: "mean" or "one" (top_k only).
        sequences: N; the T tokens are N sequences of T/N positions (expert_choice only).
        mask_T: [T] True for tokens that are no padding (expert_choice only); None: all.

    Returns:
        Routing, in at least float32.

    Raises:
        ValueError: an unknown selection or one that does not go with the scoring, or top_k out of
            1..E where it counts.

    Source: sigmoid scores and bias: 2408.15664 (loss-free balancing); top-p: Huang et al. 2024
    (2403.07652), which leaves g = p (norm_topk_prob False); threshold: AdaMoLE (2405.00361); expert
    choice: Zhou et al. 2022 (2202.09368), there over a batch, here within each sequence.

    >>> select(torch.tensor([[2.0, 1.0, 0.0]]), selection="top_p", top_p=0.7).selected_TE
    tensor([[ True,  True, False]])
    """
    row = SELECTIONS.get(selection)
    if row is None or scoring not in row.scorings:
        raise ValueError(
            f"selection {selection!r} with scoring {scoring!r} is not defined; selections are "
            f"{', '.join(SELECTIONS)}, sigmoid goes with top_k and dense"
        )
    plain = scoring == "softmax" and bias_E is None and weight == "learned"
    if plain and selection in ("top_k", "dense"):
        return route(logits_TE, top_k=top_k, selection=selection, norm_topk_prob=norm_topk_prob)
    experts = logits_TE.shape[-1]
    if selection in ("top_k", "expert_choice") and not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; it must lie in 1..{experts}, the number of experts")
    logits_TE = at_least_float32(logits_TE)
    if selection == "top_p":
        return _top_p(logits_TE, top_p=top_p, norm_topk_prob=norm_topk_prob)
    if selection == "threshold":
        assert tau_T1 is not None, "selection 'threshold' needs tau"
        return _threshold(logits_TE, tau_T1=tau_T1)
    if selection == "expert_choice":
        return _expert_choice(logits_TE, capacity=top_k, sequences=sequences, mask_T=mask_T)
    if weight != "learned":
        each = 1.0 if weight == "one" else 1 / top_k
        return _constant(logits_TE, top_k=top_k, each=each, bias_E=bias_E)
    return _ranked(
        logits_TE,
        selection=selection,
        scoring=scoring,
        top_k=top_k,
        norm_topk_prob=norm_topk_prob,
        bias_E=bias_E,
    )
