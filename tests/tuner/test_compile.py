"""torch.compile makes one graph of an adapted model, torch.export takes it as it is."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from peft import PeftModel, get_peft_model

import tiny
from rotmole import RotMoleConfig
from rotmole.ops import ROTATIONS

# torch 2.13's compiler uses what torch itself deprecates, and transformers' models set a global
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:While compiling, we found certain side effects:UserWarning",
)


def _adapted(rotation: str, **settings: object) -> PeftModel:
    config = RotMoleConfig(
        rotation=rotation,
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_weights=False,
        **settings,
    )
    model = get_peft_model(tiny.llama(num_hidden_layers=1), config)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize(("rotation", "balance"), [("none", 0.0), ("tangent", 0.1)])
def test_inductor_compiles_training_and_evaluation_into_one_graph(
    rotation: str, balance: float
) -> None:
    torch._dynamo.reset()
    model, ids = _adapted(rotation, router_aux_loss_coef=balance), tiny.tokens(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step(run: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = run(**inputs, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    eager_loss, eager = step(model)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    loss, gradients = step(compiled)
    step(compiled)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # one for training, one for evaluation


@pytest.mark.parametrize("rotation", list(ROTATIONS))
def test_every_mode_traces_whole(rotation: str) -> None:
    torch._dynamo.reset()
    model, ids = _adapted(rotation), tiny.tokens(2, 8)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=ids, labels=ids).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


class _Logits(torch.nn.Module):
    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize("rotation", ["none", "tangent", "cayley", "radar"])
def test_strict_export_with_dynamic_batch_and_length_is_exact(rotation: str) -> None:
    model = _Logits(_adapted(rotation).eval())
    batch, length = (
        torch.export.Dim("batch", min=2, max=8),
        torch.export.Dim("length", min=2, max=32),
    )
    with torch.no_grad():
        program = torch.export.export(
            model, (tiny.tokens(3, 9),), dynamic_shapes=({0: batch, 1: length},), strict=True
        ).module()
        for rows, columns in ((3, 9), (2, 17), (5, 4)):
            ids = tiny.tokens(rows, columns)
            assert torch.equal(program(ids), model(ids))
