"""What training shows of a log: figures, words with their ceilings, shares of named experts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import get_peft_model

import rotmole
import tiny
from rotmole import record_routing
from rotmole.recording import LayerStatistics, TaskStatistics
from rotmole.recording.usage import (
    collapsed_layers,
    in_words,
    named_shares,
    usage_figures,
)
from rotmole.tuner.layer import RotMoleLayer

NAMES = ["math", "code", "law"]


def layer_of(
    choices: Sequence[int], top_k: int, selection: str = "top_k", *, has_router: bool = True
) -> LayerStatistics:
    task = TaskStatistics.empty(len(choices), angles=(0.1,))
    task.choices_E += torch.tensor(choices)
    assert task.rotation is not None
    task.rotation.count_E += torch.tensor(choices)
    task.rotation.absolute_E += 0.25 * torch.tensor(choices)
    layer = LayerStatistics(len(choices), top_k, selection, "tangent", 4, has_router)
    layer.tasks["all"] = task
    return layer


LAYERS = {
    "a": layer_of([3, 1, 0, 0], 1),
    "b": layer_of([2, 2, 2, 2], 2),
    "c": layer_of([0, 0], 1),
    "dense": layer_of([9, 9, 9], 3, "dense"),
    "follows": layer_of([3, 1, 0, 0], 1, has_router=False),
}


def test_figures_and_their_ceilings() -> None:
    figures = usage_figures(LAYERS)
    assert figures == {
        "experts_unused": 4, "experts_total": 10, "largest_expert_share": 0.75,
        "largest_expert_share_mean": 0.5, "expert_share_even": 0.25, "expert_share_ceiling": 1.0,
        "rotation_angle": pytest.approx(0.25),
    }  # fmt: skip
    assert in_words(figures) == [
        "4 of 10 experts unused",
        "most used expert of any layer 75 % of choices (even 25 %, at most 100 %)",
        "turned by 0.25 rad (at most 3.14)",
    ]
    assert usage_figures({}) == {}
    assert in_words({}) == []
    assert usage_figures({"c": LAYERS["c"]}) == {"experts_unused": 2, "experts_total": 2}


def test_collapsed_layers() -> None:
    """99 % of the choices of the K most chosen experts; a layer without a choice is none."""
    layers = LAYERS | {"d": layer_of([50, 49, 1, 0], 2), "e": layer_of([50, 48, 2, 0], 2)}
    assert collapsed_layers(layers) == ["d"]


@pytest.mark.parametrize("selection", ["dense", "top_k"])
def test_shares_are_the_mean_weights_of_tokens_that_are_no_padding(selection: str) -> None:
    config = rotmole.RotMoleConfig(
        num_experts=3, expert_names=NAMES, selection=selection,
        target_modules=["q_proj", "down_proj"], init_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny.llama(), config).eval()
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.modules():
        if isinstance(layer, RotMoleLayer):
            weight = layer.experts("default").router_weight
            weight.data.mul_(20)  # far from equal
            layer.register_forward_hook(
                lambda layer, args, output, weight=weight: inputs.append((args[0], weight))
            )
    ids, mask = tiny.tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 2:] = 0
    with record_routing(model, rotation=False) as log, torch.no_grad(), log.of("sums"):
        model(input_ids=ids, attention_mask=mask)
    shares = named_shares(log, NAMES)
    expected = torch.zeros(3, dtype=torch.float64)
    for x, weight in inputs:
        probability = torch.softmax((x[mask.bool()] @ weight.T).detach().double(), -1)
        if selection == "top_k":
            chosen = probability.topk(2, dim=-1).indices
            kept = torch.zeros_like(probability).scatter(-1, chosen, 1.0) * probability
            probability = kept / kept.sum(-1, keepdim=True)
        expected += probability.sum(0)
    expected /= expected.sum()
    assert list(shares) == NAMES
    assert torch.tensor(list(shares.values())).numpy() == pytest.approx(expected.numpy(), rel=1e-4)
    assert expected.max() - expected.min() > 0.02
    assert named_shares(log, NAMES, "sums") == shares
    assert named_shares(log, NAMES, "dates") == {}
    assert all(layer.total().rotation is None for layer in log.layers.values())
