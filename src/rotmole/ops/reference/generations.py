"""Experts that came later, as loops: what each token's experts weigh, growth by growth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.reference.method import Routing, wide
from rotmole.ops.reference.routing import select


def select_generations(
    logits_TE: Tensor,
    generations: Sequence[int],
    *,
    top_k: int = 1,
    tau_T1: Tensor | None = None,
    bias_E: Tensor | None = None,
    **settings: Any,
) -> Routing:
    """Select and weigh; the arguments are those of routing.generations.select_generations."""
    logits_TE = wide(logits_TE)
    T, E = logits_TE.shape
    weight_TE, probability_TE = torch.zeros_like(logits_TE), torch.zeros_like(logits_TE)
    selected_TE = torch.zeros(T, E, dtype=torch.bool)
    ends = [sum(generations[: j + 1]) for j in range(len(generations))]
    for n, end in zip(generations, ends, strict=True):
        start = end - n
        compared = settings.get("selection") in ("threshold", "expert_choice")
        begin = 0 if compared else start
        routing = select(
            logits_TE[:, begin:end],
            top_k=min(top_k, end - begin),
            tau_T1=None if tau_T1 is None else tau_T1 * E / end,
            bias_E=None if bias_E is None else bias_E[begin:end],
            **settings,
        )
        for t in range(T):
            own = torch.exp(logits_TE[t, start:end] - logits_TE[t, start:end].max())
            for e in range(start, end):
                chosen = bool(routing.selected_TE[t, e - begin]) or (start == 0 and n == 1)
                selected_TE[t, e] = chosen
                probability_TE[t, e] = n / E * own[e - start] / own.sum()
                if settings.get("weight", "learned") != "learned" or settings.get("scoring") == (
                    "sigmoid"
                ):
                    probability_TE[t, e] = n / E * routing.probability_TE[t, e - begin]
            for e in range(start, end):
                if not selected_TE[t, e]:
                    continue
                if start == 0 and n == 1:
                    weight_TE[t, e] = 1.0
                elif compared or settings.get("weight", "learned") != "learned":
                    weight_TE[t, e] = routing.weight_TE[t, e - begin]
                else:
                    weight_TE[t, e] = share(logits_TE[t], e, end, selected_TE[t], **settings)
    return Routing(weight_TE, selected_TE, probability_TE)


def share(
    logits_E: Tensor,
    e: int,
    end: int,
    selected_E: Tensor,
    *,
    scoring: str = "softmax",
    selection: str = "top_k",
    norm_topk_prob: bool = True,
    **others: Any,
) -> Tensor:
    """Return the score of expert e over the sum of those of the first `end` that are selected."""

    def score(i: int) -> Tensor:
        if scoring == "sigmoid":
            return 1 / (1 + torch.exp(-logits_E[i]))
        return torch.exp(logits_E[i] - logits_E.max())

    if norm_topk_prob or (selection == "dense" and scoring == "softmax"):
        return score(e) / sum((score(i) for i in range(end) if selected_E[i]), start=0 * score(e))
    if scoring == "sigmoid":
        return score(e)
    return score(e) / sum((score(i) for i in range(end)), start=0 * score(e))
