"""Experts that came later: each generation is selected by itself and changes no earlier weight.

A mixture that has grown computes for its first experts what it computed before, for every input
and with every selection, because later experts take part in no sum and no ranking of earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rotmole.ops.precision import at_least_float32
from rotmole.ops.routing.selection import Routing, select


def select_generations(
    logits_TE: Tensor,
    generations: Sequence[int],
    *,
    top_k: int = 1,
    tau_T1: Tensor | None = None,
    bias_E: Tensor | None = None,
    **settings: Any,
) -> Routing:
    """Select experts and weigh them, each generation as if no later one were there.

        S_j = the selection's choice among generation j alone, with min(K, its experts)
        g_e = s_e over its sum in S_0 + ... + S_j, or s_e        for e in S_j, s over 0..j

    threshold and expert_choice compare the experts of 0..j, as p does there: generation j takes
    those of its own that they name. Constant weights are those of generation j alone. A first
    generation of one expert has weight 1, as a layer without a router.

    Args:
        logits_TE: [T, E] router scores.
        generations: numbers of experts that came together, E in all, the oldest first.
        top_k, tau_T1, bias_E, settings: as of `select`; tau is that of E experts.

    Returns:
        Routing. Its probability is n_j / E of the softmax within each generation of n_j, so the
        balance loss compares experts that came together, and is 1 where they are used alike.

    >>> select_generations(torch.zeros(1, 3), [2, 1], top_k=1).weight_TE
    tensor([[1.0000, 0.0000, 0.5000]])
    """
    logits_TE = at_least_float32(logits_TE)
    experts = logits_TE.shape[1]
    weights: list[Tensor] = []
    selected: list[Tensor] = []
    probabilities: list[Tensor] = []
    end = 0
    for count in generations:
        start, end = end, end + count
        own_TE, known_TE = logits_TE[:, start:end], logits_TE[:, :end]
        options = {"top_k": min(top_k, count), **settings}
        if bias_E is not None:
            options["bias_E"] = bias_E[start:end]
        if settings.get("selection") in ("threshold", "expert_choice"):
            options["top_k"] = min(top_k, end)
            tau_j = None if tau_T1 is None else tau_T1 * (experts / end)
            routing = select(known_TE, tau_T1=tau_j, **options)
            weight_TE, selected_TE = routing.weight_TE[:, start:], routing.selected_TE[:, start:]
            probability_TE = torch.softmax(own_TE, dim=-1)
        else:
            routing = select(own_TE, **options)
            weight_TE, selected_TE, probability_TE = routing
            if start and settings.get("weight", "learned") == "learned":
                chosen_TE = torch.cat([*selected, selected_TE], dim=-1)
                weight_TE = _shares(known_TE, chosen_TE, **settings)[:, start:]
        if not start and count == 1:
            weight_TE = torch.ones_like(own_TE)
            selected_TE = torch.ones_like(own_TE, dtype=torch.bool)
        weights.append(weight_TE)
        selected.append(selected_TE)
        probabilities.append(probability_TE * (count / experts))
    return Routing(*(torch.cat(parts, dim=-1) for parts in (weights, selected, probabilities)))


def _shares(
    logits_TE: Tensor,
    chosen_TE: Tensor,
    *,
    scoring: str = "softmax",
    selection: str = "top_k",
    norm_topk_prob: bool = True,
    **others: Any,
) -> Tensor:
    """Return what `select` would give the chosen experts, of top_k, dense and top_p."""
    if norm_topk_prob or (selection == "dense" and scoring == "softmax"):
        log_TE = logsigmoid(logits_TE) if scoring == "sigmoid" else logits_TE
        return torch.softmax(log_TE.masked_fill(~chosen_TE, -torch.inf), dim=-1)
    score_TE = torch.sigmoid(logits_TE) if scoring == "sigmoid" else torch.softmax(logits_TE, -1)
    return score_TE * chosen_TE
