"""ExpertShares: the mean routing weight of each named expert, padding left out."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import rotmole
import tiny
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.shares import ExpertShares

NAMES = ["math", "code", "law"]


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
    with ExpertShares(model) as watch, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        shares = watch.shares()
        watch.reset()
        assert watch.shares() == {}
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


def test_training_passes_and_others_are_watched_apart_and_hooks_go() -> None:
    config = rotmole.RotMoleConfig(
        num_experts=3, expert_names=NAMES, target_modules=["q_proj"], init_weights=False
    )
    model = get_peft_model(tiny.llama(), config)
    with ExpertShares(model, training=True) as watch:
        model.eval()(input_ids=tiny.tokens(1, 4))
        assert watch.shares() == {}
        model.train()(input_ids=tiny.tokens(1, 4))
        assert sum(watch.shares().values()) == pytest.approx(1)
    experts = [m.experts("default") for m in model.modules() if isinstance(m, RotMoleLayer)]
    assert not any(each._forward_hooks for each in experts)
    plain = get_peft_model(tiny.llama(), rotmole.RotMoleConfig(target_modules=["q_proj"]))
    with ExpertShares(plain) as watch:
        plain.eval()(input_ids=tiny.tokens(1, 4))
        assert watch.shares() == {}
