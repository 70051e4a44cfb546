"""Generations of experts: the twin agrees, and later experts change nothing of earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import assert_close

from rotmole.ops.reference import generations as slow
from rotmole.ops.routing.generations import select_generations
from rotmole.ops.routing.selection import SELECTIONS, select

CASES = [
    {"selection": row.name, "scoring": scoring, "norm_topk_prob": norm}
    for row in SELECTIONS.values()
    for scoring in row.scorings
    for norm in (True, False)
]
CASES += [{"weight": "mean"}, {"weight": "one"}]


@pytest.mark.parametrize("settings", CASES, ids=lambda c: "-".join(map(str, c.values())))
@given(
    seed=st.integers(0, 2**32 - 1),
    generations=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    top_k=st.integers(1, 3),
    biased=st.booleans(),
)
def test_select_generations(
    settings: dict[str, Any], seed: int, generations: list[int], top_k: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    T, E = 6, sum(generations)
    logits_TE = 2 * torch.randn(T, E, generator=generator, dtype=torch.float64)
    top_k = min(top_k, generations[0])
    options: dict[str, Any] = {"top_k": top_k, "top_p": 0.6, **settings}
    if settings.get("selection") == "threshold":
        options["tau_T1"] = torch.rand(T, 1, generator=generator).double() / E
    elif settings.get("selection") == "expert_choice":
        options |= {"sequences": 2, "mask_T": torch.tensor([1, 1, 0, 1, 1, 1]).bool()}
    elif settings.get("selection", "top_k") == "top_k" and biased:
        options["bias_E"] = torch.randn(E, generator=generator).double()
    found = select_generations(logits_TE, generations, **options)
    wanted = slow.select_generations(logits_TE, generations, **options)
    assert torch.equal(found.selected_TE, wanted.selected_TE)
    assert_close(found.weight_TE, wanted.weight_TE, 1e-13)
    assert_close(found.probability_TE, wanted.probability_TE, 1e-13)

    n = generations[0]
    if n > 1:  # the first generation is what it was before the others came, in every bit
        first = dict(options)
        if "bias_E" in first:
            first["bias_E"] = first["bias_E"][:n]
        if "tau_T1" in first:
            first["tau_T1"] = first["tau_T1"] * (E / n)
        before = select(logits_TE[:, :n], **first)
        assert torch.equal(found.weight_TE[:, :n], before.weight_TE)
        assert torch.equal(found.selected_TE[:, :n], before.selected_TE)
