"""Operations and kernels are counted as the words of benchmarks/launches.py say."""

from __future__ import annotations

import torch
from torch import nn


def test_operations_count_the_backward_pass_and_no_view_and_no_empty_tensor() -> None:
    from launches import operations

    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)

    def forward() -> torch.Tensor:
        y = (x @ w).view(5, 3).transpose(0, 1).exp()  # a product, two views, one more
        torch.empty(3)
        torch.promote_types(torch.float32, torch.float64)
        return y

    assert operations(forward) == 2
    # ones for the gradient, that of exp, the product with the transposed weight
    assert operations(lambda: torch.autograd.grad(forward().sum(), x)) == 2 + 1 + 3


def test_what_an_operation_calls_inside_is_one_kernel_with_it() -> None:
    from launches import kernels

    x = torch.randn(3, 4)
    assert kernels(lambda: x.sort()) == 1  # it copies and counts up inside
    assert kernels(lambda: (x @ x.T).reshape(9).add(1)) == 2


def test_a_layer_of_lora_starts_five_operations_for_a_token() -> None:
    """Base, A, B, the scale and the sum."""
    from launches import one_token, operations
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)), LoraConfig(
        r=2, target_modules=["0"]))  # fmt: skip
    assert operations(one_token(model.eval(), torch.randn(1, 1, 8))) == 5


def test_the_modes_limits_cover_the_balance_loss() -> None:
    from common import Row
    from targets import TARGETS

    measure = "operations, forward and backward"
    limits = {}
    for mode in ("none", "tangent", "plane", "givens"):
        for name in (mode, f"{mode}, balance loss on"):
            row = Row("launches", "T=8", name, measure, "PEFT LoRA r=26", 1.0, 1.0, 1.0)
            limits[name] = [target.limit for target in TARGETS if target.matches(row)]
    expected = {"none": 3, "tangent": 4, "plane": 5, "givens": 5}
    assert limits == {name: [expected[name.partition(",")[0]]] for name in limits}
