"""The fused path holds nothing of width O per expert and never loops over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import VARIANTS, Problem, Variant, gradients, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# radar turns outputs, so it alone may hold [T, E, O]
NARROW = [v for v in VARIANTS if v.rotation != "radar"]


class Watch(TorchDispatchMode):
    """Counts operations and remembers the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        found = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.shapes |= {tuple(tensor.shape) for tensor in found}
        return result


def watch(problem: Problem) -> Watch:
    """Watch one forward and backward pass."""
    leaves = problem.leaves()
    with Watch() as found:
        gradients(leaves, lambda p: p.run())
    return found


def numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@pytest.mark.parametrize("variant", NARROW, ids=str)
def test_nothing_of_width_out_features_per_token_and_expert(variant: Variant) -> None:
    T, E, O = 64, 5, 97  # noqa: E741 - the legend's letter
    if variant.rotation == "radar_pairs":
        O = 98  # noqa: E741 - the legend's letter
    found = watch(make(variant, 50, T=T, E=E, K=2, R=4, D=7, O=O))
    wide = {shape for shape in found.shapes if numel(shape) >= T * E * O}
    assert not wide
    assert any(numel(shape) == T * O for shape in found.shapes)  # the watch does see results


def test_the_watch_sees_what_radar_holds() -> None:
    T, E, O = 64, 5, 98  # noqa: E741 - the legend's letter
    found = watch(make(Variant("radar"), 51, T=T, E=E, K=2, R=4, D=7, O=O))
    assert any(numel(shape) >= T * E * O for shape in found.shapes)


@pytest.mark.parametrize("variant", NARROW, ids=str)
def test_as_many_operations_for_many_experts_as_for_two(variant: Variant) -> None:
    few, many = (watch(make(variant, 52, T=8, E=E, K=2, R=4, D=7, O=6)) for E in (2, 9))
    assert few.operations == many.operations


@pytest.mark.parametrize("variant", NARROW, ids=str)
def test_as_many_operations_for_many_tokens_as_for_two(variant: Variant) -> None:
    few, many = (watch(make(variant, 53, T=T, E=3, K=2, R=4, D=7, O=6)) for T in (2, 17))
    assert few.operations == many.operations
