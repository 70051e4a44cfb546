"""How a layer's mixture is computed: one formula, four ways, chosen by shape and settings.

packed   few tokens without gradients, as in cached decoding (ops/packed.py)
grouped  many experts, of which each token uses few (ops/grouped.py)
fused    everything else that acts in rank space (ops/fused.py)
slow     rotations across experts, learned metrics, the sqrt-gate (ops/mixture.py)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rotmole.ops.fused import can_fuse, fused_mixture
from rotmole.ops.grouped import grouped_mixture, prefers_grouped
from rotmole.ops.mixture import mixture
from rotmole.ops.packed import Pack, pack, packed_mixture
from rotmole.ops.passes import Settings
from rotmole.ops.routing import Routed, Routing
from rotmole.tuner.scaling import NO_TOKENS, Tokens

if TYPE_CHECKING:
    from rotmole.tuner.layer import Experts

FEW_TOKENS = 64  # rows up to which packing pays: a layer's time is the number of its operations


class PackCache:
    """The packed weights of one layer, made again whenever a weight may have changed.

    Weights change in training, which is between a call of train() and one of eval(): both forget
    the pack, and so does a forward pass that could train. Versions and addresses of the weights
    show loading and moving besides; fused optimizers change weights without a new version.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the pack."""
        self.key: tuple[object, ...] | None = None
        self.pack: Pack | None = None
        self.trains = False

    def note_training(self) -> None:
        """A forward pass can train the weights: make no pack until train() or eval() is called."""
        self.clear()
        self.trains = True

    def __deepcopy__(self, memo: object) -> PackCache:
        return PackCache()

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        return PackCache, ()

    def of(self, experts: Experts, dtype: torch.dtype) -> Pack:
        """Return the pack of the weights as they are now.

        A weight's version grows with every change in place (training, loading), its address
        changes where it is replaced (moving, casting).
        """
        weights = experts._parameters.values()  # parameters() takes longer than the pack saves
        key = (dtype, *((w.data_ptr(), w._version) for w in weights if w is not None))
        if self.pack is None or key != self.key:
            self.key = key
            self.pack = pack(
                experts.expert_A, experts.expert_B, _gates(experts), experts.router_weight, dtype
            )
        return self.pack


def compute_dtype(x: Tensor, weight: Tensor, as_input: bool) -> torch.dtype:
    """Return the type of the products with A and B: autocast's, the input's or the weight's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype if as_input else weight.dtype


def _gates(experts: Experts) -> dict[str, Tensor]:
    return {name: getattr(experts, name) for name in experts.gate_names}


def _kept(x_TD: Tensor, dropout: nn.Module) -> tuple[Tensor | None, float]:
    """Draw which inputs dropout keeps, and what it multiplies them by; (None, 1) where all."""
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if p == 0:
        return None, 1.0
    keep_TD = torch.empty(x_TD.shape, dtype=torch.bool, device=x_TD.device).bernoulli_(1 - p)
    return keep_TD, 1 / (1 - p)


def _may_pack(experts: Experts, x_TD: Tensor, keep_TD: Tensor | None) -> bool:
    few = x_TD.shape[0] <= FEW_TOKENS and keep_TD is None and not torch.is_grad_enabled()
    steady = not (experts.training or experts.packs.trains)
    # weights made in inference mode have no version by which to see a change
    known = not (torch.compiler.is_compiling() or experts.expert_A.is_inference())
    return few and steady and known


def _wants_groups(experts: Experts) -> bool:
    gate = experts.scaling_gate
    if gate.selection != "top_k" or experts.num_experts == 1 or experts.expert_A.shape[0] == 1:
        return False
    if experts.dispatch == "auto":
        few = prefers_grouped(gate.experts, gate.top_k)
        return few and not torch.compiler.is_compiling()
    return experts.dispatch == "grouped"


def add(
    experts: Experts,
    x_TD: Tensor,
    dropout: nn.Module,
    tokens: Tokens = NO_TOKENS,
    *,
    decoding: bool = False,
    base_TO: Tensor | None = None,
) -> tuple[Tensor, Routed | None]:
    """Return what an adapter adds to W x, or its sum with W x, and what its router said.

    Args:
        experts: the adapter's parameters in the layer.
        x_TD: [T, D] layer input.
        dropout: the adapter's nn.Dropout, or nn.Identity.
        tokens: what the router knows of the tokens besides x.
        decoding: every row is one new token of a sequence.
        base_TO: [T, O] W x, which the fused and packed way add to as they go; None leaves it out.

    Returns:
        ([T, O], what the router said or None without a router).
    """
    dtype = compute_dtype(x_TD, experts.expert_A, experts.computes_in_input_dtype)
    fuses = can_fuse(experts.rotation, experts.rotation_input, experts.rotation_metric)
    if not fuses or experts.sqrt_gate or _wants_groups(experts):
        way = _slow if not fuses or experts.sqrt_gate else _grouped
        delta_TO, found = way(experts, x_TD, dropout, dtype, tokens)
        total_TO = delta_TO if base_TO is None else base_TO + delta_TO
        return total_TO, None if found is None else Routed(*found)
    keep_TD, keep_scale = _kept(x_TD, dropout)
    gate = experts.scaling_gate
    settings = Settings(
        experts.rotation,
        experts.scale,
        top_k=gate.top_k,
        selection=gate.selection,
        norm_topk_prob=gate.norm_topk_prob,
        dtype=dtype,
        keep_scale=keep_scale,
    )
    arguments = (settings, x_TD, experts.expert_A, experts.expert_B, _gates(experts))
    if experts.routes_inside:
        if decoding and _may_pack(experts, x_TD, keep_TD):
            packed = experts.packs.of(experts, dtype)
            return packed_mixture(settings, x_TD, packed, base_TO), None
        if torch.is_grad_enabled() and experts.expert_B.requires_grad:
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
    gates = _gates(experts)
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
    gates = _gates(experts)
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
