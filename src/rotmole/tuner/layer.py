"""The adapted layer: a frozen linear map plus a mixture of rotated low-rank experts."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rotmole.errors import ModelError
from rotmole.ops.routing.plain import Routed
from rotmole.tuner.batch.loads import count_loads
from rotmole.tuner.batch.losses import BalanceState, add_balance
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.blocks import BlockPart
from rotmole.tuner.experts.decoding import Decoding, SharedReads
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.experts.initial import draw, take_segments
from rotmole.tuner.experts.scaling import NO_TOKENS
from rotmole.tuner.targets import layer_widths


class RotMoleLayer(BaseTunerLayer):  # type: ignore[misc] # peft ships no types
    """What every adapted layer keeps, by adapter name.

    rotmole_experts holds all parameters (one level deep, so that PEFT's loaders find the adapter's
    name where they expect it); rotmole_dropout holds modules, so that trainers that switch dropout
    off by module type find it.
    """

    adapter_layer_names: tuple[str, ...] = ("rotmole_experts",)
    other_param_names: tuple[str, ...] = ("rotmole_dropout", "rotmole_blocks")
    rotmole_experts: nn.ModuleDict
    rotmole_dropout: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.rotmole_experts = nn.ModuleDict({})
        self.rotmole_dropout = nn.ModuleDict({})
        self.rotmole_blocks: dict[str, BlockPart] = {}
        self.rotmole_state = BalanceState()
        self.rotmole_reads = SharedReads()  # the model gives layers of one module the same
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = layer_widths(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        config: RotMoleConfig,
        *,
        inference_mode: bool = False,
        part: BlockPart | None = None,
    ) -> None:
        """Add an adapter to this layer, or replace the one of that name."""
        experts = Experts(
            config,
            in_features=self.in_features,
            out_features=self.out_features,
            routes=part is None or part.leads,
        )
        self.rotmole_blocks.pop(adapter_name, None)
        if part is not None:
            self.rotmole_blocks[adapter_name] = part
        if experts.weight.device.type != "meta":
            draw(experts, config.init_weights)
            if config.init_weights == "svd" and not inference_mode:  # loading overwrites it
                take_segments(experts, self.get_base_layer())
        self.rotmole_experts[adapter_name] = experts
        p = config.lora_dropout
        self.rotmole_dropout[adapter_name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; what the setting `frozen` names stays untrained."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Switch training of adapters; what the setting `frozen` names stays untrained."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for name in self.rotmole_experts:
            experts = self.experts(name)
            for frozen in experts.frozen:
                getattr(experts, frozen).requires_grad_(False)

    def block_part(self, active: list[str]) -> BlockPart | None:
        """Return what this layer is in a block-routed block; such an adapter must act alone."""
        parts = [self.rotmole_blocks[name] for name in active if name in self.rotmole_blocks]
        if parts and len(active) > 1:
            raise ModelError(
                f"adapters {', '.join(active)} are active together, and one of them has router_"
                "scope 'block': its experts are whole feed-forward blocks, behind whose activation "
                "nothing can be added; activate it alone"
            )
        return parts[0] if parts else None

    def experts(self, adapter_name: str) -> Experts:
        """Return the parameters of one adapter in this layer."""
        return self.rotmole_experts[adapter_name]  # type: ignore[return-value] # all are Experts

    def add(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """Return result plus what one adapter adds for x: [..., O] for x [..., D].

        In a block-routed block the inner layers return [K, ..., O], the outer takes [K, ..., D].
        """
        experts, part = self.experts(adapter_name), self.rotmole_blocks.get(adapter_name)
        if part is not None:
            part.begin(x)
        tokens = experts.scaling_gate.tokens(self.rotmole_state, x) if experts.routes else NO_TOKENS
        one_token = x.dim() == 3 and x.shape[1] == 1
        now = Decoding(x, self.rotmole_reads) if one_token else None
        y_TO, routed = experts(
            x.reshape(-1, self.in_features),
            self.rotmole_dropout[adapter_name],
            tokens,
            part=part,
            decoding=now,
            base_TO=result.reshape(-1, self.out_features) if part is None else None,
        )
        y = y_TO.reshape(*(x.shape[:-1] if part is None else part.lead(x)), self.out_features)
        result = y if part is None else result + y
        return result if routed is None else self._balanced(result, x, routed, experts)

    def _balanced(self, result: Tensor, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """Let the losses act, and count who was chosen, in the backward pass of result."""
        if not torch.is_grad_enabled():
            return result
        state, settings = self.rotmole_state, experts.balance
        router = experts.first_router_parameter
        if settings.acts and router is not None and router.requires_grad:
            result = add_balance(result, x, routed, state, settings, experts.routing, router)
        if experts.router_bias is not None and experts.training and result.requires_grad:
            routing = routed.routing
            assert routing is not None  # a biased router is no plain one
            mask = state.valid_tokens(x)
            mask_T = None if mask is None else mask.reshape(-1).to(x.device)
            result = count_loads(
                result, routing.selected_TE, mask_T, experts.loads, experts.expert_B, state
            )
        return result


class Linear(nn.Module, RotMoleLayer):
    """An adapted nn.Linear, GPT-2 Conv1D or quantised linear layer; the base weight stays."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RotMoleConfig,
        part: BlockPart | None = None,
    ) -> None:
        super().__init__()
        RotMoleLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode, part=part)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the additions of the active adapters."""
        if self.disable_adapters:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        active = [name for name in self.active_adapters if name in self.rotmole_experts]  # type: ignore[union-attr] # hidden by nn.Module
        part = self.block_part(active)
        read = x if part is None else part.read(x)
        result: Tensor = self.base_layer(read, *args, **kwargs)
        dtype = result.dtype
        for adapter_name in active:
            result = self.add(result, x, adapter_name)
        return result.to(dtype)

    def _replicate_for_data_parallel(self) -> Any:
        raise ModelError(
            "torch.nn.DataParallel shares what the layers of a mixture know of a batch among its "
            "replicas; use torch.nn.parallel.DistributedDataParallel (torchrun), or one device "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def __repr__(self) -> str:
        return "rotmole." + super().__repr__()
