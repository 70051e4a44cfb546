"""Slow twins of every router, scoring and selection; loops over tokens and experts.

Like reference.py: straight from the equations, one token and one expert at a time, sharing no
function with the fast path. A new router or selection needs its twin here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rotmole.ops.reference.method import Routing, epsilon, wide

# One function per router, in ROUTERS below: all take one token's input, the parameters, the expert,
# and what else a router may read (that expert's A, the token's id, the seed); some use it.
Parameters = Mapping[str, Tensor]


def linear(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """w_e . x."""
    return torch.dot(p["router_weight"][e], x_D)


def gelu(x: Tensor) -> Tensor:
    """x times the share of a standard normal that lies below x."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """Sum over h of W2_eh gelu(W1_h . x)."""
    width = p["router_hidden"].shape[0]
    hidden = [gelu(torch.dot(p["router_hidden"][h], x_D)) for h in range(width)]
    return sum(
        (p["router_weight"][e, h] * hidden[h] for h in range(width)), start=x_D.new_zeros(())
    )


def mlp_hadamard(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """Sum over h of W2_eh gelu(W1_h . x) (W3_h . x)."""
    total = x_D.new_zeros(())
    for h in range(p["router_hidden"].shape[0]):
        gate = gelu(torch.dot(p["router_hidden"][h], x_D))
        total = total + p["router_weight"][e, h] * gate * torch.dot(p["router_factor"][h], x_D)
    return total


def attention(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """(Wq x) . k_e / sqrt(H)."""
    query_H = p["router_query"] @ x_D
    return torch.dot(query_H, p["router_key"][e]) / math.sqrt(len(query_H))


def cosine(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """(Wq x) . k_e / (|Wq x| |k_e|), squared lengths with e added."""
    query_H, key_H = p["router_query"] @ x_D, p["router_key"][e]
    lengths = [torch.sqrt(torch.dot(v, v) + epsilon(x_D)) for v in (query_H, key_H)]
    return torch.dot(query_H, key_H) / (lengths[0] * lengths[1])


def hybrid(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """a linear + (1 - a) attention, a = 1 / (1 + exp(-mix))."""
    a = 1 / (1 + torch.exp(-p["router_mix"][0]))
    return a * linear(x_D, p, e, A_RD, id_, seed) + (1 - a) * attention(x_D, p, e, A_RD, id_, seed)


def murmur(h: int) -> int:
    """MurmurHash3's finaliser for 32 bits."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def hash_(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """The first 24 bits of murmur(murmur(id ^ G seed) ^ G (e + 1)), as a number in [0, 1)."""
    golden = 0x9E3779B9
    key = murmur((id_ % 2**32) ^ (seed * golden % 2**32))
    return x_D.new_tensor((murmur(key ^ ((e + 1) * golden % 2**32)) // 2**8) / 2**24)


def magnitude(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """|A_e x|, which nothing learns from."""
    return torch.sqrt(((wide(A_RD) @ x_D) ** 2).sum()).detach()


Score = Callable[[Tensor, Parameters, int, Tensor, int, int], Tensor]
ROUTERS: dict[str, Score] = {
    "linear": linear,
    "mlp": mlp,
    "mlp_hadamard": mlp_hadamard,
    "cosine": cosine,
    "attention": attention,
    "hybrid": hybrid,
    "hash": hash_,
    "magnitude": magnitude,
}
TEMPERATURE = {"cosine": 0.07, "hash": None, "magnitude": None}  # 1 for all others; None: none


def router_scores(
    router: str,
    x_TD: Tensor,
    parameters: Parameters,
    *,
    experts: int,
    A_ERD: Tensor | None = None,
    ids_T: Tensor | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Return every expert's score for every token, divided by the temperature: [T, E]."""
    x_TD, p = wide(x_TD), {name: wide(parameter) for name, parameter in parameters.items()}
    own = TEMPERATURE.get(router, 1.0)
    rows = []
    for t in range(len(x_TD)):
        row = []
        for e in range(experts):
            A_RD = x_TD[:0] if A_ERD is None else A_ERD[e]
            id_ = 0 if ids_T is None else int(ids_T[t])
            score = ROUTERS[router](x_TD[t], p, e, A_RD, id_, seed)
            if own is not None:
                score = score / (own if temperature is None else temperature)
            row.append(score)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def threshold_of(x_TD: Tensor, weight_1D: Tensor, bias_1: Tensor, *, experts: int) -> Tensor:
    """tau = 1 / (E (1 + exp(-(w . x + b)))): [T, 1]."""
    x_TD = wide(x_TD)
    logit_T = [torch.dot(wide(weight_1D)[0], x_D) + wide(bias_1)[0] for x_D in x_TD]
    return torch.stack([1 / (experts * (1 + torch.exp(-logit))) for logit in logit_T])[:, None]


def best(values: list[float], count: int) -> list[int]:
    """Return the indices of the `count` largest; of equal ones the lower index comes first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def select(
    logits_TE: Tensor,
    *,
    selection: str = "top_k",
    scoring: str = "softmax",
    top_k: int = 1,
    norm_topk_prob: bool = True,
    top_p: float = 1.0,
    tau_T1: Tensor | None = None,
    bias_E: Tensor | None = None,
    weight: str = "learned",
    sequences: int = 1,
    mask_T: Tensor | None = None,
) -> Routing:
    """Select experts and weigh them; settings as of rotmole.ops.routing.selection.select."""
    logits_TE = wide(logits_TE)
    T, E = logits_TE.shape
    chosen = choices(logits_TE.detach(), selection, top_k, sequences, mask_T)
    weights, selected, probabilities = [], torch.zeros(T, E, dtype=torch.bool), []
    for t in range(T):
        raw = torch.exp(logits_TE[t] - logits_TE[t].max())
        s_E = raw / raw.sum() if scoring == "softmax" else 1 / (1 + torch.exp(-logits_TE[t]))
        p_E = s_E / s_E.sum()
        given = (logits_TE[t] if weight != "learned" else s_E).detach()
        bias = bias_E if bias_E is not None else torch.zeros(E)
        order = best([float(given[e]) + float(bias[e]) for e in range(E)], E)
        if selection == "top_k":
            S = order[:top_k]
        elif selection == "dense":
            S = list(range(E))
        elif selection == "top_p":
            sizes = range(1, E + 1)
            S = next(
                (
                    order[:n]
                    for n in sizes
                    if float(sum(p_E.detach()[e] for e in order[:n])) >= top_p
                ),
                order,
            )
        elif selection == "threshold":
            assert tau_T1 is not None
            S = [e for e in range(E) if p_E[e] >= tau_T1[t, 0]]
        else:
            S = chosen[t]
        selected[t, S] = True
        probabilities.append(p_E)
        tau = torch.zeros(()) if tau_T1 is None else tau_T1[t, 0]
        g = weigh(S, s_E, p_E, tau, selection, norm_topk_prob, weight)
        weights.append(torch.stack([g.get(e, s_E.new_zeros(())) for e in range(E)]))
    if weight != "learned":
        return Routing(torch.stack(weights), selected, selected.to(logits_TE) / top_k)
    return Routing(torch.stack(weights), selected, torch.stack(probabilities))


def weigh(
    S: list[int],
    s_E: Tensor,
    p_E: Tensor,
    tau: Tensor,
    selection: str,
    norm_topk_prob: bool,
    weight: str,
) -> dict[int, Tensor]:
    """Return the weight of each selected expert of one token."""
    if weight != "learned":
        return {e: s_E.new_tensor(1.0 if weight == "one" else 1 / len(S)) for e in S}
    if selection == "expert_choice":
        return {e: p_E[e] for e in S}
    share = {e: p_E[e] - tau if selection == "threshold" else s_E[e] for e in S}
    if selection != "threshold" and not norm_topk_prob:
        return share
    total = sum(share.values(), start=s_E.new_zeros(()))
    return {
        e: value / total if float(total.detach()) > 0 else 0 * value for e, value in share.items()
    }


def choices(
    logits_TE: Tensor, selection: str, c: int, sequences: int, mask_T: Tensor | None
) -> dict[int, list[int]]:
    """Return which experts chose each token, each taking its best ones of a sequence."""
    T, E = logits_TE.shape
    chosen: dict[int, list[int]] = {t: [] for t in range(T)}
    if selection != "expert_choice":
        return chosen
    length = T // sequences
    for n in range(sequences):
        tokens = range(n * length, (n + 1) * length)
        real = [t for t in tokens if mask_T is None or mask_T[t]]
        for e in range(E):
            p = [float(torch.softmax(logits_TE[t], dim=0)[e]) for t in real]
            for place in best(p, max(1, math.floor(c * len(real) / E))):
                chosen[real[place]].append(e)
    return chosen
