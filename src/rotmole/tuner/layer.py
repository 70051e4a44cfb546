"""The adapted layer: a frozen linear map plus a mixture of rotated low-rank experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rotmole.errors import ModelError
from rotmole.ops.mixture import mixture
from rotmole.ops.precision import at_least_float32
from rotmole.ops.rotation import gate_shapes
from rotmole.ops.routing import Routed, Routing, route
from rotmole.tuner.balance import BalanceSettings, BalanceState, add_balance
from rotmole.tuner.blocks import BlockPart
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.decoding import Decoding, PackCache, SharedReads
from rotmole.tuner.expert_rules import FROZEN
from rotmole.tuner.initial import draw, take_segments
from rotmole.tuner.loss_free import LoadCount, count_loads
from rotmole.tuner.paths import add
from rotmole.tuner.scaling import NO_TOKENS, ScalingGate, Tokens

EXPERT, SCALING_GATE, ROTATION_GATE = "expert", "scaling_gate", "rotation_gate"


class Experts(nn.Module):
    """All parameters of one adapter in one layer, and their forward pass.

    Parameters (E experts, R rank, D in_features, O out_features):
        expert_A: [E, R, D], or [1, R, D] where all experts share it;  expert_B: [E, R, O];
        router_*: those of the scaling gate, absent at E = 1; residual_A, residual_B: the start of
        A and B, with init_weights "svd"; and the rotation gate's, as in rotmole.ops.gate_shapes.
    """

    expert_A: nn.Parameter
    expert_B: nn.Parameter
    router_weight: nn.Parameter
    residual_A: nn.Parameter
    residual_B: nn.Parameter
    router_bias: Tensor | None

    def __init__(
        self, config: RotMoleConfig, *, in_features: int, out_features: int, routes: bool = True
    ) -> None:
        super().__init__()
        assert config.top_k is not None
        self.rotation = config.rotation
        self.rotation_input = config.rotation_input
        self.rotation_metric = config.rotation_metric
        self.radar_normalize = config.radar_normalize
        self.top_k = config.top_k
        self.scaling_gate = ScalingGate.of(config)
        self.scale = _scale(config, in_features)
        self.balance = BalanceSettings()
        self.sqrt_gate = config.router_sqrt_gate
        self.dispatch = config.dispatch
        self.computes_in_input_dtype = config.compute_dtype == "input"
        self.packs = PackCache()
        self.router_bias_rate = config.router_bias_rate
        self.loads = LoadCount()
        self.A_density = config.A_density
        self.num_experts = config.num_experts
        experts, rank = config.num_experts, config.r
        input_factors = (1 if config.share_A else experts, rank, in_features)
        shapes: dict[str, tuple[int, ...]] = {"expert_A": input_factors}
        self.routes = routes and experts > 1  # else another layer of its block has the router
        routers = self.scaling_gate.shapes(in_features) if self.routes else {}
        self.router_names = tuple(routers)
        shapes |= routers
        shapes["expert_B"] = (experts, rank, out_features)
        gates = gate_shapes(
            config.rotation,
            E=experts,
            R=rank,
            D=in_features,
            O=out_features,
            rotation_input=config.rotation_input,
            rotation_planes=config.rotation_planes,
            radar_rank=config.radar_rank,
        )
        self.gate_names = tuple(gates)
        residual = {}
        if config.init_weights == "svd":
            residual = {"residual_A": input_factors, "residual_B": shapes["expert_B"]}
        self.frozen = FROZEN[config.frozen] | residual.keys()
        for name, shape in (shapes | gates | residual).items():
            learns = name not in self.frozen
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=learns))
        biased = self.routes and config.router_bias_rate > 0
        self.register_buffer("router_bias", torch.zeros(experts) if biased else None)

    @property
    def weight(self) -> Tensor:
        """One parameter, by which PEFT's FSDP policy knows this module holds weights."""
        return self.expert_B

    @property
    def first_router_parameter(self) -> Tensor | None:
        """One parameter of the scaling gate, by which to know whether it learns; None without."""
        return getattr(self, self.router_names[0]) if self.router_names else None

    def gates(self) -> dict[str, Tensor]:
        """Return the rotation gate's parameters by name."""
        return {name: getattr(self, name) for name in self.gate_names}

    def role(self, name: str) -> str:
        """Return "expert", "scaling_gate" or "rotation_gate" for a parameter of this module."""
        if name in self.gate_names:
            return ROTATION_GATE
        return SCALING_GATE if name in self.router_names else EXPERT

    def route(self, x_TD: Tensor, tokens: Tokens = NO_TOKENS) -> tuple[Tensor, Routing] | None:
        """Return the router's logits [T, E] and the routing; None where there is one expert."""
        if self.num_experts == 1:
            return None
        return self.scaling_gate.route(
            x_TD,
            {name: getattr(self, name) for name in self.router_names},
            A_ERD=self.expert_A,
            tokens=tokens,
            bias_E=self.router_bias,
            training=self.training,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Move or cast; packs are of the old weights, and the bias never becomes a half type.

        It moves by steps of router_bias_rate, which a half type soon cannot add.
        """
        bias_E = self.router_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's own types
        self.packs.clear()
        found_E = self.router_bias
        if found_E is not None and bias_E is not None and found_E.element_size() < 4:
            self.router_bias = at_least_float32(bias_E.to(found_E.device))
        return self

    def train(self, mode: bool = True) -> Experts:
        """Switch training on or off; weights packed for decoding are forgotten."""
        self.packs.clear()
        return super().train(mode)

    @property
    def routes_inside(self) -> bool:
        """Whether the fused function can do the routing itself."""
        return self.routes and self.router_bias is None and self.scaling_gate.is_plain

    def routing(self, logits_TE: Tensor) -> Routing:
        """Return what a plain scaling gate makes of the router's logits [T, E]."""
        gate = self.scaling_gate
        return route(
            logits_TE,
            top_k=gate.top_k,
            selection=gate.selection,
            norm_topk_prob=gate.norm_topk_prob,
        )

    def forward(
        self,
        x_TD: Tensor,
        dropout: nn.Module,
        tokens: Tokens = NO_TOKENS,
        part: BlockPart | None = None,
        *,
        decoding: Decoding | None = None,
        base_TO: Tensor | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """Return the addition [T, O] and, where there is a router, what it said.

        Given the base layer's output, their sum (`paths.add`). A part of a block-routed block
        answers as `BlockPart.add` says.
        """
        if part is not None:
            x_TD = x_TD.to(self.expert_A.dtype)
            delta, found = part.add(self, x_TD, dropout(x_TD), tokens)
            return delta, None if found is None else Routed(*found)
        if "residual_A" not in self.frozen:
            return add(self, x_TD, dropout, tokens, decoding=decoding, base_TO=base_TO)
        delta_TO, routed = add(self, x_TD, dropout, tokens, decoding=decoding)
        delta_TO = delta_TO - self._residual(x_TD.to(self.expert_A.dtype))  # first: it may be 0
        return delta_TO if base_TO is None else base_TO + delta_TO, routed

    def _residual(self, x_TD: Tensor) -> Tensor:
        """Return what balanced gates would have added at the start: (s / E) sum_e B0_e^T A0_e x."""
        even_TE = x_TD.new_full((x_TD.shape[0], self.num_experts), 1 / self.num_experts)
        A_ERD, B_ERO = self.residual_A, self.residual_B
        return mixture(x_TD, x_TD, even_TE, A_ERD, B_ERO, {}, rotation="none", scale=self.scale)

    def extra_repr(self) -> str:
        """Show shape and modes when the model is printed."""
        inputs, (experts, rank, outputs) = self.expert_A.shape[-1], self.expert_B.shape
        return (
            f"in_features={inputs}, out_features={outputs}, num_experts={experts}, r={rank}, "
            f"top_k={self.top_k}, rotation={self.rotation!r}"
        )


def _scale(config: RotMoleConfig, in_features: int) -> float:
    """Return s: lora_alpha / r, lora_alpha / sqrt(r), or GOAT's closed form sqrt(3 eta D / r)."""
    if config.goat_eta is not None:
        return math.sqrt(3 * config.goat_eta * in_features / config.r)
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def layer_widths(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer; Conv1D keeps its weight transposed."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


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
