"""The adapted layer: a frozen linear map plus a mixture of rotated low-rank experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rotmole.ops.fused import Settings, can_fuse, fused_mixture
from rotmole.ops.mixture import mixture
from rotmole.ops.rotation import ROTATIONS, gate_shapes
from rotmole.ops.routing import Routing, route, router_logits
from rotmole.tuner.balance import BalanceSettings, BalanceState, add_balance
from rotmole.tuner.config import RotMoleConfig

EXPERT, SCALING_GATE, ROTATION_GATE = "expert", "scaling_gate", "rotation_gate"


class Experts(nn.Module):
    """All parameters of one adapter in one layer, and their forward pass.

    Parameters (E experts, R rank, D in_features, O out_features):
        expert_A: [E, R, D];  expert_B: [E, R, O];  router_weight: [E, D], absent at E = 1
        and those of the rotation gate, as in rotmole.ops.gate_shapes.
    """

    expert_A: nn.Parameter
    expert_B: nn.Parameter
    router_weight: nn.Parameter

    def __init__(
        self, config: RotMoleConfig, *, in_features: int, out_features: int, rank: int, alpha: float
    ) -> None:
        super().__init__()
        assert config.top_k is not None
        self.rotation = config.rotation
        self.rotation_input = config.rotation_input
        self.rotation_metric = config.rotation_metric
        self.radar_normalize = config.radar_normalize
        self.computes_in_input_dtype = config.compute_dtype == "input"
        self.top_k = config.top_k
        self.selection = config.selection
        self.norm_topk_prob = config.norm_topk_prob
        self.scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.balance = BalanceSettings()
        experts = config.num_experts
        shapes: dict[str, tuple[int, ...]] = {"expert_A": (experts, rank, in_features)}
        if experts > 1:
            shapes["router_weight"] = (experts, in_features)
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
        for name, shape in (shapes | gates).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @property
    def weight(self) -> Tensor:
        """One parameter, by which PEFT's FSDP policy knows this module holds weights."""
        return self.expert_B

    def role(self, name: str) -> str:
        """Return "expert", "scaling_gate" or "rotation_gate" for a parameter of this module."""
        if name in self.gate_names:
            return ROTATION_GATE
        return SCALING_GATE if name == "router_weight" else EXPERT

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draw all parameters; with init_weights the output starts at the base model's.

        A, vector gates: Kaiming uniform (a = sqrt 5) of each expert, that is uniform in
        +-1/sqrt(D). Router and other linear gates: Linear's default, the same bound of their own
        fan-in. B and the parameters that ROTATIONS names: 0. Without init_weights nothing is 0.
        """
        zero = ("expert_B", *ROTATIONS[self.rotation].zero) if init_weights else ()
        for name, parameter in self.named_parameters():
            if name in zero:
                nn.init.zeros_(parameter)
            elif name in {"rotation_center", "radar_pair_angle"}:
                nn.init.normal_(parameter)
            else:
                fan_in = parameter.shape[0 if name.startswith("radar_") else -1]
                if name == "expert_B":
                    fan_in = parameter.shape[1]
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x_TD: Tensor, dropout: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the addition [T, O] and, where there is a router, its logits [T, E].

        Args:
            x_TD: [T, D] layer input.
            dropout: the adapter's nn.Dropout, or nn.Identity.
        """
        gates = {name: getattr(self, name) for name in self.gate_names}
        router_ED = self.router_weight if self.expert_A.shape[0] > 1 else None
        weight_TE = x_TD.new_ones(x_TD.shape[0], 1) if router_ED is None else None
        dtype = compute_dtype(x_TD, self.expert_A, self.computes_in_input_dtype)
        if can_fuse(self.rotation, self.rotation_input, self.rotation_metric):
            keep_TD, keep_scale = _kept(x_TD, dropout)
            settings = Settings(
                self.rotation,
                self.scale,
                top_k=self.top_k,
                selection=self.selection,
                norm_topk_prob=self.norm_topk_prob,
                dtype=dtype,
                keep_scale=keep_scale,
            )
            return fused_mixture(
                settings,
                x_TD,
                self.expert_A,
                self.expert_B,
                gates,
                router_ED=router_ED,
                weight_TE=weight_TE,
                keep_TD=keep_TD,
            )
        logits_TE = selected_TE = None
        if router_ED is not None:
            logits_TE = router_logits(x_TD, router_ED)
            weight_TE, selected_TE, _ = self.route(logits_TE)
        assert weight_TE is not None
        x_TD = x_TD.to(dtype)
        if "rotation_vector" in gates:
            gates["rotation_vector"] = gates["rotation_vector"].to(dtype)
        delta_TO = mixture(
            x_TD,
            dropout(x_TD),
            weight_TE,
            self.expert_A.to(dtype),
            self.expert_B.to(dtype),
            gates,
            rotation=self.rotation,
            scale=self.scale,
            selected_TE=selected_TE,
            rotation_input=self.rotation_input,
            rotation_metric=self.rotation_metric,
            radar_normalize=self.radar_normalize,
        )
        return delta_TO, logits_TE

    def route(self, logits_TE: Tensor) -> Routing:
        """Return what the scaling gate makes of the router's logits [T, E]."""
        return route(
            logits_TE,
            top_k=self.top_k,
            selection=self.selection,
            norm_topk_prob=self.norm_topk_prob,
        )

    def extra_repr(self) -> str:
        """Show shape and modes when the model is printed."""
        experts, rank, inputs = self.expert_A.shape
        outputs = self.expert_B.shape[-1]
        return (
            f"in_features={inputs}, out_features={outputs}, num_experts={experts}, r={rank}, "
            f"top_k={self.top_k}, rotation={self.rotation!r}"
        )


def compute_dtype(x: Tensor, weight: Tensor, as_input: bool) -> torch.dtype:
    """Return the type of the products with A and B: autocast's, the input's or the weight's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype if as_input else weight.dtype


def _kept(x_TD: Tensor, dropout: nn.Module) -> tuple[Tensor | None, float]:
    """Draw which inputs dropout keeps, and what it multiplies them by; (None, 1) where all."""
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if p == 0:
        return None, 1.0
    keep_TD = torch.empty(x_TD.shape, dtype=torch.bool, device=x_TD.device).bernoulli_(1 - p)
    return keep_TD, 1 / (1 - p)


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
    other_param_names: tuple[str, ...] = ("rotmole_dropout",)
    rotmole_experts: nn.ModuleDict
    rotmole_dropout: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.rotmole_experts = nn.ModuleDict({})
        self.rotmole_dropout = nn.ModuleDict({})
        self.rotmole_state = BalanceState()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = layer_widths(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        config: RotMoleConfig,
        *,
        rank: int,
        alpha: float,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter to this layer, or replace the one of that name."""
        experts = Experts(
            config,
            in_features=self.in_features,
            out_features=self.out_features,
            rank=rank,
            alpha=alpha,
        )
        if experts.weight.device.type != "meta":
            experts.reset_parameters(config.init_weights)
        self.rotmole_experts[adapter_name] = experts
        p = config.lora_dropout
        self.rotmole_dropout[adapter_name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def experts(self, adapter_name: str) -> Experts:
        """Return the parameters of one adapter in this layer."""
        found = self.rotmole_experts[adapter_name]
        assert isinstance(found, Experts)
        return found

    def addition(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return what one adapter adds to the base layer's output: [..., O] for x [..., D]."""
        experts = self.experts(adapter_name)
        delta_TO, logits_TE = experts(
            x.reshape(-1, self.in_features), self.rotmole_dropout[adapter_name]
        )
        delta: Tensor = delta_TO.reshape(*x.shape[:-1], self.out_features)
        settings = experts.balance
        learns = torch.is_grad_enabled() and (settings.balance or settings.z)
        if logits_TE is not None and learns and experts.router_weight.requires_grad:
            delta = add_balance(
                delta,
                x,
                logits_TE,
                experts.route(logits_TE),
                self.rotmole_state,
                settings,
                experts.router_weight,
            )
        return delta


class Linear(nn.Module, RotMoleLayer):
    """An adapted nn.Linear, GPT-2 Conv1D or quantised linear layer; the base weight stays."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RotMoleConfig,
        *,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__()
        RotMoleLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name, config, rank=rank, alpha=alpha, inference_mode=config.inference_mode
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the additions of the active adapters."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for adapter_name in self.active_adapters:  # type: ignore[union-attr] # hidden by nn.Module
            if adapter_name in self.rotmole_experts:
                result = result + self.addition(x, adapter_name)
        return result.to(dtype)

    def __repr__(self) -> str:
        return "rotmole." + super().__repr__()
