"""Three ways to break our layer from outside; PEFT's tests must notice each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rotmole.tuner.layer import Linear, RotMoleLayer

Undo = Callable[[], None]


def ignore_disable_adapters() -> Undo:
    """Run the adapter although it is disabled."""
    return _forward_with(lambda layer: {"_disable_adapters": False})


def ignore_active_adapter() -> Undo:
    """Always run the adapter that was added first."""
    return _forward_with(lambda layer: {"_active_adapter": [next(iter(layer.rotmole_experts))]})


def empty_adapter_layer_names() -> Undo:
    """Hide the layer's parameters from PEFT's bookkeeping."""
    original = RotMoleLayer.adapter_layer_names
    RotMoleLayer.adapter_layer_names = ()
    return lambda: setattr(RotMoleLayer, "adapter_layer_names", original)


SABOTAGES: dict[str, Callable[[], Undo]] = {
    "ignore-disable-adapters": ignore_disable_adapters,
    "ignore-active-adapter": ignore_active_adapter,
    "empty-adapter-layer-names": empty_adapter_layer_names,
}


def _forward_with(state: Callable[[Any], dict[str, Any]]) -> Undo:
    """Replace the layer's state for the duration of every forward call."""
    original = Linear.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrong = state(self) if self.rotmole_experts else {}
        right = {name: getattr(self, name) for name in wrong}
        vars(self).update(wrong)
        try:
            return original(self, *args, **kwargs)
        finally:
            vars(self).update(right)

    Linear.forward = forward
    return lambda: setattr(Linear, "forward", original)
