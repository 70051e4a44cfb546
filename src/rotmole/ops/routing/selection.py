"""The scaling gate: router scores -> which experts a token uses, and with what weight.

`select` takes every setting; `choose` computes the usual case (softmax over all experts, top_k or
dense) in fewer operations, for the fused function. Both stand on one `top_k_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rotmole.ops.precision import at_least_float32
from rotmole.ops.spec import Tokens

SCORINGS = ("softmax", "sigmoid")


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


class Routed(NamedTuple):
    """What a layer's router said, as far as it is known outside of the fused function.

    Attributes:
        logits_TE: [T, E] scores.
        routing: None if it was made inside; `select` makes it again from the logits.
        index_KT: [K, T] numbers of the chosen experts if it was made inside; None if all experts
            are used, or under torch.compile.
    """

    logits_TE: Tensor
    routing: Routing | None
    index_KT: Tensor | None = None

    def selected(self) -> Tensor:
        """Return [T, E], True where the expert is selected; not under torch.compile."""
        if self.routing is not None:
            return self.routing.selected_TE
        if self.index_KT is None:
            return torch.ones_like(self.logits_TE, dtype=torch.bool)
        return _marked(self.index_KT.long(), self.logits_TE.shape[1]).mT


# Experts up to which sorting all scores is as fast as finding the K largest: at 1024 experts it
# takes four times as long.
SORTED_UP_TO = 32


def top_k_of(score_ET: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the K largest of the E scores of each token, best first, and their experts.

    Of equal scores the expert with the lower number comes first, on every machine.

    Args:
        score_ET: [E, T] scores, tokens last.
        top_k: K, within 1..E.

    Returns:
        (scores [K, T], expert numbers [K, T]).

    >>> top_k_of(torch.tensor([[0.0], [1.0], [1.0]]), 1)[1]
    tensor([[1]])
    """
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; its TopK takes the lower number
        score_KT, index_KT = torch.topk(score_ET, top_k, dim=0)
        return score_KT, index_KT
    if torch.compiler.is_compiling() and score_ET.shape[0] <= SORTED_UP_TO:
        index_KT = _numbers_by_counting(score_ET.detach(), top_k)
        return score_ET.gather(0, index_KT), index_KT
    if score_ET.shape[0] > SORTED_UP_TO:
        index_KT = _numbers_of_largest(score_ET.detach(), top_k)
        score_KT = score_ET.gather(0, index_KT)
        order_KT = torch.sort(score_KT.detach(), dim=0, descending=True, stable=True).indices
        return score_KT.gather(0, order_KT), index_KT.gather(0, order_KT)
    order = torch.sort(score_ET, dim=0, descending=True, stable=True)
    return order.values[:top_k], order.indices[:top_k]


def _numbers_of_largest(score_ET: Tensor, top_k: int) -> Tensor:
    """Return the numbers [K, T] of each token's K largest scores, in order of their numbers."""
    score_ET = score_ET.masked_fill(score_ET.isnan(), torch.inf)  # the largest, as in a sort
    least_T = torch.topk(score_ET.mT, top_k, dim=-1).values[:, -1]
    above_ET, equal_ET = score_ET > least_T, score_ET == least_T
    room_T = top_k - above_ET.sum(0)
    selected_ET = above_ET | (equal_ET & (equal_ET.cumsum(0) <= room_T))
    index_TK = torch.topk(selected_ET.to(torch.uint8).mT, top_k, dim=-1).indices
    return torch.sort(index_TK, dim=-1).values.mT


def _numbers_by_counting(score_ET: Tensor, top_k: int) -> Tensor:
    """Return the numbers [K, T] of each token's K largest scores, best first, by comparing all.

    A compiler makes one kernel of it, but none of a sort.
    """
    # NaN counts as the largest, as in a sort; inductor vectorizes neither isnan nor integers on a
    # CPU, and the kernel would take five times as long with them
    score_ET = torch.where(score_ET.eq(score_ET), score_ET, torch.inf)
    each_E = torch.arange(len(score_ET), device=score_ET.device)
    one_1ET, other_E1T = score_ET.unsqueeze(0), score_ET.unsqueeze(1)
    earlier_EE1 = (each_E[:, None] < each_E).unsqueeze(-1)
    before_EET = (other_E1T > one_1ET) | ((other_E1T == one_1ET) & earlier_EE1)
    place_ET = torch.where(before_EET, 1.0, 0.0).sum(0)
    number_E1 = each_E[:, None].to(place_ET.dtype)
    found = [torch.where(place_ET == k, number_E1, 0.0).sum(0) for k in range(top_k)]
    return torch.stack(found).long()


def _marked(index_KT: Tensor, experts: int) -> Tensor:
    """Return [E, T], True for the experts that index_KT names."""
    shape = (experts, index_KT.shape[1])
    empty_ET = torch.zeros(shape, dtype=torch.bool, device=index_KT.device)
    return empty_ET.scatter(0, index_KT, True)


class _Options(NamedTuple):
    """The arguments of `select` apart from the scores, as the rows of the table take them."""

    scoring: str
    top_k: int
    norm_topk_prob: bool
    top_p: float
    tau_T1: Tensor | None
    bias_E: Tensor | None
    weight: str
    tokens: Tokens


def _ranked(logits_TE: Tensor, options: _Options, *, all_experts: bool) -> Routing:
    """top_k and dense: softmax or sigmoid scores, with or without a bias.

    The weights are a softmax over the selected logarithms: its gradient for a single selected
    expert is exactly zero, where dividing by a sum leaves rounding noise.
    """
    logits_ET = logits_TE.mT.contiguous()
    if options.scoring == "sigmoid":
        log_ET, score_ET = logsigmoid(logits_ET), torch.sigmoid(logits_ET)
        probability_ET = torch.softmax(log_ET, dim=0)
    else:
        log_ET = logits_ET
        score_ET = probability_ET = torch.softmax(logits_ET, dim=0)
    if all_experts:
        selected_ET = torch.ones_like(logits_ET, dtype=torch.bool)
        weight_ET = probability_ET if options.norm_topk_prob else score_ET
        return Routing(weight_ET.mT, selected_ET.mT, probability_ET.mT)
    rank_by_ET = logits_ET  # scores of large logits are equal where the logits are not
    if options.bias_E is not None:
        rank_by_ET = score_ET + options.bias_E.to(score_ET.dtype)[:, None]
    selected_ET = _marked(top_k_of(rank_by_ET.detach(), options.top_k)[1], len(logits_ET))
    if options.norm_topk_prob:
        weight_ET = torch.softmax(log_ET.masked_fill(~selected_ET, -torch.inf), dim=0)
    else:
        weight_ET = score_ET * selected_ET
    return Routing(weight_ET.mT, selected_ET.mT, probability_ET.mT)


def _top_k(logits_TE: Tensor, options: _Options) -> Routing:
    if options.weight == "learned":
        return _ranked(logits_TE, options, all_experts=False)
    rank_by_TE = logits_TE
    if options.bias_E is not None:
        rank_by_TE = logits_TE + options.bias_E.to(logits_TE.dtype)
    index_KT = top_k_of(rank_by_TE.detach().mT, options.top_k)[1]
    selected_TE = _marked(index_KT, logits_TE.shape[1]).mT
    chosen_TE = selected_TE.to(logits_TE.dtype)
    each = 1.0 if options.weight == "one" else 1 / options.top_k
    return Routing(chosen_TE * each, selected_TE, chosen_TE / options.top_k)


def _dense(logits_TE: Tensor, options: _Options) -> Routing:
    return _ranked(logits_TE, options, all_experts=True)


def _top_p(logits_TE: Tensor, options: _Options) -> Routing:
    probability_TE = torch.softmax(logits_TE, dim=-1)
    order_TE = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices
    sorted_TE = probability_TE.detach().gather(-1, order_TE)
    before_TE = torch.cumsum(sorted_TE, dim=-1).roll(1, dims=-1)  # mass of those more probable
    before_TE[..., :1] = 0
    selected_TE = torch.zeros_like(order_TE, dtype=torch.bool)
    selected_TE = selected_TE.scatter(-1, order_TE, before_TE < options.top_p)
    if options.norm_topk_prob:
        weight_TE = torch.softmax(logits_TE.masked_fill(~selected_TE, -torch.inf), dim=-1)
    else:
        weight_TE = probability_TE * selected_TE
    return Routing(weight_TE, selected_TE, probability_TE)


def _threshold(logits_TE: Tensor, options: _Options) -> Routing:
    assert options.tau_T1 is not None, "selection 'threshold' needs tau"
    probability_TE = torch.softmax(logits_TE, dim=-1)
    margin_TE = torch.relu(probability_TE - options.tau_T1)
    tiny = torch.finfo(margin_TE.dtype).tiny
    weight_TE = margin_TE / margin_TE.sum(-1, keepdim=True).clamp(min=tiny)
    return Routing(weight_TE, probability_TE >= options.tau_T1, probability_TE)


def _expert_choice(logits_TE: Tensor, options: _Options) -> Routing:
    tokens, (count, experts) = options.tokens, logits_TE.shape
    probability_TE = torch.softmax(logits_TE, dim=-1)
    valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    if tokens.mask_T is not None:
        valid_T = tokens.mask_T.to(logits_TE.device).bool()
    sequence_T = tokens.numbers(count, logits_TE.device)
    zero_N = torch.zeros(tokens.sequences, dtype=torch.long, device=logits_TE.device)
    length_N = zero_N.index_add(0, sequence_T, torch.ones_like(sequence_T))
    valid_N = zero_N.index_add(0, sequence_T, valid_T.long())
    capacity_N = (options.top_k * valid_N // experts).clamp(min=1)
    # every expert's order of the tokens: by sequence, in it by probability, padding last
    offered_TE = probability_TE.detach().masked_fill(~valid_T[:, None], -torch.inf)
    by_size_TE = torch.sort(offered_TE, dim=0, descending=True, stable=True).indices
    by_sequence_TE = torch.sort(sequence_T[by_size_TE], dim=0, stable=True).indices
    order_TE = by_size_TE.gather(0, by_sequence_TE)
    index_T = torch.arange(count, device=logits_TE.device)
    place_TE = torch.empty_like(order_TE).scatter(0, order_TE, index_T[:, None].expand_as(order_TE))
    start_N = length_N.cumsum(0) - length_N
    place_TE = place_TE - start_N[sequence_T][:, None]
    selected_TE = (place_TE < capacity_N[sequence_T][:, None]) & valid_T[:, None]
    return Routing(probability_TE * selected_TE, selected_TE, probability_TE)


@dataclass(frozen=True)
class Selection:
    """One row of the table of selections.

    Attributes:
        name: the value of the `selection` setting.
        weigh: (logits_TE, options) -> Routing, in the type of the logits.
        rule: what is selected and with what weight, in ASCII.
        scorings: the values of `scoring` it is defined for.
        normalises: whether `norm_topk_prob` means anything.
        counts: whether it reads `top_k`.
        sequences: whether it looks at the other tokens of a sequence.
    """

    name: str
    weigh: Callable[[Tensor, _Options], Routing]
    rule: str
    scorings: tuple[str, ...] = ("softmax",)
    normalises: bool = True
    counts: bool = False
    sequences: bool = False


_TABLE = (
    Selection("top_k", _top_k, "the K best; g = s over their sum", SCORINGS, counts=True),
    Selection("dense", _dense, "all; g = s over their sum", SCORINGS),
    Selection("top_p", _top_p, "the fewest best with mass >= p; g = s over their sum"),
    Selection(
        "threshold", _threshold, "p_e >= tau(x); g = p - tau over its sum", normalises=False,
    ),
    Selection(
        "expert_choice", _expert_choice, "each expert's best tokens of a sequence; g = p",
        normalises=False, counts=True, sequences=True,
    ),
)  # fmt: skip

SELECTIONS: dict[str, Selection] = {row.name: row for row in _TABLE}


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
    sequence_T: Tensor | None = None,
) -> Routing:
    """Select experts and weigh them, by any of the selections.

        s = softmax over all experts, or sigmoid of each logit;  p = s over its sum
        top_k          S = the K largest s + bias;       g = s over its sum in S, or s
        dense          S = all;                          g likewise
        top_p          S = the fewest largest p with sum >= top_p;             g likewise
        threshold      S = {e: p_e >= tau};  g = max(p - tau, 0) over its sum, 0 if that is 0
        expert_choice  in each sequence every expert takes the max(1, floor(c n / E)) of its n
                       unpadded tokens with the largest p;  g = p;  c = top_k
        constant weights: S = the K largest logits + bias;  g = 1/K ("mean") or 1 ("one")

    If a single expert is selected and weights are normalised, its weight is the constant 1 and
    the router gets no gradient from it; norm_topk_prob False avoids that. The bias counts for the
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
        sequence_T: [T] sequence number 0..N-1 of each token, if they are not of one length.

    Returns:
        Routing, in at least float32.

    Raises:
        ValueError: an unknown selection or one that does not go with the scoring, or top_k out of
            1..E where it counts.

    Source: top-k softmax: Shazeer et al. 2017 (arXiv 1701.06538); norm_topk_prob False: Switch
    (2101.03961); sigmoid scores and bias: 2408.15664 (loss-free balancing); top-p: Huang et al.
    2024 (2403.07652), which leaves g = p (norm_topk_prob False); threshold: AdaMoLE (2405.00361);
    expert choice: Zhou et al. 2022 (2202.09368), there over a batch, here within each sequence.

    >>> select(torch.tensor([[0.0, 1.0, 1.0]]), top_k=2).weight_TE
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    row = SELECTIONS.get(selection)
    if row is None or scoring not in row.scorings:
        raise ValueError(
            f"selection {selection!r} with scoring {scoring!r} is not defined; selections are "
            f"{', '.join(SELECTIONS)}, sigmoid goes with top_k and dense"
        )
    experts = logits_TE.shape[-1]
    if row.counts and not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; it must lie in 1..{experts}, the number of experts")
    tokens = Tokens(None, mask_T, sequence_T, sequences)
    options = _Options(scoring, top_k, norm_topk_prob, top_p, tau_T1, bias_E, weight, tokens)
    if selection == "dense" and scoring == "softmax":
        options = options._replace(norm_topk_prob=True)  # a softmax over all sums to one
    return row.weigh(at_least_float32(logits_TE), options)


class Chosen(NamedTuple):
    """The experts a token uses.

    Attributes:
        weight_KT: [K, T] their weights; [E, T] if all are used.
        index_KT: [K, T] their numbers, best first; None if all are used.
        probability_ET: [E, T] softmax over all, if weight_KT is not normalised; else None.
    """

    weight_KT: Tensor
    index_KT: Tensor | None
    probability_ET: Tensor | None


def choose(logits_ET: Tensor, *, top_k: int, selection: str, norm_topk_prob: bool) -> Chosen:
    """Select and weigh experts as `select` does, in fewer operations and without autograd.

    Args:
        logits_ET: [E, T] router scores in at least float32, tokens last.
        top_k, norm_topk_prob: as in `select`.
        selection: "top_k" or "dense".

    Returns:
        Chosen; equal to `select` up to rounding.

    >>> choose(torch.tensor([[0.0], [1.0], [1.0]]), top_k=2, selection="top_k",
    ...        norm_topk_prob=True).index_KT
    tensor([[1],
            [2]])
    """
    if selection == "dense":
        return Chosen(torch.softmax(logits_ET, dim=0), None, None)
    logits_KT, index_KT = top_k_of(logits_ET, top_k)
    if norm_topk_prob:
        return Chosen(torch.softmax(logits_KT, dim=0), index_KT, None)
    probability_ET = torch.softmax(logits_ET, dim=0)
    return Chosen(probability_ET.gather(0, index_KT), index_KT, probability_ET)


def spread_chosen(weight_KT: Tensor, index_KT: Tensor | None, experts: int) -> Tensor:
    """Return the weights of all experts [E, T], 0 where not chosen.

    >>> spread_chosen(torch.tensor([[0.75], [0.25]]), torch.tensor([[2], [0]]), 3).T
    tensor([[0.2500, 0.0000, 0.7500]])
    """
    if index_KT is None:
        return weight_KT
    if torch.compiler.is_compiling():  # no kernel can scatter while it computes
        dtype = weight_KT.dtype  # inductor vectorizes no comparison of mixed types on a CPU
        each_E1 = torch.arange(experts, device=index_KT.device)[:, None].to(dtype)
        parts = zip(index_KT.to(dtype).unsqueeze(1), weight_KT.unsqueeze(1), strict=True)
        return sum(
            (torch.where(index == each_E1, weight, 0.0) for index, weight in parts),
            start=weight_KT.new_zeros(()),
        )
    weight_ET = weight_KT.new_zeros(experts, weight_KT.shape[1])
    return weight_ET.scatter_(0, index_KT.long(), weight_KT)
