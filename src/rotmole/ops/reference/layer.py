"""A whole layer with a linear router: output, gradients, and weights laid out in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.reference.method import mixture, rotated, route, shared_weight
from rotmole.ops.reference.products import dropped

SHARED = "shared_"
GATES = ("rotation_vector", "rotation_angle", "rotation_center", "rotation_down")


def logits_of(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """Return w_e . x of every token and expert, [T, E]."""
    return torch.stack([torch.stack([torch.dot(w_D, x_D) for w_D in router_ED]) for x_D in x_TD])


def layer(
    x_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    *,
    rotation: str,
    scale: float,
    router_ED: Tensor | None = None,
    weight_TE: Tensor | None = None,
    top_k: int = 1,
    selection: str = "top_k",
    norm_topk_prob: bool = True,
    keep_TD: Tensor | None = None,
    keep_scale: float = 1.0,
    base_TO: Tensor | None = None,
    rotation_input: str = "x",
    shared: Mapping[str, Tensor] | None = None,
    shared_settings: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return base + s sum_e g_e R_e(x)[A_e drop(x)] B_e, and the router's logits.

    The weights g are weight_TE, or come from the router (then the logits are not None).

    Args:
        shared: tensors of the shared expert by name: A, B, gate, and those of its rotation.
        shared_settings: its rotation, scale and rotation_input.
    """
    logits_TE = None
    if weight_TE is None:
        assert router_ED is not None
        logits_TE = logits_of(x_TD, router_ED)
        weight_TE = route(
            logits_TE, top_k=top_k, selection=selection, norm_topk_prob=norm_topk_prob
        ).weight_TE
    dropped_TD = dropped(x_TD, keep_TD, keep_scale)
    y_TO = mixture(
        x_TD, dropped_TD, weight_TE, A_ERD, B_ERO, gates,
        rotation=rotation, scale=scale, rotation_input=rotation_input, logits_TE=logits_TE,
    )  # fmt: skip
    if shared is not None:
        y_TO = y_TO + shared_expert(x_TD, dropped_TD, shared, **(shared_settings or {}))
    return y_TO if base_TO is None else base_TO + y_TO, logits_TE


def shared_expert(
    x_TD: Tensor, dropped_TD: Tensor, tensors: Mapping[str, Tensor], **settings: Any
) -> Tensor:
    """Return s_0 g_0 R_0(x)[A_0 drop(x)] B_0, [T, O]: a mixture of one expert."""
    gates = {name: tensor for name, tensor in tensors.items() if name in GATES}
    weight_T1 = shared_weight(x_TD, tensors.get("gate"))
    return mixture(
        x_TD, dropped_TD, weight_T1, tensors["A"], tensors["B"], gates, **settings
    )  # fmt: skip


def layer_gradients(
    tensors: Mapping[str, Tensor], dy_TO: Tensor, dlogits_TE: Tensor | None = None, **settings: Any
) -> dict[str, Tensor]:
    """Return the gradients of the layer's tensors, which autograd takes.

    Args:
        tensors: arguments of `layer` that get a gradient, by name; gates by their own names, and
            what belongs to the shared expert with "shared_" before its name.
        dy_TO, dlogits_TE: gradients of what `layer` returns.
        settings: the other arguments of `layer`.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    gates = {name: leaf for name, leaf in leaves.items() if name in GATES}
    shared = {n.removeprefix(SHARED): leaf for n, leaf in leaves.items() if n.startswith(SHARED)}
    arguments: dict[str, Any] = {
        name: leaf for name, leaf in leaves.items() if name not in GATES and SHARED not in name
    }
    if shared:
        arguments["shared"] = shared
    y_TO, logits_TE = layer(gates=gates, **arguments, **settings)
    total = (y_TO * dy_TO).sum()
    if logits_TE is not None and dlogits_TE is not None:
        total = total + (logits_TE * dlogits_TE).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def weighted_activations(
    x_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    router_ED: Tensor,
    *,
    rotation: str,
    rotation_input: str = "x",
    **settings: Any,
) -> Tensor:
    """Return m_e = g_e R_e(x)[A_e x], all experts' side by side: [T, E R]. Settings: of `route`."""
    logits_TE = logits_of(x_TD, router_ED)
    weight_TE = route(logits_TE, **settings).weight_TE
    _, turned_TER = rotated(
        x_TD, x_TD, A_ERD, B_ERO, gates,
        rotation=rotation, rotation_input=rotation_input, logits_TE=logits_TE,
    )  # fmt: skip
    rows = []
    for weight_E, turned_ER in zip(weight_TE, turned_TER, strict=True):
        rows.append(torch.cat([g * z_R for g, z_R in zip(weight_E, turned_ER, strict=True)]))
    return torch.stack(rows)


def pack(layers: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Lay rows of layers' weights under one another: [N, D].

    Args:
        layers: for each layer A [E, R, D], router [E, D], and what else reads x: vector and angle
            gate, or C [1, H, D], by name.

    Returns:
        All rows of A, then of the router, of the vector and of the angle gate, of C; in each of
        these layer by layer and in each layer expert by expert, but those of the router expert by
        expert and for each expert layer by layer.
    """
    rows = []
    for name in ("A", "router", "rotation_vector", "rotation_angle", "rotation_down"):
        if name not in layers[0]:
            continue
        if name == "router":
            experts = len(layers[0][name])
            rows += [weights[name][e] for e in range(experts) for weights in layers]
            continue
        for weights in layers:
            for of_expert in weights[name]:
                rows += list(of_expert.reshape(-1, of_expert.shape[-1]))
    return torch.stack(rows)
