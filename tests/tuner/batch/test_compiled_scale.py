"""The scale of the balance loss may change from update to update under torch.compile."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import tiny
from rotmole import RotMoleConfig, balance_states

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:While compiling, we found certain side effects:UserWarning",
    ),
]


def test_a_scale_that_changes_compiles_once_and_acts() -> None:
    """1/3 in the first updates, 1/2 in the last: an epoch that accumulation does not divide."""
    torch._dynamo.reset()
    config = RotMoleConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_weights=False, router_aux_loss_coef=0.1
    )
    model = get_peft_model(tiny.llama(num_hidden_layers=1), config)
    model.config.use_cache = False
    ids = tiny.tokens(2, 8)
    (state,) = balance_states(model)
    state.managed = True

    def gradients(run: torch.nn.Module, scale: float | torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        state.loss_scale = scale
        run(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    found = []
    for scale in (1 / 3, 1 / 3, 1 / 2, torch.tensor(0.25), 7.0):
        found.append(gradients(compiled, scale))
        for name, wanted in gradients(model, scale).items():
            assert torch.allclose(found[-1][name], wanted, rtol=1e-4, atol=1e-6), (name, scale)
    name = next(name for name in found[0] if "router_weight" in name)
    assert not torch.allclose(found[0][name], found[-1][name])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
