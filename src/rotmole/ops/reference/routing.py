"""Every router, scoring and selection as loops over tokens and experts.

A new router or selection needs its twin here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.reference.method import Routing, best, epsilon, wide

# One function for each router, in ROUTERS below. All take one token's input, the parameters, the
# expert's number, that expert's A, the token's id and the seed, and use some.
Parameters = Mapping[str, Tensor]


def linear(x_D: Tensor, p: Parameters, e: int, A_RD: Tensor, id_: int, seed: int) -> Tensor:
    """w_e . x."""
    if "router_hidden" not in p:
        return torch.dot(p["router_weight"][e], x_D)
    hidden = [torch.dot(w_D, x_D) for w_D in p["router_hidden"]]
    weights = zip(p["router_weight"][e], hidden, strict=True)
    return sum((w * h for w, h in weights), start=x_D.new_zeros(()))


def gelu(x: Tensor) -> Tensor:
    """x times the share of a standard normal distribution that lies below x."""
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
    """|A_e x|, without a gradient."""
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
TEMPERATURE = {"cosine": 0.07, "hash": None, "magnitude": None}  # all others have 1


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
    default = TEMPERATURE.get(router, 1.0)
    rows = []
    for t in range(len(x_TD)):
        row = []
        for e in range(experts):
            A_RD = x_TD[:0] if A_ERD is None else A_ERD[e]
            id_ = 0 if ids_T is None else int(ids_T[t])
            score = ROUTERS[router](x_TD[t], p, e, A_RD, id_, seed)
            if default is not None:
                score = score / (default if temperature is None else temperature)
            row.append(score)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def threshold_of(x_TD: Tensor, weight_1D: Tensor, bias_1: Tensor, *, experts: int) -> Tensor:
    """tau = 1 / (E (1 + exp(-(w . x + b)))): [T, 1]."""
    x_TD = wide(x_TD)
    logit_T = [torch.dot(wide(weight_1D)[0], x_D) + wide(bias_1)[0] for x_D in x_TD]
    return torch.stack([1 / (experts * (1 + torch.exp(-logit))) for logit in logit_T])[:, None]


def top_k_of(score_ET: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the K largest scores of each token [K, T], best first, and their experts [K, T]."""
    experts = [best(score_E.tolist(), top_k) for score_E in score_ET.T]
    index_TK = torch.tensor(experts, dtype=torch.long).reshape(score_ET.shape[1], top_k)
    rows = [torch.stack([score_ET[e, t] for e in row]) for t, row in enumerate(experts)]
    return torch.stack(rows).T, index_TK.T


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
    sequence_T: Tensor | None = None,
) -> Routing:
    """Select experts and weigh them; the arguments are those of rotmole.ops.routing.select."""
    logits_TE = wide(logits_TE)
    T, E = logits_TE.shape
    numbers = [t * sequences // T for t in range(T)] if sequence_T is None else sequence_T.tolist()
    chosen = chosen_by_experts(logits_TE.detach(), selection, top_k, numbers, mask_T)
    weights, selected, probabilities = [], torch.zeros(T, E, dtype=torch.bool), []
    for t in range(T):
        raw = torch.exp(logits_TE[t] - logits_TE[t].max())
        s_E = raw / raw.sum() if scoring == "softmax" else 1 / (1 + torch.exp(-logits_TE[t]))
        p_E = s_E / s_E.sum()
        score_E = (logits_TE[t] if weight != "learned" else s_E).detach()
        bias = bias_E if bias_E is not None else torch.zeros(E)
        order = best([float(score_E[e]) + float(bias[e]) for e in range(E)], E)
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


def chosen_by_experts(
    logits_TE: Tensor, selection: str, c: int, sequence_T: list[int], mask_T: Tensor | None
) -> dict[int, list[int]]:
    """Return for each token the experts that chose it; each takes its best tokens of a sequence."""
    T, E = logits_TE.shape
    chosen: dict[int, list[int]] = {t: [] for t in range(T)}
    if selection != "expert_choice":
        return chosen
    for n in sorted(set(sequence_T)):
        tokens = [t for t in range(T) if sequence_T[t] == n]
        unpadded = [t for t in tokens if mask_T is None or mask_T[t]]
        for e in range(E):
            p = [float(torch.softmax(logits_TE[t], dim=0)[e]) for t in unpadded]
            for place in best(p, max(1, math.floor(c * len(unpadded) / E))):
                chosen[unpadded[place]].append(e)
    return chosen


def choose(
    logits_ET: Tensor, *, top_k: int, selection: str, norm_topk_prob: bool
) -> list[dict[int, Tensor]]:
    """Return for each token its experts' weights by expert number, the best expert first."""
    tokens = []
    for logits_E in logits_ET.T:
        E = len(logits_E)
        chosen = range(E) if selection == "dense" else best(logits_E.tolist(), top_k)
        total = sum(torch.exp(logits_E[e]) for e in (chosen if norm_topk_prob else range(E)))
        tokens.append({e: torch.exp(logits_E[e]) / total for e in chosen})
    return tokens


def spread_chosen(weight_KT: Tensor, index_KT: Tensor, experts: int) -> Tensor:
    """Return the weights of all experts [E, T], 0 for experts that index_KT does not name."""
    weight_ET = weight_KT.new_zeros(experts, weight_KT.shape[1])
    for k, t in itertools.product(*map(range, index_KT.shape)):
        weight_ET[int(index_KT[k, t]), t] = weight_KT[k, t]
    return weight_ET


def route(
    router: str,
    x_TD: Tensor,
    parameters: Parameters,
    *,
    A_ERD: Tensor,
    ids_T: Tensor | None = None,
    temperature: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[Tensor, Routing]:
    """Score the experts of every token, select some and weigh them.

    Args:
        parameters: of the router, and of the threshold if the selection has one.
        settings: of `select`.

    Returns:
        (logits [T, E], the routing).
    """
    experts = len(A_ERD)
    logits_TE = router_scores(
        router,
        x_TD,
        parameters,
        experts=experts,
        A_ERD=A_ERD,
        ids_T=ids_T,
        temperature=temperature,
        seed=seed,
    )
    if settings.get("selection") == "threshold":
        threshold = [parameters[f"router_threshold_{part}"] for part in ("weight", "bias")]
        settings["tau_T1"] = threshold_of(x_TD, *threshold, experts=experts)
    weight = {"hash": "mean", "magnitude": "one"}.get(router, "learned")
    return logits_TE, select(logits_TE, weight=weight, **settings)
