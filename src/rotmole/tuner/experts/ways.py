"""How a layer's mixture is computed: one formula, a table of ways, the first that fits.

block    layers of a feed-forward block that has one router (blocks.py, ops/mixture/block.py)
packed   few tokens without gradients, as in cached decoding (decoding.py, ops/mixture/packed.py)
grouped  many experts, of which each token uses few (ops/mixture/grouped.py)
fused    everything else that acts in rank space (ops/mixture/fused.py)
dense    rotations across experts, learned metrics, the sqrt-gate (ops/mixture/dense.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rotmole.errors import ModelError
from rotmole.ops.mixture.banks import How, Rotated
from rotmole.ops.mixture.dense import mixture
from rotmole.ops.mixture.fused import can_fuse, fused_mixture
from rotmole.ops.mixture.grouped import grouped_mixture
from rotmole.ops.routing.route import route
from rotmole.ops.routing.selection import Routed
from rotmole.ops.spec import NO_TOKENS, Spec, Tokens, Weights
from rotmole.ops.transforms import is_transformed
from rotmole.tuner.experts.blocks import BlockCall
from rotmole.tuner.experts.decoding import Decoding, may_pack
from rotmole.tuner.experts.experts import Experts

Added = tuple[Tensor, Routed | None]

# Experts for each chosen one from which grouped is taken. It does E / K times less work at about a
# tenth of a dense product's rate: whole layers, forward and backward, take as long either way at 8
# and less this way from 12 on (benchmarks/results/experts.csv).
GROUPED_FROM = 12


class Call(NamedTuple):
    """One call of one layer.

    Attributes:
        x: [..., D] layer input as the model gave it.
        x_TD: [T, D] the same, flattened.
        dropout: the adapter's nn.Dropout, or nn.Identity.
        tokens: what the router knows of the tokens besides x.
        base_TO: [T, O] W x, which the fused and packed way add to as they go; None leaves it out.
        decoding: given if every row is one new token of a sequence.
        block: given if the layer belongs to a block-routed block.
        rotated: where the fused way leaves its rotations if nothing is dropped; None: nowhere.
    """

    x: Tensor
    x_TD: Tensor
    dropout: nn.Module
    tokens: Tokens = NO_TOKENS
    base_TO: Tensor | None = None
    decoding: Decoding | None = None
    block: BlockCall | None = None
    rotated: list[Rotated] | None = None


class Way(NamedTuple):
    """One row of the table of ways.

    Attributes:
        name: as in this file's first lines.
        fits: (spec) -> whether it can compute such a layer.
        takes: (experts, call) -> whether it is to compute this call of one.
        add: (experts, call) -> (W x + the addition, or the addition alone without base_TO [T, O],
            what the router said or None).
    """

    name: str
    fits: Callable[[Spec], bool]
    takes: Callable[[Experts, Call], bool]
    add: Callable[[Experts, Call], Added]


def compute_dtype(x: Tensor, weight: Tensor, spec: Spec) -> torch.dtype:
    """Return the type of the products with A and B: autocast's, the input's or the weight's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype if spec.compute_dtype == "input" else weight.dtype


def _in_rank_space(spec: Spec) -> bool:
    fuses = can_fuse(spec.rotation, spec.rotation_metric)
    return fuses and not spec.router_sqrt_gate


def _fuses(spec: Spec) -> bool:
    """Whether the fused function can compute the layer, its shared expert included."""
    return _in_rank_space(spec) and (spec.shared is None or _in_rank_space(spec.shared))


def _routes_inside(spec: Spec) -> bool:
    """Whether the fused function can do the routing itself."""
    return spec.num_experts > 1 and spec.has_plain_gate


def _is_grouped(spec: Spec) -> bool:
    able = spec.selection == "top_k" and spec.num_experts > 1 and not spec.share_A
    able = able and spec.rotation_input != "z"
    if not (able and _in_rank_space(spec)) or spec.dispatch == "fused":
        return False
    if spec.kernels == "compiled":  # made for the fused way
        return False
    return spec.dispatch == "grouped" or spec.num_experts >= GROUPED_FROM * spec.chosen


def _packs(spec: Spec) -> bool:
    return _routes_inside(spec) and _fuses(spec) and not _is_grouped(spec)


def _added(delta_TO: Tensor, call: Call) -> Tensor:
    return delta_TO if call.base_TO is None else call.base_TO + delta_TO


def _by_block(experts: Experts, call: Call, spec: Spec | None = None) -> Added:
    assert call.block is not None
    x_TD = call.x_TD.to(experts.expert_A.dtype)
    return call.block.add(
        experts.spec if spec is None else spec,
        experts.weights(),
        x_TD,
        call.dropout(x_TD),
        call.tokens,
        training=experts.training,
    )


def _by_packs(experts: Experts, call: Call) -> Added:
    assert call.decoding is not None
    dtype = compute_dtype(call.x_TD, experts.expert_A, experts.spec)
    addition = call.decoding.addition(experts, dtype)
    return addition.to(call.base_TO, experts.spec.scale), None


def _routed(experts: Experts, call: Call, weights: Weights) -> Routed | None:
    if not experts.has_router:
        return None
    logits_TE, routing = route(
        experts.spec, call.x_TD, weights, tokens=call.tokens, training=experts.training
    )
    return Routed(logits_TE, routing)


def _by_groups(experts: Experts, call: Call) -> Added:
    spec, weights = experts.spec, experts.weights()
    dtype = compute_dtype(call.x_TD, experts.expert_A, spec)
    routed = _routed(experts, call, weights)
    assert routed is not None
    assert routed.routing is not None
    delta_TO = grouped_mixture(
        spec,
        call.x_TD,
        call.dropout(call.x_TD.to(dtype)),
        weights.cast(spec, dtype),
        routed.routing.weight_TE,
        routed.routing.selected_TE,
        routed.logits_TE,
    )
    return _added(delta_TO, call), routed


def _dropout_mask(x_TD: Tensor, dropout: nn.Module) -> tuple[Tensor | None, float]:
    """Draw the inputs that dropout keeps, and what it multiplies them by; (None, 1) for all."""
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if p == 0:
        return None, 1.0
    keep_TD = torch.empty(x_TD.shape, dtype=torch.bool, device=x_TD.device).bernoulli_(1 - p)
    return keep_TD, 1 / (1 - p)


def _fused(experts: Experts, call: Call) -> Added:
    spec, weights, x_TD = experts.spec, experts.weights(), call.x_TD
    keep_TD, keep_scale = _dropout_mask(x_TD, call.dropout)
    rotated = call.rotated if keep_TD is None else None
    how = How(spec, compute_dtype(x_TD, experts.expert_A, spec), keep_scale, rotated)
    if _routes_inside(spec):
        y_TO, logits_TE, index_KT = fused_mixture(
            how, x_TD, weights, keep_TD=keep_TD, base_TO=call.base_TO
        )
        assert logits_TE is not None
        return y_TO, Routed(logits_TE, None, index_KT)
    routed = _routed(experts, call, weights)
    weight_TE = logits_TE = None
    if routed is not None and routed.routing is not None:
        weight_TE, logits_TE = routed.routing.weight_TE, routed.logits_TE
    y_TO, _, _ = fused_mixture(
        how,
        x_TD,
        weights,
        weight_TE=weight_TE,
        logits_TE=logits_TE,
        keep_TD=keep_TD,
        base_TO=call.base_TO,
    )
    return y_TO, routed


def _dense(experts: Experts, call: Call, spec: Spec | None = None, *, even: bool = False) -> Added:
    spec, weights = spec or experts.spec, experts.weights()
    dtype = compute_dtype(call.x_TD, experts.expert_A, spec)
    routed = _routed(experts, call, weights)
    weight_TE = call.x_TD.new_ones(call.x_TD.shape[0], 1)
    selected_TE = logits_TE = None
    if routed is not None and routed.routing is not None:
        weight_TE, selected_TE = routed.routing.weight_TE, routed.routing.selected_TE
        logits_TE = routed.logits_TE
        if even:
            weight_TE = weight_TE.mean(-1, keepdim=True).expand_as(weight_TE)
            selected_TE = torch.ones_like(selected_TE)
    x_TD, cast = call.x_TD.to(dtype), weights.cast(spec, dtype)
    delta_TO = mixture(spec, x_TD, call.dropout(x_TD), cast, weight_TE, selected_TE, logits_TE)
    return _added(delta_TO, call), routed


def _any_layer(spec: Spec) -> bool:
    return True


def _any_call(experts: Experts, call: Call) -> bool:
    return True


def _is_in_block(experts: Experts, call: Call) -> bool:
    return call.block is not None


def _may_group(experts: Experts, call: Call) -> bool:
    if is_transformed():  # torch.func cannot follow its sums over chosen rows
        return False
    return experts.spec.dispatch == "grouped" or not torch.compiler.is_compiling()


def _decodes(experts: Experts, call: Call) -> bool:
    return call.decoding is not None and may_pack(experts, call.dropout)


PACKED = Way("packed", _packs, _decodes, _by_packs)
WAYS = (
    Way("block", _any_layer, _is_in_block, _by_block),
    PACKED,
    Way("grouped", _is_grouped, _may_group, _by_groups),
    Way("fused", _fuses, _any_call, _fused),
    Way("dense", _any_layer, _any_call, _dense),
)


def ways_for(spec: Spec) -> tuple[Way, ...]:
    """Return the ways that can compute a layer, in the order in which they are asked."""
    return tuple(way for way in WAYS if way.fits(spec))


def altered(*, rotates: bool = True, even: bool = False) -> Way:
    """Return a way that leaves something out, to see what it does; for no use but that.

    Args:
        rotates: False: no expert is rotated, the shared one neither.
        even: each expert gets the mean of what the router gives to all, so the sum of a token's
            weights stays; not for block-routed blocks, whose slots are the selected experts.
    """

    def computed(experts: Experts, call: Call) -> Added:
        spec = experts.spec if rotates else without_rotation(experts.spec)
        if call.block is None:
            return _dense(experts, call, spec, even=even)
        if even:
            raise ModelError("a block-routed block cannot be computed with equal weights")
        return _by_block(experts, call, spec)

    return Way("altered", _any_layer, _any_call, computed)


def without_rotation(spec: Spec) -> Spec:
    """Return a layer that selects and weighs the same experts and rotates none."""
    shared = None if spec.shared is None else replace(spec.shared, rotation="none")
    return replace(spec, rotation="none", shared=shared)


def add(experts: Experts, ways: tuple[Way, ...], call: Call) -> Added:
    """Return what an adapter adds to W x, or its sum with W x, and what its router said.

    Args:
        experts: the adapter's parameters in the layer.
        ways: from `ways_for`.
        call: the layer's input and what is known of it.

    Returns:
        ([T, O], what the router said or None without a router); in a block-routed block [K, T, O]
        for its inner layers.
    """
    way = next(way for way in ways if way.takes(experts, call))
    start = experts.residual()
    if start is None or call.block is not None:
        return way.add(experts, call)
    delta_TO, routed = way.add(experts, call._replace(base_TO=None))
    # first the difference: the addition alone may be 0
    start_TO = _start_addition(experts.spec, start, call.x_TD, fused=way.add is _fused)
    delta_TO = delta_TO - start_TO
    return _added(delta_TO, call), routed


def _is_awaited(experts: Experts) -> bool:
    """Whether a call of the module does more than its forward: hooks, or another forward."""
    if experts._forward_pre_hooks or experts._forward_hooks or "forward" in experts.__dict__:
        return True
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call] # torch's own types


def add_decoded(
    experts: Experts, ways: tuple[Way, ...], base: Tensor, dropout: nn.Module, decoding: Decoding
) -> Tensor | None:
    """Return base plus the addition of a layer in a decoding step, None if it is left to `add`.

    The short way, because the time of such a step is that of Python. It is left to `add` to
    subtract what a layer does with init_weights "svd", and to be called by its module where
    somebody waits for that: hooks, and what brings offloaded or sharded weights.

    Args:
        experts, ways: as for `add`.
        base: [N, 1, O] W x.
        dropout: the adapter's.
        decoding: of the layer's input.
    """
    if PACKED not in ways or _is_awaited(experts):
        return None
    if experts.residual() is not None or not may_pack(experts, dropout):
        return None
    dtype = compute_dtype(decoding.x, experts.expert_A, experts.spec)
    addition = decoding.addition(experts, dtype)
    if addition.B_NO is None:
        return base + addition.value.view(base.shape)
    return addition.to(base.reshape(len(base), -1), experts.spec.scale).view(base.shape)


def _start_addition(spec: Spec, start: Weights, x_TD: Tensor, *, fused: bool) -> Tensor:
    """Return what balanced gates would have added at the start: (s / E) sum_e B0_e^T A0_e x.

    Args:
        spec, start: of the layer, and its factors at the start.
        x_TD: [T, D] layer input.
        fused: whether the layer itself is computed by the fused function; then a single expert's
            start is too, so that their difference at the start is exactly 0.
    """
    x_TD = x_TD.to(start.A_ERD.dtype)
    experts = start.B_ERO.shape[0]  # a mixture that has grown had fewer
    even_TE = x_TD.new_full((x_TD.shape[0], experts), 1 / experts)
    plain = Spec(num_experts=experts, scale=spec.scale)
    if fused and experts == 1:  # for more it would only make gradients that nobody wants
        return fused_mixture(How(plain, x_TD.dtype), x_TD, start)[0]
    return mixture(plain, x_TD, x_TD, start, even_TE)
