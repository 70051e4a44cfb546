"""The best static LoRA for what a mixture adds: how much of a mixture is mixture?

A mixture of experts adds another linear map for each token, so it is no LoRA. This module finds
the LoRA that is nearest to it on given tokens, layer by layer, in closed form. For an adapter that
is a LoRA already (one expert, no rotation) the result is that LoRA itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotmole.errors import ConfigError, ModelError
from rotmole.inspection.regression import Sums, best_map, mean
from rotmole.inspection.sums import Batch, added_sums
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

MEMORY = 4 << 30
"""Bytes of sums that are held at once; layers that need more take turns over the batches."""

Parts = Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class Share:
    """Which part of the power of what a layer's adapter adds is explained, over some tokens.

    Attributes:
        static: by the static LoRA.
        linear: by the best linear map of any rank; the rest is what routing and rotation alone
            can do. Of tokens that the map was not fitted on, it may be smaller than `static`.
        tokens: number of tokens.
    """

    static: float
    linear: float
    tokens: int


@dataclass(frozen=True)
class StaticLayer:
    """The static LoRA of one layer: W x + B A x.

    Attributes:
        A_RD: [R, D] float64.
        B_OR: [O, R] float64, the scale applied.
        exact: whether the adapter adds exactly B A x in this layer.
        shares: name of a part of the tokens -> what is explained there.
        power: name of a part -> mean over its tokens of |y|^2, y being what the adapter adds; 0 if
            the layer is exact, for which nothing is measured.
    """

    A_RD: Tensor
    B_OR: Tensor
    exact: bool
    shares: Mapping[str, Share] = field(default_factory=dict)
    power: Mapping[str, float] = field(default_factory=dict)


def static_lora(
    model: Any,
    calibration: Parts,
    held_out: Parts | None = None,
    *,
    rank: int,
    memory: int = MEMORY,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, StaticLayer]:
    """Find the static LoRA that is nearest to an adapter: least squares over calibration tokens.

        minimise over A, B:  sum over parts of  mean over tokens of  |y(x) - B A x|^2

    with x the layer's input and y what the adapter adds to W x, both in the adapted model.

    Args:
        model: a PeftModel with one active RotMoLE adapter.
        calibration: name of a part -> batches, as arguments of the model, without padding. The
            parts count alike, however many tokens they have: name the user's rows one part, other
            text a second one.
        held_out: further parts, on which the result is judged only.
        rank: R, of every layer; smaller maps are filled up with zeros.
        memory: bytes of sums held at once; a smaller number costs passes over the batches.
        progress: called with ("layers", done, total).

    Returns:
        path of a layer in the base model -> its static LoRA and the shares explained.

    Raises:
        ModelError: the model has no such adapter, or one whose experts are whole blocks.
        ConfigError: rank is no positive number.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    parts = {**calibration, **(held_out or {})}
    experts = active_experts(model)
    result = {path: _own_layer(module, rank, parts) for path, module in experts.items()}
    mixtures = {path: module for path, module in experts.items() if result[path] is None}
    done = len(experts) - len(mixtures)
    for group in _groups(mixtures, len(parts), memory):
        sums = {name: added_sums(model, group, batches) for name, batches in parts.items()}
        for path in group:
            here = {name: layers[path] for name, layers in sums.items()}
            result[path] = nearest_layer(here, list(calibration), rank)
            done += 1
            if progress is not None:
                progress("layers", done, len(experts))
    return {path: layer for path, layer in result.items() if layer is not None}


def _own_layer(experts: Experts, rank: int, parts: Parts) -> StaticLayer | None:
    """Return the LoRA that an adapter is in a layer already; None if it is none of this rank."""
    own = plain_lora(experts)
    if own is None or len(own[0]) > rank:
        return None
    A_RD, B_OR = _padded(*own, rank)
    shares = dict.fromkeys(parts, Share(1.0, 1.0, 0))
    return StaticLayer(A_RD.cpu(), B_OR.cpu(), True, shares, dict.fromkeys(parts, 0.0))


def nearest_layer(sums: Mapping[str, Sums], fitted: Sequence[str], rank: int) -> StaticLayer:
    """Return the static LoRA of one layer from the sums of its parts.

    Args:
        sums: name of a part -> its sums.
        fitted: names of the parts to fit on; the others only judge.
        rank: of the LoRA.
    """
    W_DO, A_RD, B_OR = best_map(mean([sums[name] for name in fitted]), rank)
    static_DO = A_RD.T @ B_OR.T
    shares = {
        name: Share(part.share(static_DO), part.share(W_DO), part.tokens)
        for name, part in sums.items()
    }
    power = {name: part.power / max(part.tokens, 1) for name, part in sums.items()}
    return StaticLayer(A_RD.cpu(), B_OR.cpu(), False, shares, power)


def active_experts(model: Any) -> dict[str, Experts]:
    """Return the experts of the active adapter by the path of their layer in the base model.

    Raises:
        ModelError: there is no RotMoLE adapter, or several are active, or its experts are blocks.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    experts: dict[str, Experts] = {}
    for path, layer in base.named_modules():
        if not isinstance(layer, RotMoleLayer):
            continue
        active = [name for name in layer.active_adapters if name in layer.rotmole_experts]
        if len(active) > 1:
            raise ModelError(
                f"adapters {', '.join(active)} are active together; activate one with set_adapter()"
            )
        if active and layer.rotmole_blocks:
            raise ModelError(
                "the adapter has router_scope 'block': its experts are whole feed-forward blocks "
                "with an activation inside, for which no linear map of a single layer can stand; "
                "serve it with rotmole, or train one with router_scope 'layer'"
            )
        if active:
            experts[path] = layer.experts(active[0])
    if not experts:
        raise ModelError("the model has no active RotMoLE adapter; load one and activate it")
    return experts


def plain_lora(experts: Experts) -> tuple[Tensor, Tensor] | None:
    """Return (A [r, D], B [O, r]) in float64 if the experts add B A x for every token, else None.

    They do with one expert and without rotation; a shared expert must have neither gate nor
    rotation. With init_weights "svd" the start is subtracted, which doubles the rank.
    """
    spec, weights = experts.spec, experts.weights()
    if spec.num_experts > 1 or spec.rotation != "none":
        return None
    terms = [(weights, spec.scale)]
    residual = experts.residual()
    if residual is not None:
        terms.append((residual, -spec.scale))
    if spec.shared is not None and weights.shared is not None:
        if weights.shared.router or spec.shared.rotation != "none":
            return None
        terms.append((weights.shared, spec.shared.scale))
    A_RD = torch.cat([term.A_ERD[0].detach().double() for term, _ in terms])
    B_RO = torch.cat([term.B_ERO[0].detach().double() * scale for term, scale in terms])
    return A_RD, B_RO.T


def needed_rank(model: Any) -> int | None:
    """Return the rank at which the static LoRA is the adapter itself; None if there is none."""
    ranks = []
    for experts in active_experts(model).values():
        own = plain_lora(experts)
        if own is None:
            return None
        ranks.append(len(own[0]))
    return max(ranks)


def _padded(A_RD: Tensor, B_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - len(A_RD)
    pad = torch.nn.functional.pad
    return pad(A_RD, (0, 0, 0, more)), pad(B_OR, (0, more))


def _groups(
    experts: Mapping[str, Experts], parts: int, memory: int
) -> Iterator[dict[str, Experts]]:
    """Yield the layers in order, as many at once as their sums fit into memory."""
    group: dict[str, Experts] = {}
    held = 0
    for path, module in experts.items():
        inputs, outputs = module.expert_A.shape[-1], module.expert_B.shape[-1]
        size = 8 * inputs * (inputs + outputs) * parts
        if group and held + size > memory:
            yield group
            group, held = {}, 0
        group[path] = module
        held += size
    if group:
        yield group


def total_share(layers: Mapping[str, StaticLayer], part: str) -> Share:
    """Return the shares of one part over all layers, each layer weighed by its power."""
    power = sum(layer.power[part] for layer in layers.values())
    if power == 0:
        return Share(1.0, 1.0, 0)

    def mean_of(name: str) -> float:
        weighed = (getattr(x.shares[part], name) * x.power[part] for x in layers.values())
        return sum(weighed) / power

    tokens = max(layer.shares[part].tokens for layer in layers.values())
    return Share(mean_of("static"), mean_of("linear"), tokens)
