"""Balance without a loss: a bias on each expert's score for the selection, moved once per step.

    router_bias_e <- router_bias_e + rate * sign(mean load - load_e)       after an optimiser step

The load of an expert is the number of unpadded tokens that chose it since the last step, over all
micro-batches and processes. It is counted in the backward pass, which runs once per micro-batch
where a checkpointed forward pass runs twice. Nothing is counted inside
torch.compile and torch.func.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rotmole.ops.transforms import is_transformed
from rotmole.tuner.batch.stack import Stack


class LoadCount:
    """How often one layer's experts were chosen since whoever reads the count emptied it.

    Args:
        rate: how far the bias moves in a step; 0: the count is not for a bias.

    Attributes:
        loads_E: [E] tokens that chose each expert, None if no backward pass ran.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self.loads_E: Tensor | None = None
        self.version = 0
        self.warned = False

    def add(self, loads_E: Tensor, weight: Tensor, stack: Stack) -> None:
        """Count one micro-batch; warn once a stack if the weights moved and the bias did not.

        Args:
            loads_E: [E] tokens of the micro-batch that chose each expert.
            weight: a parameter that every optimizer step changes.
            stack: of the layer, which remembers that it has warned.
        """
        if self.loads_E is None:
            self.loads_E, self.version = loads_E, weight._version
            return
        self.loads_E = self.loads_E + loads_E
        if self.rate > 0 and weight._version != self.version:
            stack.warn_once(
                "bias",
                "router_bias_rate is on, but nobody moves the bias after an optimizer step: call "
                "rotmole.update_router_bias(model) there, or add "
                "rotmole.training.callbacks.BalanceCallback() to the trainer",
            )


class _Count(torch.autograd.Function):
    """The identity on `output`; in backward, the loads are counted."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, loads_E: Tensor, count: LoadCount, weight: Tensor, stack: Stack
    ) -> Tensor:
        ctx.loads_E, ctx.count, ctx.weight, ctx.stack = loads_E, count, weight, stack
        return output.data  # no view: a model may change it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.count.add(ctx.loads_E, ctx.weight, ctx.stack)
        return grads[0], None, None, None, None


def count_loads(
    output: Tensor,
    selected_TE: Tensor,
    mask_T: Tensor | None,
    count: LoadCount,
    weight: nn.Parameter,
    stack: Stack,
) -> Tensor:
    """Return `output`, made so that its backward pass counts how often each expert was chosen.

    Args:
        output: the layer's addition, any shape.
        selected_TE: [T, E] True where selected.
        mask_T: [T] True for tokens that count; None counts all.
        count: where to add.
        weight: a parameter that every optimizer step changes.
        stack: of the layer, which remembers that it has warned.

    Returns:
        A tensor equal to output.
    """
    if torch.compiler.is_compiling() or is_transformed():  # they follow no count in an attribute
        return output
    chosen_TE = selected_TE.detach().float()
    if mask_T is not None:
        chosen_TE = chosen_TE * mask_T.to(chosen_TE.dtype)[:, None]
    return _Count.apply(output, chosen_TE.sum(0), count, weight, stack)  # type: ignore[no-any-return, no-untyped-call] # torch's own types


@torch.no_grad()
def update_router_bias(model: nn.Module) -> int:
    """Move every router_bias against the loads since the last call; call it after optimizer.step().

        router_bias_e <- router_bias_e + router_bias_rate * sign(mean load - load_e)

    With several processes each must call it: loads are summed over them, so the bias stays the same
    everywhere. BalanceCallback does it for transformers' and TRL's trainers.

    Args:
        model: a model with rotmole adapters; without router_bias_rate nothing happens.

    Returns:
        The number of layers whose bias moved.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); Wang et al. 2024 (2408.15664).
    """
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "router_bias")]
    biased = [module for module in modules if module.router_bias is not None]
    pairs: list[tuple[LoadCount, Tensor]] = [(m.loads, m.router_bias) for m in biased]
    if not pairs:
        return 0
    first = pairs[0][0]
    if all(count.loads_E is None for count, _ in pairs) and not first.warned:
        first.warned = True
        warnings.warn(
            "update_router_bias found no loads, so it moves no bias: they are counted in the "
            "backward pass of a model in training mode, and not inside torch.compile",
            stacklevel=2,
        )
    loads = [
        torch.zeros_like(bias_E) if count.loads_E is None else count.loads_E
        for count, bias_E in pairs
    ]
    flat = torch.cat([load_E.to(loads[0].device) for load_E in loads])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    moved = 0
    parts = torch.split(flat, [len(load_E) for load_E in loads])
    for module, (count, bias_E), load_E in zip(biased, pairs, parts, strict=True):
        # experts that came together are chosen among themselves
        own = torch.split(load_E, list(module.spec.generations))
        step_E = torch.cat([torch.sign(part.mean() - part) for part in own]).to(bias_E)
        step_E[: module.kept_biases] = 0
        bias_E.add_(step_E, alpha=count.rate)
        moved += bool(step_E.any())
        count.loads_E = None
    return moved
