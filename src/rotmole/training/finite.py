"""Where a loss or a gradient stopped being finite: the layer, the micro-batch, the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer

from rotmole.data import model_inputs
from rotmole.processes import highest


@dataclass(frozen=True)
class Fault:
    """What was not finite in an update.

    Attributes:
        kind: "loss" or "gradient".
        value: the loss as text ("nan", "inf"), or the gradient's norm.
        layer: module whose output was the first not to be finite, or parameter whose gradient was;
            None where a second look shows neither.
        micro_batch: which micro-batch of the update, from 0; None for a gradient.
        process: rank of the process that saw it.
    """

    kind: str
    value: str
    layer: str | None
    micro_batch: int | None
    process: int = 0

    def report(self) -> dict[str, Any]:
        """Return the fields as failure.json shows them."""
        return asdict(self)

    def sentence(self, update: int) -> str:
        """Say it to a user."""
        where = f", first seen in {self.layer}" if self.layer else ""
        what = "is not finite" if self.kind == "gradient" else f"is {self.value}"
        return (
            f"the {self.kind} of update {update} {what}; training stopped before the "
            f"update{where}. Lower training.learning_rate or training.max_grad_norm, or look at "
            "the rows in failure.json."
        )


def find_fault(
    model: nn.Module,
    batches: Sequence[tuple[Mapping[str, Any], Tensor]],
    *,
    gradients: bool,
    look_again: bool = True,
) -> Fault | None:
    """Look at an update before it is made: losses of its micro-batches, then gradients.

    Args:
        model: after the backward passes, gradients not yet clipped (clipping spreads a NaN).
        batches: (inputs, loss) of every micro-batch.
        gradients: look at the gradients; off where a gradient scaler does.
        look_again: a further forward pass may be run to name the layer.

    Returns:
        The first fault, or None; while all is well the device is asked once.
    """
    losses = [loss.detach().float() for _, loss in batches]
    by_name = gradients_of(model) if gradients else {}
    norm = torch.nn.utils.get_total_norm(list(by_name.values())) if by_name else None
    watched = losses if norm is None else [*losses, norm.float().to(losses[0].device)]
    if bool(torch.stack(watched).isfinite().all()):
        return None
    for index, loss in enumerate(losses):
        if not loss.isfinite():
            layer = first_nonfinite(model, batches[index][0]) if look_again else None
            return Fault("loss", str(loss.item()), layer, index)
    assert norm is not None  # nothing else was watched
    return Fault("gradient", str(norm.item()), first_gradient(by_name), None)


def agreed_fault(
    trainer: Trainer, batches: Sequence[tuple[Mapping[str, Any], Tensor]]
) -> Fault | None:
    """Find the fault of an update in whichever process it is; every process must call this.

    Under fp16 the gradient scaler skips an update that overflows and lowers its scale, which is
    no fault; at a scale below 1 it is one, for then scaling is not why.

    Args:
        trainer: after the update's last backward pass.
        batches: (inputs, loss) of this process's micro-batches.

    Returns:
        The same fault in every process, losses before gradients; None where all is finite.
    """
    scaler = trainer.accelerator.scaler
    fault = find_fault(
        trainer.model,
        batches,
        gradients=scaler is None or scaler.get_scale() < 1,
        look_again=not trainer.is_fsdp_enabled,  # there a forward pass needs every process
    )
    if not highest(int(fault is not None), trainer.args.device):
        return None
    mine = [] if fault is None else [replace(fault, process=trainer.args.process_index)]
    every = gather_object(mine) if trainer.args.world_size > 1 else mine
    return min(every, key=lambda fault: (fault.kind != "loss", fault.process))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that are there, by parameter; of sharded ones this process's part."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {name: g.to_local() if hasattr(g, "to_local") else g for name, g in named}


def first_gradient(gradients: Mapping[str, Tensor]) -> str | None:
    """Name the first gradient of the backward pass that is not finite: the last in the model.

    Args:
        gradients: by parameter, in the model's order.

    Returns:
        The parameter's name; if each gradient is finite but their norm is not, the largest's.
    """
    for name, grad in reversed(gradients.items()):
        if not grad.isfinite().all():
            return name
    return max(gradients, key=lambda name: gradients[name].abs().max().item(), default=None)


def first_nonfinite(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Name the first module whose output is not finite on a batch.

    Args:
        model: the model as it failed.
        inputs: the batch it failed on.

    Returns:
        The module's path, None where every output is finite.
    """
    faulty: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not faulty and isinstance(first, Tensor) and not first.isfinite().all():
                faulty.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            given = model_inputs(inputs)
            model(**{name: v for name, v in given.items() if name not in ("labels", "task_id")})
    finally:
        for handle in handles:
            handle.remove()
    return faulty[0] if faulty else None
