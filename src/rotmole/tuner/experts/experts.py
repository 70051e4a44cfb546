"""Experts: the parameters of one adapter in one layer, and their roles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rotmole.ops.mixture.dense import mixture
from rotmole.ops.precision import at_least_float32
from rotmole.ops.rotation.table import gate_shapes
from rotmole.ops.routing.plain import Routed, Routing, route
from rotmole.tuner.batch.loads import LoadCount
from rotmole.tuner.batch.losses import BalanceSettings
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.blocks import BlockPart
from rotmole.tuner.experts.decoding import Decoding, PackCache
from rotmole.tuner.experts.scaling import NO_TOKENS, ScalingGate, Tokens
from rotmole.tuner.experts.ways import add
from rotmole.tuner.settings.expert_rules import FROZEN

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
