"""Row 24: how experts are used is logged, a collapse is said once, and nothing turns NaN."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import rotmole
import tiny
from rotmole.ops import select
from rotmole.training.build import build
from rotmole.training.callbacks.metrics import read_metrics
from training_cases import run_file


def collapse(trainer: object, share: float) -> None:
    """Let every router prefer expert 0, then 1: all equal scores go to the lowest numbers."""
    for name, parameter in trainer.model.named_parameters():
        if "router_weight" in name:
            parameter.data *= share


@pytest.mark.parametrize("collapsed", [True, False])
def test_collapse_is_logged_and_said_once(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    collapsed: bool,
) -> None:
    folders = model_folder, data_folder, tmp_path / "run"
    run = run_file(*folders, "adapter.router_aux_loss_coef=0.0", max_steps=6)
    run.optimizer.scaling_gate_lr = 0.0
    trainer = build(run).trainer
    collapse(trainer, 0.0 if collapsed else 50.0)
    with caplog.at_level(logging.WARNING, logger="rotmole"):
        trainer.train()
    told = [record for record in caplog.records if "collapsed" in record.getMessage()]
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert len(rows) == 6
    if collapsed:
        (record,) = told
        assert "in 4 of 4 layers: at update 3 2 of 3 experts" in record.getMessage()
        assert "router_aux_loss_coef" in record.getMessage()
        assert {row["experts_unused"] for row in rows} == {4}
        assert {row["largest_expert_share"] for row in rows} == {0.5}
    else:
        assert not told
        assert all(row["experts_unused"] < 4 for row in rows)
    assert {row["experts_total"] for row in rows} == {4 * 3}
    hooked = [m for m in trainer.model.modules() if m._forward_pre_hooks and hasattr(m, "spec")]
    assert not hooked


def test_padding_and_evaluation_do_not_count() -> None:
    from rotmole.training.callbacks.usage import UsageCallback

    adapted = get_peft_model(tiny.llama(), rotmole.RotMoleConfig(target_modules=["q_proj"]))
    usage = UsageCallback()
    usage.on_train_begin(None, None, None, model=adapted)
    ids, mask = tiny.tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 3:] = 0
    for _ in range(2):
        assert [len(m._forward_pre_hooks) for m in adapted.modules() if hasattr(m, "spec")] == [
            1,
            1,
        ]
        adapted.train()(input_ids=ids, attention_mask=mask)
        adapted.eval()(input_ids=ids, attention_mask=mask)
        totals = [layer.total() for layer in usage.log.layers.values()]
        assert {(total.tokens, int(total.choices_E.sum())) for total in totals} == {(9, 9 * 2)}
        usage.on_train_begin(None, None, None, model=adapted)  # a smaller batch was found
        assert not usage.log.layers
    usage.on_train_end(None, None, None)
    assert not any(m._forward_pre_hooks for m in adapted.modules() if hasattr(m, "spec"))


# ---- extremes of the routing itself


@pytest.mark.parametrize("selection", ["top_k", "dense"])
@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(0, 4),
        torch.zeros(1, 4),
        torch.full((5, 4), 7.0),
        torch.full((5, 4), 1e38),
        torch.tensor([[1e38, -1e38, 1e38, 0.0]]),
        torch.tensor([[3e4, 0.0, 0.0, -3e4]]),
        torch.tensor([[-1e-30, 0.0, 1e-30, 0.0]]),
    ],
    ids=["T = 0", "B = 1", "equal", "huge equal", "huge apart", "one wins", "tiny"],
)
def test_extreme_scores_give_finite_weights_and_gradients(
    logits: torch.Tensor, selection: str
) -> None:
    leaf = logits.clone().requires_grad_()
    routing = select(leaf, top_k=2, selection=selection)
    chosen = 4 if selection == "dense" else 2
    assert (routing.selected_TE.sum(-1) == chosen).all()
    assert routing.weight_TE.isfinite().all()
    torch.testing.assert_close(routing.weight_TE.sum(-1), torch.ones(len(logits)))
    routing.weight_TE.square().sum().backward()
    assert leaf.grad.isfinite().all()
    again = select(logits, top_k=2, selection=selection)
    assert torch.equal(again.selected_TE, routing.selected_TE)


def test_ties_go_to_the_lowest_numbers() -> None:
    for tokens, experts, top_k in ((3, 4, 2), (64, 20, 10), (1, 7, 1)):
        selected = select(torch.full((tokens, experts), 0.5), top_k=top_k).selected_TE
        assert selected[:, :top_k].all()
        assert not selected[:, top_k:].any()


@pytest.mark.parametrize("rotation", ["none", "tangent", "givens", "radar_pairs"])
def test_one_expert_takes_all_and_the_rest_keep_a_gradient(rotation: str) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "router_aux_loss_coef": 0.1}
    config = rotmole.RotMoleConfig(rotation=rotation, init_weights=False, **settings)
    model, ids = get_peft_model(tiny.llama(), config), tiny.tokens(1, 5)
    for name, parameter in model.named_parameters():
        if "router_weight" in name:
            parameter.data.zero_()
            parameter.data[:2] = 1e4  # experts 0 and 1, or 2 and 3: never both pairs
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 0)])
def test_no_rows_and_no_tokens(shape: tuple[int, int]) -> None:
    config = rotmole.RotMoleConfig(
        r=4, target_modules=["q_proj"], init_weights=False, router_aux_loss_coef=0.1
    )
    model = get_peft_model(tiny.llama(), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(*shape, 32, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, 32)
    y.sum().backward()
    assert x.grad.isfinite().all()
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
