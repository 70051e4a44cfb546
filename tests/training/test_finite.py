"""Where an update stops being finite, and what is no fault."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rotmole.training.finite import Fault, agreed_fault, find_fault, first_gradient


class Tiny(nn.Module):
    """Two layers; batches are called as a language model's are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, input_ids):
        return self.second(self.first(input_ids))


@pytest.fixture
def model() -> Tiny:
    return Tiny()


def update(model, *inputs):
    """Backward passes over some micro-batches."""
    batches = [({"input_ids": torch.as_tensor(x)}, model(torch.as_tensor(x)).sum()) for x in inputs]
    for _, loss in batches:
        loss.backward()
    return [(batch, loss.detach()) for batch, loss in batches]


def test_a_finite_update_has_no_fault(model):
    assert find_fault(model, update(model, torch.ones(2, 3)), gradients=True) is None


def test_the_micro_batch_and_the_layer_of_a_loss_are_named(model):
    batches = update(model, torch.ones(2, 3), torch.full((2, 3), float("nan")))
    assert find_fault(model, batches, gradients=True) == Fault("loss", "nan", "first", 1)
    found = find_fault(model, batches, gradients=True, look_again=False)
    assert found == Fault("loss", "nan", None, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_gradient_of_the_backward_pass_is_named(model, value):
    batches = update(model, torch.ones(2, 3))
    model.first.weight.grad[0, 0] = value
    assert find_fault(model, batches, gradients=True).layer == "first.weight"
    model.second.weight.grad[0, 0] = value
    found = find_fault(model, batches, gradients=True)
    assert (found.kind, found.layer, found.micro_batch) == ("gradient", "second.weight", None)
    assert "the gradient of update 8 is not finite" in found.sentence(8)


def test_a_norm_that_overflows_is_a_fault_of_the_largest_gradient(model):
    batches = update(model, torch.ones(2, 3))
    model.first.bias.grad.fill_(3e38)
    assert find_fault(model, batches, gradients=True) == Fault(
        "gradient", "inf", "first.bias", None
    )
    assert first_gradient({}) is None


@pytest.mark.parametrize(
    ("scale", "value", "fault"),
    [(65536.0, "inf", False), (1.0, "inf", False), (0.5, "inf", True), (65536.0, "nan", False)],
)
def test_an_update_that_the_scaler_skips_is_no_fault(model, scale, value, fault):
    """Until the scale is below 1: then scaling is not why the gradient overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))  # it makes its scale when first used
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=scaler),
        model=model,
        args=SimpleNamespace(device="cpu", world_size=1, process_index=0),
        is_fsdp_enabled=False,
    )
    batches = update(model, torch.ones(2, 3))
    model.first.weight.grad[0, 0] = float(value)
    assert (agreed_fault(trainer, batches) is not None) == fault
    nan = update(model, torch.full((2, 3), float("nan")))
    assert agreed_fault(trainer, nan).kind == "loss"  # no scale makes this one finite
