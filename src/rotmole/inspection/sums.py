"""Streaming sums of what an adapter adds: one pass over the tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rotmole.errors import ModelError
from rotmole.evaluation.scoring import evaluating
from rotmole.inspection.regression import Sums
from rotmole.tuner.experts.experts import Experts

Batch = Mapping[str, Any]


class Running:
    """The sums of some layers while batches go through the model.

    Layers that read the very same tensor, such as q, k and v, share X^T X.

    Args:
        reads: path -> basis [D, N]: x is multiplied by it, and N takes the place of D; layers
            without one keep x.
        writes: path -> orthonormal basis [O, P] in whose span y lies; P takes the place of O.
    """

    def __init__(
        self,
        reads: Mapping[str, Tensor] | None = None,
        writes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.reads, self.writes = reads or {}, writes or {}
        self.XX: dict[str, Tensor] = {}
        self.XY: dict[str, Tensor] = {}
        self.power: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self._last: Tensor | None = None
        self._last_owner = ""

    def add(self, path: str, read: Tensor, x_TD: Tensor, y_TO: Tensor) -> None:
        """Add the tokens of one call; `read` is the tensor as the model gave it."""
        x_TD, y_TO = double(x_TD), double(y_TO)
        power = float(y_TO.square().sum())
        if path in self.writes:
            y_TO = y_TO @ self.writes[path]
        owner = self._last_owner if read is self._last else path
        if path in self.reads:
            x_TD, owner = x_TD @ self.reads[path], path
        if self.owner.setdefault(path, owner) != owner:
            raise ModelError(
                f"layer {path!r} read one tensor with {owner!r} in one batch and with "
                f"{self.owner[path]!r} in another, so its sums cannot be collected"
            )
        if owner == path:
            _accumulate(self.XX, path, x_TD.T @ x_TD)
        self._last, self._last_owner = read, owner
        _accumulate(self.XY, path, x_TD.T @ y_TO)
        self.power[path] = self.power.get(path, 0.0) + power
        self.tokens[path] = self.tokens.get(path, 0) + len(x_TD)

    def drop(self) -> None:
        """Forget the last tensor, at the end of a batch."""
        self._last = None

    def result(self, path: str, experts: Experts) -> Sums:
        """Return the sums of one layer."""
        if path not in self.XY:  # the model never called the layer
            inputs, outputs = experts.expert_A.shape[-1], experts.expert_B.shape[-1]
            inputs = self.reads[path].shape[1] if path in self.reads else inputs
            outputs = self.writes[path].shape[1] if path in self.writes else outputs
            zeros_DD = torch.zeros(inputs, inputs, dtype=torch.float64)
            return Sums(zeros_DD, torch.zeros(inputs, outputs, dtype=torch.float64), 0.0, 0)
        XX = self.XX[self.owner[path]]
        return Sums(XX, self.XY[path], self.power[path], self.tokens[path])


def added_sums(
    model: Any, experts: Mapping[str, Experts], batches: Iterable[Batch]
) -> dict[str, Sums]:
    """Run batches through a model and sum up what the adapter adds in some layers.

    Args:
        model: with the adapter, which must be active; it runs in eval mode without gradients.
        experts: path of a layer -> the adapter's experts in it.
        batches: arguments of the model. Every token counts, so they must hold no padding.

    Returns:
        path -> the sums of the layer's input x and of y, what the adapter adds to W x.
    """
    running = Running()

    def listener(path: str) -> Any:
        def hook(module: Experts, arguments: tuple[Any, ...], _: Any) -> None:
            *way, call = arguments
            # again without W x, from which a sum in a half type could not be told apart
            y_TO, _ = module.forward(*way, call._replace(base_TO=None))
            running.add(path, call.x, call.x_TD, y_TO)

        return hook

    with evaluating(model), ExitStack() as stack:
        for path, module in experts.items():
            handle = module.register_forward_hook(listener(path))
            stack.callback(handle.remove)
        for batch in batches:
            model(**batch)
            running.drop()
    return {path: running.result(path, module) for path, module in experts.items()}


def double(values: Tensor) -> Tensor:
    """Return float64, on the processor where the device has none."""
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    return values.detach().double()


def _accumulate(sums: dict[str, Tensor], path: str, product: Tensor) -> None:
    sums[path] = sums[path].add_(product) if path in sums else product
