"""Balance without a loss: a bias on each expert's score for the selection, moved once per step.

    router_bias_e <- router_bias_e + rate * sign(mean load - load_e)       after an optimiser step

The load of an expert is the number of unpadded tokens that chose it since the last step, over all
micro-batches and processes. It is counted in the backward pass, which runs once per micro-batch
where a checkpointed forward pass runs twice. Nothing is counted inside torch.compile.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rotmole.tuner.batch.losses import BalanceState
    from rotmole.tuner.experts.experts import Experts


class LoadCount:
    """What one layer's experts were chosen for since the last update of the bias.

    Attributes:
        loads_E: [E] tokens that chose each expert, None where no backward pass ran.
    """

    def __init__(self) -> None:
        self.loads_E: Tensor | None = None
        self.version = 0
        self.warned = False

    def add(self, loads_E: Tensor, witness: Tensor, state: BalanceState) -> None:
        """Count one micro-batch; warn once a stack if the weights moved and the bias did not."""
        if self.loads_E is None:
            self.loads_E, self.version = loads_E, witness._version
            return
        self.loads_E = self.loads_E + loads_E
        if witness._version != self.version and not state.warned_of_bias:
            state.warned_of_bias = True
            warnings.warn(
                "router_bias_rate is on, but nobody moves the bias after an optimizer step: call "
                "rotmole.update_router_bias(model) there, or add "
                "rotmole.training.callbacks.BalanceCallback() to the trainer",
                stacklevel=2,
            )


class _Count(torch.autograd.Function):
    """The identity on `output`; in backward, the loads are counted."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        loads_E: Tensor,
        count: LoadCount,
        witness: Tensor,
        state: BalanceState,
    ) -> Tensor:
        ctx.loads_E, ctx.count, ctx.witness, ctx.state = loads_E, count, witness, state
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.count.add(ctx.loads_E, ctx.witness, ctx.state)
        return grads[0], None, None, None, None


def count_loads(
    output: Tensor,
    selected_TE: Tensor,
    mask_T: Tensor | None,
    count: LoadCount,
    witness: nn.Parameter,
    state: BalanceState,
) -> Tensor:
    """Return `output`, made so that its backward pass counts who was chosen.

    Args:
        output: the layer's addition, any shape.
        selected_TE: [T, E] True where selected.
        mask_T: [T] True for tokens that count; None counts all.
        count: where to add.
        witness: a parameter that every optimiser step changes.
        state: of the stack, which remembers that it has warned.

    Returns:
        A tensor equal to output.
    """
    if torch.compiler.is_compiling():  # a count kept in an attribute does not compile
        return output
    chosen_TE = selected_TE.detach().float()
    if mask_T is not None:
        chosen_TE = chosen_TE * mask_T.to(chosen_TE.dtype)[:, None]
    loads_E = chosen_TE.sum(0)
    return _Count.apply(output, loads_E, count, witness, state)  # type: ignore[no-any-return, no-untyped-call] # torch's own types


def _biased(model: nn.Module) -> list[Experts]:
    found: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "loads", None), LoadCount)
    ]
    return [experts for experts in found if experts.router_bias is not None]


@torch.no_grad()
def update_router_bias(model: nn.Module) -> int:
    """Move every router_bias against the loads since the last call; call it after optimizer.step().

        router_bias_e <- router_bias_e + router_bias_rate * sign(mean load - load_e)

    Of several processes each must call it: loads are summed over them, so the bias stays the same
    everywhere. BalanceCallback does it for transformers' and TRL's trainers.

    Args:
        model: a model with rotmole adapters; without router_bias_rate nothing happens.

    Returns:
        The number of layers whose bias moved.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); Wang et al. 2024 (2408.15664).
    """
    layers = _biased(model)
    if not layers:
        return 0
    first = layers[0].loads
    if all(e.loads.loads_E is None for e in layers) and not first.warned:
        first.warned = True
        warnings.warn(
            "update_router_bias found no loads, so it moves no bias: they are counted in the "
            "backward pass of a model in training mode, and not inside torch.compile",
            stacklevel=2,
        )
    loads = [
        torch.zeros_like(e.router_bias) if e.loads.loads_E is None else e.loads.loads_E  # type: ignore[arg-type] # of _biased
        for e in layers
    ]
    flat = torch.cat([load.to(loads[0].device) for load in loads])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    moved = 0
    parts = torch.split(flat, [len(load) for load in loads])
    for experts, load_E in zip(layers, parts, strict=True):
        bias_E = experts.router_bias
        assert bias_E is not None  # as _biased says
        step_E = torch.sign(load_E.mean() - load_E).to(bias_E)
        bias_E.add_(step_E, alpha=experts.router_bias_rate)
        moved += bool(step_E.any())
        experts.loads.loads_E = None
    return moved
