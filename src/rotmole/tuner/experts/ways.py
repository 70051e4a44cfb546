"""How a layer's mixture is computed: one formula, four ways, chosen by shape and settings.

packed   few tokens without gradients, as in cached decoding (decoding.py, ops/mixture/packed.py)
grouped  many experts, of which each token uses few (ops/mixture/grouped.py)
fused    everything else that acts in rank space (ops/mixture/fused.py)
slow     rotations across experts, learned metrics, the sqrt-gate (ops/mixture/dense.py)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rotmole.ops.mixture.dense import mixture
from rotmole.ops.mixture.fused import can_fuse, fused_mixture
from rotmole.ops.mixture.grouped import grouped_mixture, prefers_grouped
from rotmole.ops.mixture.passes import Settings
from rotmole.ops.routing.plain import Routed, Routing
from rotmole.tuner.experts.decoding import Decoding, decoded, may_pack
from rotmole.tuner.experts.scaling import NO_TOKENS, Tokens

if TYPE_CHECKING:
    from rotmole.tuner.experts.experts import Experts


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


def _wants_groups(experts: Experts) -> bool:
    gate = experts.scaling_gate
    if gate.selection != "top_k" or experts.num_experts == 1 or experts.expert_A.shape[0] == 1:
        return False
    if experts.dispatch == "auto":
        few = prefers_grouped(gate.experts, gate.top_k)
        return few and not torch.compiler.is_compiling()
    return experts.dispatch == "grouped"


def _fuses(experts: Experts) -> bool:
    return can_fuse(experts.rotation, experts.rotation_input, experts.rotation_metric)


def _settings(experts: Experts, dtype: torch.dtype, keep_scale: float = 1.0) -> Settings:
    gate = experts.scaling_gate
    return Settings(
        experts.rotation,
        experts.scale,
        top_k=gate.top_k,
        selection=gate.selection,
        norm_topk_prob=gate.norm_topk_prob,
        dtype=dtype,
        keep_scale=keep_scale,
    )


def _trains(experts: Experts) -> bool:
    """Whether any weight learns; with frozen experts the gates alone may."""
    return any(w is not None and w.requires_grad for w in experts._parameters.values())


def _decodes(experts: Experts, x_TD: Tensor, dropout: nn.Module) -> bool:
    """Whether one new token a row goes by packed weights."""
    if dropout.training or not may_pack(experts, x_TD):
        return False
    packs = experts.packs
    if packs.fits is None:
        plain = experts.routes_inside and not experts.sqrt_gate
        packs.fits = plain and _fuses(experts) and not _wants_groups(experts)
    return packs.fits


def add(
    experts: Experts,
    x_TD: Tensor,
    dropout: nn.Module,
    tokens: Tokens = NO_TOKENS,
    *,
    decoding: Decoding | None = None,
    base_TO: Tensor | None = None,
) -> tuple[Tensor, Routed | None]:
    """Return what an adapter adds to W x, or its sum with W x, and what its router said.

    Args:
        experts: the adapter's parameters in the layer.
        x_TD: [T, D] layer input.
        dropout: the adapter's nn.Dropout, or nn.Identity.
        tokens: what the router knows of the tokens besides x.
        decoding: given where every row is one new token of a sequence.
        base_TO: [T, O] W x, which the fused and packed way add to as they go; None leaves it out.

    Returns:
        ([T, O], what the router said or None without a router).
    """
    dtype = compute_dtype(x_TD, experts.expert_A, experts.computes_in_input_dtype)
    if decoding is not None and _decodes(experts, x_TD, dropout):
        settings = experts.packs.settings.get(dtype)
        if settings is None:
            settings = experts.packs.settings[dtype] = _settings(experts, dtype)
        return decoded(experts, x_TD, settings, decoding, base_TO), None
    fuses = _fuses(experts)
    if not fuses or experts.sqrt_gate or _wants_groups(experts):
        way = _slow if not fuses or experts.sqrt_gate else _grouped
        delta_TO, found = way(experts, x_TD, dropout, dtype, tokens)
        total_TO = delta_TO if base_TO is None else base_TO + delta_TO
        return total_TO, None if found is None else Routed(*found)
    keep_TD, keep_scale = _kept(x_TD, dropout)
    settings = _settings(experts, dtype, keep_scale)
    arguments = (settings, x_TD, experts.expert_A, experts.expert_B, experts.gates())
    if experts.routes_inside:
        if torch.is_grad_enabled() and _trains(experts):
            experts.packs.note_training()
        y_TO, logits_TE, index_KT = fused_mixture(
            *arguments, router_ED=experts.router_weight, keep_TD=keep_TD, base_TO=base_TO
        )
        assert logits_TE is not None
        return y_TO, Routed(logits_TE, None, index_KT)
    found = experts.route(x_TD, tokens)
    weight_TE = x_TD.new_ones(x_TD.shape[0], 1) if found is None else found[1].weight_TE
    y_TO, _, _ = fused_mixture(*arguments, weight_TE=weight_TE, keep_TD=keep_TD, base_TO=base_TO)
    return y_TO, None if found is None else Routed(*found)


def _grouped(
    experts: Experts, x_TD: Tensor, dropout: nn.Module, dtype: torch.dtype, tokens: Tokens
) -> tuple[Tensor, tuple[Tensor, Routing] | None]:
    routed = experts.route(x_TD, tokens)
    assert routed is not None
    gates = experts.gates()
    if "rotation_vector" in gates:
        gates["rotation_vector"] = gates["rotation_vector"].to(dtype)
    delta_TO = grouped_mixture(
        x_TD,
        dropout(x_TD.to(dtype)),
        routed[1].weight_TE,
        routed[1].selected_TE,
        experts.expert_A.to(dtype),
        experts.expert_B.to(dtype),
        gates,
        top_k=experts.scaling_gate.top_k,
        rotation=experts.rotation,
        scale=experts.scale,
    )
    return delta_TO, routed


def _slow(
    experts: Experts, x_TD: Tensor, dropout: nn.Module, dtype: torch.dtype, tokens: Tokens
) -> tuple[Tensor, tuple[Tensor, Routing] | None]:
    routed = experts.route(x_TD, tokens)
    weight_TE = x_TD.new_ones(x_TD.shape[0], 1) if routed is None else routed[1].weight_TE
    selected_TE = weight_TE != 0 if routed is None else routed[1].selected_TE
    gates = experts.gates()
    if "rotation_vector" in gates:
        gates["rotation_vector"] = gates["rotation_vector"].to(dtype)
    x_TD = x_TD.to(dtype)
    delta_TO = mixture(
        x_TD,
        dropout(x_TD),
        weight_TE,
        experts.expert_A.to(dtype),
        experts.expert_B.to(dtype),
        gates,
        rotation=experts.rotation,
        scale=experts.scale,
        selected_TE=selected_TE,
        rotation_input=experts.rotation_input,
        rotation_metric=experts.rotation_metric,
        radar_normalize=experts.radar_normalize,
        sqrt_gate=experts.sqrt_gate,
    )
    return delta_TO, routed
