"""How much each expert with a name is used: the mean weight that the routers give it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rotmole.ops.routing.route import select_by
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer


class ExpertShares:
    """Add up routing weights in the forward passes of its block; padding does not count.

        share of e = mean over layers and tokens of g_e / sum_j g_j

    Cached decoding, which keeps no weights, is not counted.

    Args:
        model: whose active adapter is watched if its experts have names.
        training: watch training passes, not the others.
    """

    def __init__(self, model: Any, *, training: bool = False) -> None:
        self.model, self.training = model, training
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        self.names: list[str] = getattr(config, "expert_names", None) or []
        self.handles: list[Any] = []
        self.counting = True
        self.reset()

    def reset(self) -> None:
        """Forget what was added up."""
        self.total_E: Tensor | None = None

    def shares(self) -> dict[str, float]:
        """Return expert -> share since the last reset; empty if nothing was watched."""
        if self.total_E is None:
            return {}
        total_E = self.total_E.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total_E)
        values = (total_E / total_E.sum()).tolist()
        return dict(zip(self.names, values, strict=True))

    def __enter__(self) -> ExpertShares:
        for layer in self.model.modules() if self.names else ():
            if not isinstance(layer, RotMoleLayer):
                continue
            for name, experts in layer.rotmole_experts.items():
                active = name in layer.active_adapters and isinstance(experts, Experts)
                if active and experts.has_router:
                    self.handles.append(experts.register_forward_hook(self._adder(layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _adder(self, layer: RotMoleLayer) -> Any:
        def add(experts: Experts, args: Any, output: Any) -> None:
            routed = output[1] if isinstance(output, tuple) and len(output) == 2 else None
            if not self.counting or experts.training != self.training or routed is None:
                return
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
                return  # the second run of a checkpointed block
            with torch.no_grad():
                routing = routed.routing
                if routing is None:
                    routing = select_by(experts.spec, routed.logits_TE.detach())
                weight_TE = routing.weight_TE.detach().double()
                layout = layer.rotmole_stack.batch().layout(args[2].x)
                if layout is not None and layout.tokens.mask_T is not None:
                    weight_TE = weight_TE[layout.tokens.mask_T.bool()]
                share_TE = weight_TE / weight_TE.sum(-1, keepdim=True).clamp_min(1e-12)
                total_E = share_TE.sum(0)
                self.total_E = total_E if self.total_E is None else self.total_E + total_E

        return add
