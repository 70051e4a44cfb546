"""Look into the forward passes of a model's adapted layers, without a line in these layers.

A hook hands each call of an adapter's experts to an observer, inside the call, so parameters that
are sharded are whole. The hooks are there while somebody watches, and only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotmole.errors import ConfigError
from rotmole.ops.mixture.banks import Rotated
from rotmole.ops.mixture.dense import Turns, shared_weight, turns
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.route import route, select_by
from rotmole.ops.routing.selection import Routed, Routing
from rotmole.ops.spec import Spec, Weights
from rotmole.ops.transforms import is_transformed
from rotmole.tuner.batch.batch import Batch, Layout
from rotmole.tuner.experts.blocks import BlockPass
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.experts.ways import Call, compute_dtype
from rotmole.tuner.layer import RotMoleLayer

PIECE = 1024
"""Tokens whose rotations are computed at once; those of radar are as wide as its outputs."""


class Seen(NamedTuple):
    """One call of one layer.

    Attributes:
        layer: the adapted layer; its rotmole_path is its path in the base model.
        experts: of the adapter, with their Spec.
        call: the layer's input.
        batch: at hand.
        layout: how the T rows of the input lie in the batch; None if that is unknown.
        routing: of the T tokens, each [T, E]; None for one expert.
        logits_TE: the router's; None without one. In a block-routed block its first layer has them.
        expert_TK: which expert sits in which slot, in the outer layer of a block-routed block,
            whose input has K rows for each token; None elsewhere.
        rotated: the rotations of the routed experts and of the shared one, where the layer's way of
            computing left them.
    """

    layer: RotMoleLayer
    experts: Experts
    call: Call
    batch: Batch
    layout: Layout | None
    routing: Routing | None
    logits_TE: Tensor | None
    expert_TK: Tensor | None = None
    rotated: Sequence[Rotated] = ()

    def selected(self) -> Tensor:
        """Return [T, E], True where the expert is selected; all of it for one expert."""
        if self.routing is not None:
            return self.routing.selected_TE
        x_TD = self.call.x_TD
        return torch.ones(len(x_TD), 1, dtype=torch.bool, device=x_TD.device)

    def turns(self) -> tuple[Turns, Tensor] | None:
        """Return the rotations of the routed experts, without dropout.

        They are the forward pass's own where it left them, and are computed again where not.

        Returns:
            (the turns of N rows, [N, E] which of them count), N being T, or K T in the outer layer
            of a block, slot by slot; None without a rotation.
        """
        spec, experts = self.experts.spec, self.experts
        if spec.rotation == "none":
            return None
        selected_TE = self.selected()
        counted_NE = selected_TE
        if self.expert_TK is not None:
            each_E = torch.arange(spec.num_experts, device=selected_TE.device)
            sits_KTE = self.expert_TK.mT.unsqueeze(-1) == each_E
            counted_NE = (sits_KTE & selected_TE).flatten(0, 1)
        if self.rotated:
            return _measured(spec, self.rotated[0]), counted_NE
        dtype = compute_dtype(self.call.x_TD, experts.expert_A, spec)
        weights = experts.weights().cast(spec, dtype)
        return _in_pieces(
            spec, self.call.x_TD, dtype, weights, counted_NE, self.logits_TE
        ), counted_NE

    def shared(self) -> tuple[Tensor, Turns | None] | None:
        """Return the shared expert's weight [T, 1] and rotation; None without one."""
        spec, weights = self.experts.spec.shared, self.experts.weights().shared
        if spec is None or weights is None:
            return None
        x_TD = self.call.x_TD
        weight_T1 = shared_weight(x_TD, weights)
        if spec.rotation == "none":
            return weight_T1, None
        if self.rotated:
            return weight_T1, _measured(spec, self.rotated[1])
        dtype = compute_dtype(x_TD, self.experts.expert_A, self.experts.spec)
        all_T1 = torch.ones_like(weight_T1, dtype=torch.bool)
        return weight_T1, _in_pieces(spec, x_TD, dtype, weights.cast(spec, dtype), all_T1)


def _measured(spec: Spec, rotated: Rotated) -> Turns:
    """Return what `turns` computes, from the values of a forward pass."""
    z_ERT, turned_ERT, gate, _ = rotated
    with without_autocast(z_ERT):
        angle_EMT = ROTATIONS[spec.rotation].angle(z_ERT, turned_ERT, gate)
    return Turns(angle_EMT, z_ERT, turned_ERT)


def _in_pieces(
    spec: Spec,
    x_TD: Tensor,
    dtype: torch.dtype,
    weights: Weights,
    selected_TE: Tensor,
    logits_TE: Tensor | None = None,
) -> Turns:
    """Compute `turns` of some tokens at a time, so that memory does not grow with a batch."""
    pieces = []
    for start in range(0, max(len(x_TD), 1), PIECE):
        rows = slice(start, start + PIECE)
        x_ND = x_TD[rows].to(dtype)
        logits_NE = None if logits_TE is None else logits_TE[rows]
        pieces.append(turns(spec, x_ND, x_ND, weights, selected_TE[rows], logits_NE))
    if len(pieces) == 1:
        return pieces[0]
    angle_EMT, z_ERT = (torch.cat([piece[i] for piece in pieces], dim=-1) for i in (0, 1))  # type: ignore[misc] # both are tensors
    turned = [piece.turned_ERT for piece in pieces if piece.turned_ERT is not None]
    return Turns(angle_EMT, z_ERT, torch.cat(turned, dim=-1) if turned else None)


Observer = Callable[[Seen], None]


def watched_layers(model: Any, adapter: str) -> list[RotMoleLayer]:
    """Return the layers of a model, or of a wrapper around one, that carry an adapter."""
    layers = [module for module in model.modules() if isinstance(module, RotMoleLayer)]
    return [layer for layer in layers if adapter in layer.rotmole_experts]


def adapter_to_watch(model: Any, adapter: str | None) -> str:
    """Return the adapter of that name, or the only active one.

    Raises:
        ConfigError: there is none, or several are active and none is named.
    """
    layers = [module for module in model.modules() if isinstance(module, RotMoleLayer)]
    names = list(dict.fromkeys(name for layer in layers for name in layer.rotmole_experts))
    if adapter is not None and adapter not in names:
        has = f"its adapters are {', '.join(names)}" if names else "it has no rotmole adapter"
        raise ConfigError(f"the model has no rotmole adapter {adapter!r}; {has}")
    if adapter is not None:
        return adapter
    active = active_adapters(model)
    if len(active) != 1:
        what = f"adapters {', '.join(active)} are active" if active else "no adapter is active"
        raise ConfigError(f"{what}; say whose routing is recorded: adapter=NAME, one of {names}")
    return active[0]


def active_adapters(model: Any) -> list[str]:
    """Return the names of the adapters that are active in any layer."""
    layers = [module for module in model.modules() if isinstance(module, RotMoleLayer)]
    names = dict.fromkeys(name for layer in layers for name in layer.rotmole_experts)
    return [n for n in names if any(n in layer.active_adapters for layer in layers)]


@contextmanager
def watch(model: Any, adapter: str, observe: Observer) -> Iterator[None]:
    """Call an observer with each call of an adapter's layers in a block, without gradients.

    The second run of a checkpointed block, torch.compile and torch.func are left out.

    Args:
        model: with the adapter; any wrapper around it will do.
        adapter: its name.
        observe: gets what is seen of each call.
    """
    handles = [
        layer.experts(adapter).register_forward_pre_hook(_hook(layer, observe))
        for layer in watched_layers(model, adapter)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layer: RotMoleLayer, observe: Observer) -> Any:
    def hook(experts: Experts, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.compiler.is_compiling() or is_transformed():
            return None
        if torch._C._current_graph_task_id() != -1:
            return None  # the second run of a checkpointed block
        add, ways, call = args
        return _Watched(layer, add, observe), ways, call

    return hook


class _Watched:
    """The way of a layer to compute one call, with somebody who looks on.

    Others may run the way that a hook sees a second time; a call is shown once.
    """

    def __init__(self, layer: RotMoleLayer, add: Any, observe: Observer) -> None:
        self.layer, self.add, self.observe = layer, add, observe
        self.shown = False

    def __call__(self, experts: Experts, ways: Any, call: Call) -> Any:
        if self.shown:
            return self.add(experts, ways, call)
        self.shown = True
        follows = call.block is not None and not call.block.part.leads
        block_pass = call.block.shared() if follows else None
        rotated: list[Rotated] = []
        result = self.add(experts, ways, call._replace(rotated=rotated))
        with torch.no_grad():
            self.observe(_seen(self.layer, experts, call, result[1], block_pass, rotated))
        return result


def _seen(
    layer: RotMoleLayer,
    experts: Experts,
    call: Call,
    routed: Routed | None,
    block_pass: BlockPass | None,
    rotated: Sequence[Rotated],
) -> Seen:
    x, expert_TK = call.x, None
    batch = layer.rotmole_stack.batch(layer.rotmole_block)
    logits_TE = routing = None
    if call.block is not None:
        batch = call.block.batch
        if call.block.part.outer:
            x = x[0]  # all slots of a token lie alike in the batch
    if block_pass is not None:
        routing = block_pass.routing
        assert call.block is not None
        expert_TK = block_pass.expert_TK if call.block.part.outer else None
    elif routed is not None:
        logits_TE, routing = routed.logits_TE, routed.routing
        if routing is None:  # made inside the fused function
            routing = _made_inside(experts.spec, routed, rotated)
    elif experts.has_router:  # cached decoding keeps none
        weights: Weights = experts.weights()
        logits_TE, routing = route(experts.spec, call.x_TD, weights, tokens=call.tokens)
    layout = batch.layout(x)
    return Seen(layer, experts, call, batch, layout, routing, logits_TE, expert_TK, rotated)


def _made_inside(spec: Spec, routed: Routed, rotated: Sequence[Rotated]) -> Routing:
    """Return the routing that the fused function made, again where it left none."""
    if not rotated or rotated[0].weight_ET is None:
        return select_by(spec, routed.logits_TE)
    probability_TE = torch.softmax(at_least_float32(routed.logits_TE), dim=-1)
    return Routing(rotated[0].weight_ET.mT, routed.selected(), probability_TE)
