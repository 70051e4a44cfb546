"""Which experts a mixture can do without on given rows: those unused, and those alike.

An expert that no token chose can go. Of experts that are alike one stays, and its row of a linear
router is fitted to the weight that they had together:

    alike(i, j) = 2 <P_i, P_j> / (|P_i|^2 + |P_j|^2)        P_e = A_e^T B_e
    logit       = log sum of exp(logit_e) over the alike that the token chose; the largest if none
    row         = argmin_w  sum over tokens of (w.x - logit)^2 + ridge |w - mean row|^2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.prune import Kept

RIDGE = 1e-3
"""Of the fitted rows, times the mean square of an input of the router."""


@dataclass(frozen=True)
class Cut:
    """What happens to the experts of one router.

    Attributes:
        path: of its layer in the base model; the first one of a block-routed block.
        layers: paths of all layers whose experts it chooses.
        kept: numbers of the experts that stay, ascending.
        unused: numbers of those that no token chose.
        merged: number of an expert -> that of the one that stays in its place.
        share_E: share of the tokens' choices that each expert got.
    """

    path: str
    layers: tuple[str, ...]
    kept: tuple[int, ...]
    unused: tuple[int, ...]
    merged: Mapping[int, int]
    share_E: tuple[float, ...]


@dataclass
class Router:
    """One router, whose experts lie in one layer or in all layers of a block.

    Attributes:
        layers: path -> layer.
        adapter: name of the adapter.
        groups: experts that are alike, each in one group; of at least two.
        chosen_E: tokens that chose each expert.
        XX: [D, D] sum over tokens of x^T x, for a linear router with groups.
        Xt: [D] sum of x^T logit of each group.
    """

    layers: dict[str, RotMoleLayer]
    adapter: str
    groups: list[tuple[int, ...]]
    chosen_E: Tensor
    XX: Tensor | None = None
    Xt: list[Tensor] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Path of the layer with the router."""
        return next(iter(self.layers))

    @property
    def experts(self) -> Experts:
        """The experts of that layer."""
        return self.layers[self.path].experts(self.adapter)

    def listen(self) -> Any:
        """Count choices, and sum up for the fits, in every forward pass; return the hook."""
        layer = self.layers[self.path]
        fits = bool(self.groups) and _is_fitted(self.experts)

        def hook(experts: Experts, arguments: tuple[Any, ...], output: Any) -> None:
            routed, call = output[1], arguments[2]
            selected_TE = routed.selected()
            layout = layer.rotmole_stack.batch().layout(call.x)
            kept_T = None if layout is None else layout.tokens.mask_T
            if kept_T is not None:
                selected_TE = selected_TE[kept_T]
            self.chosen_E += selected_TE.sum(0).cpu()
            if not fits:
                return
            x_TD, logits_TE = call.x_TD, routed.logits_TE
            if kept_T is not None:
                x_TD, logits_TE = x_TD[kept_T], logits_TE[kept_T]
            self._sum(_wide(x_TD), _wide(logits_TE), selected_TE.cpu())

        return self.experts.register_forward_hook(hook)

    def _sum(self, x_TD: Tensor, logits_TE: Tensor, selected_TE: Tensor) -> None:
        if self.XX is None:
            width = x_TD.shape[1]
            self.XX = x_TD.new_zeros(width, width)
            self.Xt = [x_TD.new_zeros(width) for _ in self.groups]
        self.XX += x_TD.T @ x_TD
        for Xt, group in zip(self.Xt, self.groups, strict=True):
            members = list(group)
            logit_TG, chosen_TG = logits_TE[:, members], selected_TE[:, members]
            together_T = logit_TG.masked_fill(~chosen_TG, -torch.inf).logsumexp(-1)
            logit_T = torch.where(chosen_TG.any(-1), together_T, logit_TG.amax(-1))
            Xt.add_(x_TD.T @ logit_T)

    def cut(self) -> Cut:
        """Decide what stays."""
        total = max(float(self.chosen_E.sum()), 1.0)
        unused = {e for e, count in enumerate(self.chosen_E.tolist()) if not count}
        if len(unused) == len(self.chosen_E):  # no token reached the layer
            unused = set()
        merged = {}
        for group in self.groups:
            used = [e for e in group if e not in unused]
            if used:
                stays = max(used, key=lambda e: (int(self.chosen_E[e]), -e))
                merged |= {e: stays for e in used if e != stays}
        gone = unused | merged.keys()
        return Cut(
            self.path,
            tuple(self.layers),
            tuple(e for e in range(len(self.chosen_E)) if e not in gone),
            tuple(sorted(unused)),
            merged,
            tuple(float(count) / total for count in self.chosen_E),
        )

    def kept(self, cut: Cut) -> Kept:
        """Return what stays, with the fitted rows."""
        rows = {}
        for group, Xt in zip(self.groups, self.Xt, strict=False):  # none of other routers
            for stays in {cut.merged[e] for e in group if e in cut.merged}:
                rows[stays] = self._row(group, Xt)
        return Kept(cut.kept, self.experts.spec.top_k, rows)

    def _row(self, group: Sequence[int], Xt: Tensor) -> Tensor:
        assert self.XX is not None
        spec, weight_ED = self.experts.spec, _wide(self.experts.router_weight)
        members = list(group)
        count_G = self.chosen_E[members].to(weight_ED)
        mean_D = (count_G[:, None] * weight_ED[members]).sum(0) / count_G.sum()
        temperature = 1.0 if spec.router_temperature is None else spec.router_temperature
        ridge = RIDGE * self.XX.diagonal().mean()
        eye_DD = torch.eye(len(mean_D), dtype=mean_D.dtype)
        rest_D = temperature * Xt - self.XX @ mean_D
        return mean_D + torch.linalg.solve(self.XX + ridge * eye_DD, rest_D)


def _is_fitted(experts: Experts) -> bool:
    spec = experts.spec
    linear = spec.router == "linear" and spec.router_dim is None
    return linear and spec.scoring == "softmax"


def _wide(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def routers_of(model: PeftModel, adapter: str, similarity: float | None) -> list[Router]:
    """Return all routers, with the layers whose experts each chooses."""
    routers: list[Router] = []
    leaders: dict[int, Router] = {}
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, RotMoleLayer) or adapter not in layer.rotmole_experts:
            continue
        part, experts = layer.rotmole_blocks.get(adapter), layer.experts(adapter)
        if experts.has_router:
            counts_E = torch.zeros(experts.spec.num_experts, dtype=torch.int64)
            routers.append(Router({path: layer}, adapter, [], counts_E))
            if part is not None:
                leaders[part.block] = routers[-1]
        elif part is not None and part.block in leaders:
            leaders[part.block].layers[path] = layer
    if similarity is not None:
        for router in routers:
            alike = [similarities(layer.experts(adapter)) for layer in router.layers.values()]
            router.groups = _grouped(torch.stack(alike).amin(0), similarity)
    return routers


@torch.no_grad()
def similarities(experts: Experts) -> Tensor:
    """Return [E, E], how alike the products P_e = A_e^T B_e of a layer's experts are.

    2 <P_i, P_j> / (|P_i|^2 + |P_j|^2) is 1 for equal ones alone. Rotation gates are compared in the
    same way, and the smallest value counts.
    """
    B_ERO, A_ERD = _wide(experts.expert_B), _wide(experts.expert_A)
    A_ERD = A_ERD.expand(len(B_ERO), -1, -1)
    # <A^T B, A'^T B'> = sum over r, s of (A A'^T)_rs (B B'^T)_rs
    AA = torch.einsum("erd,fsd->efrs", A_ERD, A_ERD)
    alike = _alike((AA * torch.einsum("ero,fso->efrs", B_ERO, B_ERO)).sum((-1, -2)))
    for parameter, _ in experts.by_expert():
        if parameter is not experts.expert_A and parameter is not experts.expert_B:
            gate_EN = _wide(parameter).flatten(1)
            alike = torch.minimum(alike, _alike(gate_EN @ gate_EN.T))
    return alike


def _alike(inner_EE: Tensor) -> Tensor:
    power_E = inner_EE.diagonal()
    both_EE = power_E[:, None] + power_E
    return torch.where(both_EE > 0, 2 * inner_EE / both_EE.clamp(min=1e-300), 1.0)


def _grouped(alike_EE: Tensor, similarity: float) -> list[tuple[int, ...]]:
    """Return groups in which every expert is alike to each other one."""
    groups: list[list[int]] = []
    for e in range(len(alike_EE)):
        for group in groups:
            if all(alike_EE[e, other] >= similarity for other in group):
                group.append(e)
                break
        else:
            groups.append([e])
    return [tuple(group) for group in groups if len(group) > 1]
