"""The adapted layer: a frozen linear map plus a mixture of rotated low-rank experts."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from rotmole.errors import ModelError
from rotmole.ops.routing.selection import Routed
from rotmole.ops.spec import NO_TOKENS
from rotmole.tuner.batch.batch import Batch, Layout
from rotmole.tuner.batch.loads import count_loads
from rotmole.tuner.batch.losses import BalanceState, add_balance
from rotmole.tuner.batch.stack import Stack
from rotmole.tuner.batch.tokens import tokens_for_router, warn_of_unknown_rows
from rotmole.tuner.experts.blocks import BlockCall, BlockPart
from rotmole.tuner.experts.decoding import decoding_of
from rotmole.tuner.experts.experts import Experts, spec_of
from rotmole.tuner.experts.initial import draw, take_segments
from rotmole.tuner.experts.ways import Call, Way, add, add_decoded, ways_for
from rotmole.tuner.targets import linear_widths

if TYPE_CHECKING:
    from rotmole.tuner.settings.settings import Settings


class RotMoleLayer(BaseTunerLayer):  # type: ignore[misc] # peft ships no types
    """What every adapted layer holds, by adapter name.

    rotmole_experts holds all parameters (one level deep, so that PEFT's loaders find the adapter's
    name where they expect it); rotmole_dropout holds modules, so that trainers that switch dropout
    off by module type find it. rotmole_stack and rotmole_state belong to the part of the model in
    which the layer lies; RotMoleModel sets them.
    """

    adapter_layer_names: tuple[str, ...] = ("rotmole_experts",)
    other_param_names: tuple[str, ...] = ("rotmole_dropout", "rotmole_blocks", "rotmole_ways")
    rotmole_experts: nn.ModuleDict
    rotmole_dropout: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, requantise: Any = None) -> None:
        self.base_layer = base_layer
        if type(getattr(base_layer, "weight", None)) is not nn.Parameter:
            with suppress(ImportError):  # peft 0.20 imports what newer torchao has no more
                self.quantization_backend = resolve_quantization_backend(
                    base_layer, get_apply_tensor_subclass=requantise
                )
        self.rotmole_experts = nn.ModuleDict({})
        self.rotmole_dropout = nn.ModuleDict({})
        self.rotmole_blocks: dict[str, BlockPart] = {}
        self.rotmole_ways: dict[str, tuple[Way, ...]] = {}
        self.rotmole_stack = Stack()
        self.rotmole_state = BalanceState()
        self.rotmole_path = self.rotmole_block = ""
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        widths = linear_widths(base_layer)
        assert widths is not None  # RotMoleModel adapts linear layers alone
        self.in_features, self.out_features = widths

    def update_layer(
        self,
        adapter_name: str,
        settings: Settings,
        *,
        inference_mode: bool = False,
        part: BlockPart | None = None,
    ) -> None:
        """Add an adapter to this layer, or replace the one of that name.

        Args:
            adapter_name: its name.
            settings: of this module, all patterns applied.
            inference_mode: nothing is to be trained.
            part: what the layer is in its block, with router_scope "block".
        """
        spec = spec_of(settings, self.in_features)
        experts = Experts(
            settings,
            spec,
            in_features=self.in_features,
            out_features=self.out_features,
            has_router=part is None or part.leads,
        )
        self.rotmole_ways[adapter_name] = ways_for(spec)
        self.rotmole_blocks.pop(adapter_name, None)
        if part is not None:
            self.rotmole_blocks[adapter_name] = part
        if experts.weight.device.type != "meta":
            draw(experts, settings.init_weights, settings.A_density)
            if settings.init_weights == "svd" and not inference_mode:  # loading overwrites it
                take_segments(experts, self.get_base_layer())
        self.rotmole_experts[adapter_name] = experts
        p = settings.lora_dropout
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

    def add(
        self, result: Tensor, x: Tensor, adapter_name: str, block: BlockCall | None = None
    ) -> Tensor:
        """Return result plus what one adapter adds for x: [..., O] for x [..., D].

        In a block-routed block the inner layers return [K, ..., O], the outer takes [K, ..., D].
        """
        experts, stack = self.experts(adapter_name), self.rotmole_stack
        batch = self._batch() if block is None else block.batch
        ways, dropout = self.rotmole_ways[adapter_name], self.rotmole_dropout[adapter_name]
        decoding = decoding_of(x, batch, stack) if block is None else None
        if decoding is not None:
            decoded = add_decoded(experts, ways, result, dropout, decoding)
            if decoded is not None:
                return decoded
        call = Call(
            x,
            x.reshape(-1, self.in_features),
            dropout,
            tokens_for_router(experts.spec, batch, x) if experts.has_router else NO_TOKENS,
            base_TO=result.reshape(-1, self.out_features) if block is None else None,
            decoding=decoding,
            block=block,
        )
        y_TO, routed = experts(add, ways, call)
        lead = x.shape[:-1] if block is None else block.lead()
        y = y_TO.reshape(*lead, self.out_features)
        result = y if block is None else result + y
        if routed is None or not torch.is_grad_enabled():
            return result
        return self._balanced(result, x, routed, experts, batch)

    def _batch(self) -> Batch:
        return self.rotmole_stack.batch(self.rotmole_block)

    def _balanced(
        self, result: Tensor, x: Tensor, routed: Routed, experts: Experts, batch: Batch
    ) -> Tensor:
        """Let the losses act, and count who was chosen, in the backward pass of result."""
        router, weights = experts.first_router_parameter, experts.loss_weights
        losses = weights.act and router is not None and router.requires_grad
        counts = experts.counts() if experts.training and result.requires_grad else []
        if not (losses or counts):
            return result
        batch.check_known()
        layout: Layout | None = batch.layout(x)
        stack = self.rotmole_stack
        warn_of_unknown_rows(stack, self.rotmole_path, batch, layout, weights, x)
        if losses:
            assert router is not None
            result = add_balance(
                result, routed, experts.spec, batch, layout, self.rotmole_state, weights, router
            )
        if counts and not torch.compiler.is_compiling():
            mask_T = None if layout is None else layout.tokens.mask_T
            selected_TE = routed.selected()
            for count in counts:
                result = count_loads(result, selected_TE, mask_T, count, experts.newest_B, stack)
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, also from what generations whose cache still lives have packed."""
        super().delete_adapter(adapter_name)
        self.rotmole_stack.packs.clear()


class Linear(nn.Module, RotMoleLayer):
    """An adapted nn.Linear, GPT-2 Conv1D or quantised linear layer; the base weight stays."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        settings: Settings,
        part: BlockPart | None = None,
        *,
        inference_mode: bool = False,
        requantise: Any = None,
    ) -> None:
        super().__init__()
        RotMoleLayer.__init__(self, base_layer, requantise)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, settings, inference_mode=inference_mode, part=part)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the additions of the active adapters."""
        if self.disable_adapters:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        here = self.rotmole_experts
        active = [name for name in self.active_adapters if name in here]  # type: ignore[union-attr] # hidden by nn.Module
        part = self.block_part(active) if self.rotmole_blocks else None
        block = None if part is None else BlockCall(part, self._batch(), x)
        read = x if block is None else block.read()
        result: Tensor = self.base_layer(read, *args, **kwargs)
        dtype = result.dtype
        for adapter_name in active:
            result = self.add(result, x, adapter_name, block)
        return result if result.dtype == dtype else result.to(dtype)

    def _replicate_for_data_parallel(self) -> Any:
        raise ModelError(
            "torch.nn.DataParallel shares what the layers of a mixture know of a batch among its "
            "replicas; use torch.nn.parallel.DistributedDataParallel (torchrun), or one device "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def extra_repr(self) -> str:
        """Show how the base layer is quantised, as PEFT's own layers do."""
        return str(quantization_extra_repr(self))

    def __repr__(self) -> str:
        return "rotmole." + super().__repr__()
