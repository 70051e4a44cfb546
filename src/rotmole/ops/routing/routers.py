"""The table of routers: how a token's experts are scored, and which parameters that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from rotmole.ops.precision import at_least_float32, epsilon, without_autocast

DEFAULT_DIM = 16  # hidden width of a router that has one; X-MoE's code projects to 16 as well


class View(NamedTuple):
    """What a router may read.

    Attributes:
        x_TD: [T, D] layer input, in at least float32.
        experts: E.
        A_ERD: [E, R, D] the experts' input factors; only magnitude reads them.
        ids_T: [T] token ids; only hash reads them.
        seed: of the hash.
    """

    x_TD: Tensor
    experts: int
    A_ERD: Tensor | None = None
    ids_T: Tensor | None = None
    seed: int = 0


Parameters = Mapping[str, Tensor]


def _linear(view: View, p: Parameters) -> Tensor:
    x_TD = linear(view.x_TD, p["router_hidden"]) if "router_hidden" in p else view.x_TD
    return linear(x_TD, p["router_weight"])


def _mlp(view: View, p: Parameters) -> Tensor:
    return linear(gelu(linear(view.x_TD, p["router_hidden"])), p["router_weight"])


def _mlp_hadamard(view: View, p: Parameters) -> Tensor:
    hidden_TH = gelu(linear(view.x_TD, p["router_hidden"])) * linear(view.x_TD, p["router_factor"])
    return linear(hidden_TH, p["router_weight"])


def _attention(view: View, p: Parameters) -> Tensor:
    query_TH = linear(view.x_TD, p["router_query"])
    return linear(query_TH, p["router_key"]) / math.sqrt(query_TH.shape[-1])


def _unit(vectors: Tensor) -> Tensor:
    """Divide by the length, smoothly where it is zero."""
    return vectors / torch.sqrt(vectors.square().sum(-1, keepdim=True) + epsilon(vectors))


def _cosine(view: View, p: Parameters) -> Tensor:
    return linear(_unit(linear(view.x_TD, p["router_query"])), _unit(p["router_key"]))


def _hybrid(view: View, p: Parameters) -> Tensor:
    share = torch.sigmoid(p["router_mix"])
    return share * _linear(view, p) + (1 - share) * _attention(view, p)


def _mix_bits(h: Tensor) -> Tensor:
    """Scramble 32-bit numbers held in int64 (MurmurHash3's finaliser), without any overflow."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = h ^ (h >> shift)
        high = ((h >> 16) * factor & 0xFFFF) << 16  # h factor mod 2^32, by halves of h
        h = ((h & 0xFFFF) * factor + high) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _hash(view: View, p: Parameters) -> Tensor:
    """Give every (seed, token id, expert) a number of its own in [0, 1), 24 bits fine."""
    assert view.ids_T is not None, "router 'hash' needs token ids"
    ids_T = view.ids_T.to(torch.int64)
    key_T = _mix_bits(ids_T & 0xFFFFFFFF ^ (view.seed * 0x9E3779B9 & 0xFFFFFFFF))
    expert_E = torch.arange(1, view.experts + 1, device=ids_T.device) * 0x9E3779B9 & 0xFFFFFFFF
    return (_mix_bits(key_T[:, None] ^ expert_E) >> 8).to(view.x_TD.dtype) / 2**24


def _magnitude(view: View, p: Parameters) -> Tensor:
    assert view.A_ERD is not None, "router 'magnitude' needs the experts' A"
    A_ERD = at_least_float32(view.A_ERD).to(view.x_TD.dtype)
    z_TER = linear(view.x_TD, A_ERD.flatten(0, 1)).reshape(-1, *A_ERD.shape[:2])
    length_TE: Tensor = torch.linalg.vector_norm(z_TER.detach(), dim=-1)
    return length_TE


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Router:
    """One row of the table of routers.

    Attributes:
        name: the value of the `router` setting.
        score: (view, parameters) -> [T, E] logits, before the temperature.
        shapes: (E, D, H) -> name and shape of each parameter; H = 0 if it has no hidden width.
        hidden: whether it has a hidden width H, `router_dim`, also if none is given.
        factors: whether it has a hidden width only if one is given.
        temperature: what its logits are divided by if nothing is said.
        weight: "learned", or the constant weight of a selected expert: "mean" (1/K) or "one".
        reads: "x", "ids" (token ids) or "A" (x through the experts' A).
        equation: the logits, in ASCII.
    """

    name: str
    score: Callable[[View, Parameters], Tensor]
    shapes: Callable[[int, int, int], Shapes]
    hidden: bool = False
    factors: bool = False
    temperature: float = 1.0
    weight: str = "learned"
    reads: str = "x"
    equation: str = ""


def _none(E: int, D: int, H: int) -> Shapes:
    return {}


def _linear_shapes(E: int, D: int, H: int) -> Shapes:
    if not H:
        return {"router_weight": (E, D)}
    return {"router_hidden": (H, D), "router_weight": (E, H)}


def _query_and_key(E: int, D: int, H: int) -> Shapes:
    return {"router_query": (H, D), "router_key": (E, H)}


_TABLE = (
    Router(
        "linear", _linear, _linear_shapes, factors=True, equation="w_e.x, or w_e.(W1 x)",
    ),
    Router(
        "mlp", _mlp, lambda E, D, H: {"router_hidden": (H, D), "router_weight": (E, H)},
        hidden=True, equation="W2 gelu(W1 x)",
    ),
    Router(
        "mlp_hadamard", _mlp_hadamard,
        lambda E, D, H: {
            "router_hidden": (H, D), "router_factor": (H, D), "router_weight": (E, H)
        },
        hidden=True, equation="W2 (gelu(W1 x) * (W3 x))",
    ),
    Router(
        "cosine", _cosine, _query_and_key, hidden=True, temperature=0.07,
        equation="(Wq x).k_e / (|Wq x| |k_e|)",
    ),
    Router(
        "attention", _attention, _query_and_key, hidden=True, equation="(Wq x).k_e / sqrt(H)",
    ),
    Router(
        "hybrid", _hybrid,
        lambda E, D, H: {"router_weight": (E, D), **_query_and_key(E, D, H), "router_mix": (1,)},
        hidden=True, equation="a w_e.x + (1 - a) (Wq x).k_e / sqrt(H), a = sigmoid(mix)",
    ),
    Router(
        "hash", _hash, _none, weight="mean", reads="ids", equation="hash(seed, token id, e)",
    ),
    Router(
        "magnitude", _magnitude, _none, weight="one", reads="A", equation="|A_e x|",
    ),
)  # fmt: skip

ROUTERS: dict[str, Router] = {row.name: row for row in _TABLE}


def router_shapes(router: str, *, E: int, D: int, H: int | None = None) -> Shapes:
    """Return name and shape of every parameter of a router.

    Args:
        router: a name in ROUTERS.
        E, D: experts, in_features.
        H: hidden width of the routers that have one; None is 16, for linear one whole matrix.

    Returns:
        For example {"router_weight": (E, D)} for linear; {} for hash and magnitude.

    >>> router_shapes("attention", E=4, D=32, H=8)
    {'router_query': (8, 32), 'router_key': (4, 8)}
    """
    row = ROUTERS[router]
    default = 0 if row.factors else DEFAULT_DIM
    return row.shapes(E, D, default if H is None else H)


def router_scores(
    router: str,
    x_TD: Tensor,
    parameters: Parameters,
    *,
    experts: int,
    A_ERD: Tensor | None = None,
    ids_T: Tensor | None = None,
    temperature: float | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Score every expert for every token, in at least float32, also under autocast.

        linear        w_e.x, or w_e.(W1 x)              hash       hash(seed, token id, e)
        mlp           W2 gelu(W1 x)                     magnitude  |A_e x|, no gradient
        mlp_hadamard  W2 (gelu(W1 x) * (W3 x))          attention  (Wq x).k_e / sqrt(H)
        cosine        (Wq x).k_e / (|Wq x| |k_e|)       hybrid     a linear + (1 - a) attention
        logits = score / temperature

    Args:
        router: a name in ROUTERS.
        x_TD: [T, D] layer input.
        parameters: by name, as in `router_shapes`.
        experts: E.
        A_ERD: [E, R, D] input factors of the experts; magnitude needs them.
        ids_T: [T] token ids; hash needs them.
        temperature: divides the scores; None is 1, for cosine 0.07. Not used where a selected
            expert's weight is constant (hash, magnitude).
        jitter: each input of the router is multiplied by a number drawn uniformly from
            1 - jitter .. 1 + jitter; for training only. hash reads no input.
        seed: of the hash.

    Returns:
        [T, E] logits.

    Source: the six routers named by arXiv 2506.16419 (linear, attention, MLP, hybrid, hash,
    MLP-Hadamard), without biases, hidden width and learned mix being our choice; hash: Roller et
    al. 2021 (2106.04426); cosine: X-MoE (2204.09179), its temperature kept fixed; magnitude:
    FlyLoRA (2510.08396); jitter: Switch Transformer (2101.03961, section 2.4).

    >>> x = torch.ones(2, 3)
    >>> router_scores("linear", x, {"router_weight": torch.ones(4, 3)}, experts=4).shape
    torch.Size([2, 4])
    """
    row = ROUTERS[router]
    with without_autocast(x_TD):
        raised = {name: at_least_float32(parameter) for name, parameter in parameters.items()}
        first = next(iter(raised.values()), None)
        x_TD = at_least_float32(x_TD) if first is None else x_TD.to(first.dtype)
        if jitter > 0 and row.reads != "ids":
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        scores_TE = row.score(View(x_TD, experts, A_ERD, ids_T, seed), raised)
        if row.weight != "learned":
            return scores_TE
        divisor = row.temperature if temperature is None else temperature
        return scores_TE if divisor == 1 else scores_TE / divisor
