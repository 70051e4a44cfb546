"""From a layer's input to its routing: score, select and weigh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from rotmole.ops.routing.generations import select_generations
from rotmole.ops.routing.routers import ROUTERS, router_scores, router_shapes
from rotmole.ops.routing.selection import Routing, select
from rotmole.ops.routing.threshold import threshold_of, threshold_shapes
from rotmole.ops.spec import NO_TOKENS, Spec, Tokens, Weights


def scaling_gate_shapes(spec: Spec, D: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the scaling gate of a layer with D inputs.

    >>> scaling_gate_shapes(Spec(num_experts=4), D=8)
    {'router_weight': (4, 8)}
    """
    shapes = router_shapes(spec.router, E=spec.num_experts, D=D, H=spec.router_dim)
    return shapes | (threshold_shapes(D) if spec.selection == "threshold" else {})


def route(
    spec: Spec,
    x_TD: Tensor,
    weights: Weights,
    *,
    tokens: Tokens = NO_TOKENS,
    training: bool = False,
) -> tuple[Tensor, Routing]:
    """Score the experts of every token, select some and weigh them.

        logits = router(x);  S, g = selection(logits)

    Args:
        spec: router, scoring, selection and their settings.
        x_TD: [T, D] layer input.
        weights: of the layer; its router and bias are read, and A by router "magnitude".
        tokens: ids for router "hash"; padding and sequences for selection "expert_choice".
        training: whether the router's input is jittered.

    Returns:
        (logits [T, E], the routing), both in at least float32.

    >>> import torch
    >>> A, B = torch.ones(3, 2, 4), torch.ones(3, 2, 5)
    >>> weights = Weights(A, B, router={"router_weight": torch.eye(3, 4)})
    >>> route(Spec(num_experts=3), torch.eye(4)[:1], weights)[1].weight_TE
    tensor([[1., 0., 0.]])
    """
    names = [name for name in weights.router if "threshold" not in name]
    logits_TE = router_scores(
        spec.router,
        x_TD,
        {name: weights.router[name] for name in names},
        experts=spec.num_experts,
        A_ERD=weights.A_ERD,
        ids_T=tokens.ids_T,
        temperature=spec.router_temperature,
        jitter=spec.router_jitter if training else 0.0,
        seed=spec.router_seed,
    )
    tau_T1 = None
    if spec.selection == "threshold":
        weight, bias = (weights.router[f"router_threshold_{part}"] for part in ("weight", "bias"))
        tau_T1 = threshold_of(x_TD, weight, bias, experts=spec.num_experts)
    return logits_TE, select_by(spec, logits_TE, tau_T1, weights.bias_E, tokens)


def select_by(
    spec: Spec,
    logits_TE: Tensor,
    tau_T1: Tensor | None = None,
    bias_E: Tensor | None = None,
    tokens: Tokens = NO_TOKENS,
) -> Routing:
    """Return what the selection of a layer makes of the router's logits; see `select`.

    A mixture that has grown: see `select_generations`.
    """
    chooses: Callable[..., Routing] = select
    if spec.experts_added:
        chooses = partial(select_generations, generations=spec.generations)
    return chooses(
        logits_TE,
        selection=spec.selection,
        scoring=spec.scoring,
        top_k=spec.top_k,
        norm_topk_prob=spec.norm_topk_prob,
        top_p=spec.top_p,
        tau_T1=tau_T1,
        bias_E=bias_E,
        weight=ROUTERS[spec.router].weight,
        sequences=tokens.sequences,
        mask_T=tokens.mask_T,
        sequence_T=tokens.sequence_T,
    )
