"""torch.compile makes one graph of an adapted model; torch.export and ONNX take it as it is."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
import torch
import torch._dynamo
from peft import PeftModel, get_peft_model
from torch import nn

import tiny
from rotmole import RotMoleConfig, balance_states
from rotmole.ops import ROTATIONS, packages
from rotmole.ops.compiled import _kernels

# torch 2.13's compiler uses what torch itself deprecates, and transformers' models set a global
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:While compiling, we found certain side effects:UserWarning",
        # the exporter to ONNX says that two inputs share their dynamic axes, as was asked of it
        "ignore:# The axis name:UserWarning",
    ),
]

# the ordinary lane compiles one mode, the heavy one the others
HEAVY = [pytest.param(name, marks=pytest.mark.heavy) for name in ("none", "plane", "givens")]


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


@pytest.mark.heavy  # the ordinary lane has one layer in inductor
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


@pytest.mark.parametrize("how", ["followed", pytest.param("compiled", marks=pytest.mark.heavy)])
def test_kernels_train_a_model_as_its_operations_do(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, the balance losses and what they record, and other batches, compiled once."""
    made, load = [], packages._load

    def counted(program: Any) -> Any:
        made.append(program)
        run = program.module()
        return load(program) if how == "compiled" else lambda given: [*run(*given)]

    monkeypatch.setattr(packages, "_load", counted)
    _kernels.cache_clear()
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    eager, fast = (_adapted("tangent", kernels=name, **losses) for name in ("eager", "compiled"))
    fast.load_state_dict(eager.state_dict())
    for rows, length, pads in ((2, 7, 2), (3, 7, 2), (2, 11, 2), (2, 7, 0), (3, 11, 0)):
        ids = tiny.tokens(rows, length)
        mask = None
        if pads:
            mask = torch.ones_like(ids)
            mask[0, :pads] = 0
        sides = []
        for model in (eager, fast):
            model.zero_grad()
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            said = [state.pop() for state in balance_states(model)]
            sides.append(([loss, *gradients], said))
        for one, other in zip(sides[0][0], sides[1][0], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
        for one, other in zip(sides[0][1], sides[1][1], strict=True):
            assert other == pytest.approx(one, rel=1e-5)
    assert len(made) == 4  # there and back, for all widths; the losses, with a mask and without
    _kernels.cache_clear()


def _one_step(run: nn.Module, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and, in training, every gradient."""
    if not model.training:
        with torch.no_grad():
            return [run(x)]
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("rotation", ["tangent", *HEAVY])
def test_inductor_compiles_once_and_once_more_for_other_shapes(
    rotation: str, training: bool
) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = RotMoleConfig(rotation=rotation, r=4, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), config).train(training)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    first = torch.randn(2, 5, 16)
    _one_step(compiled, model, first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            _one_step(compiled, model, torch.randn_like(first))
    assert counters["stats"]["unique_graphs"] == 1
    _one_step(compiled, model, torch.randn(3, 7, 16))
    assert counters["stats"]["unique_graphs"] == 2  # batch and length become symbols at once
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((4, 9), (6, 3), (2, 31)):
            x = torch.randn(batch, length, 16)
            ours = [tensor.clone() for tensor in _one_step(compiled, model, x)]
            for mine, eager in zip(ours, _one_step(model, model, x), strict=True):
                torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.heavy
@pytest.mark.parametrize("rotation", list(ROTATIONS))
def test_every_mode_traces_whole(rotation: str) -> None:
    torch._dynamo.reset()
    model, ids = _adapted(rotation, router_aux_loss_coef=0.1), tiny.tokens(2, 8)
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

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.heavy  # the ordinary lane compiles
@pytest.mark.parametrize("rotation", ["none", "tangent", "plane", "givens", "cayley", "radar"])
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


@pytest.mark.heavy
@pytest.mark.parametrize("rotation", ["none", "tangent", "plane", "givens"])
def test_onnxruntime_runs_an_adapted_model_with_any_batch_and_length(rotation: str) -> None:
    model = _Logits(_adapted(rotation)).eval()
    batch, length = (
        torch.export.Dim("batch", min=2, max=8),
        torch.export.Dim("length", min=2, max=32),
    )
    ids = tiny.tokens(3, 9)
    shape = {0: batch, 1: length}
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (ids, torch.ones_like(ids)),
            dynamic_shapes=(shape, shape),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert [entry.shape for entry in session.get_inputs()] == [["batch", "length"]] * 2
    for rows, columns in ((3, 9), (2, 17), (5, 4), (1, 2)):
        ids = tiny.tokens(rows, columns)
        mask = torch.ones_like(ids)
        mask[0, : columns // 4] = 0  # padding on the left
        (found,) = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask)
        read = mask.bool()  # what a padded position says is nobody's business
        difference = (torch.from_numpy(found) - expected)[read].abs().max()
        assert float(difference) <= 1e-4
