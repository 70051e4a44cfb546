"""How the tokens of one call are added to the sums of a layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.routing.selection import Routing
from rotmole.recording.statistics import (
    BINS,
    LayerStatistics,
    RotationStatistics,
    TaskStatistics,
)


class Chosen(NamedTuple):
    """The routing of tokens, as far as it is summed up.

    Attributes:
        selected_TE: True where selected.
        weight_TE: 0 where not selected.
        probability_TE: softmax over all experts.
    """

    selected_TE: Tensor
    weight_TE: Tensor
    probability_TE: Tensor

    @classmethod
    def of(cls, selected_TE: Tensor, routing: Routing | None) -> Chosen:
        """Return a layer's routing; with one expert that has the weight 1."""
        if routing is None:
            one_T1 = selected_TE.float()
            return cls(selected_TE, one_T1, one_T1)
        return cls(selected_TE, routing.weight_TE, routing.probability_TE)

    def at(self, index_T: Tensor | None) -> Chosen:
        """Return that of some tokens, None: of all."""
        return self if index_T is None else Chosen(*(field[index_T] for field in self))


def add_choices(task: TaskStatistics, chosen: Chosen, row_T: Tensor, rows: int) -> None:
    """Add tokens to a task: which experts they selected, and with what weight; not their rows.

    Args:
        task: sums of one task.
        chosen: routing of T tokens.
        row_T: [T] row of each token, 0..rows-1.
        rows: number of rows of the batch.
    """
    selected_ET, weight_ET = chosen.selected_TE.mT, chosen.weight_TE.mT  # sums along tokens
    experts, tokens = selected_ET.shape
    if not tokens:
        return
    wide_ET = selected_ET.float()
    choices_NE = wide_ET.new_zeros(rows, experts).index_add_(0, row_T, wide_ET.mT).double()
    size_N1 = choices_NE.sum(1, keepdim=True)
    part_ET = weight_ET / weight_ET.sum(0).clamp(min=1e-12)
    task.tokens += tokens
    task.choices_E += choices_NE.sum(0).long()
    task.weight_E += weight_ET.sum(1, dtype=torch.float64)
    task.part_E += part_ET.sum(1, dtype=torch.float64)
    top_T = weight_ET.max(0).indices  # argmax takes ten times as long
    task.top_E += torch.bincount(top_T[selected_ET.any(0)], minlength=experts)
    task.pairs_EE += (wide_ET @ wide_ET.mT).long()
    task.squares_E += (choices_NE.square() / size_N1.clamp(min=1)).sum(0)
    task.entropy += torch.special.entr(chosen.probability_TE).sum(dtype=torch.float64)


def add_turns(rotation: RotationStatistics, angle_EMT: Tensor, counted_TE: Tensor) -> None:
    """Add the angles of tokens; those that are not finite are left out.

    Args:
        rotation: sums of one task.
        angle_EMT: [E, M, T] in [-pi, pi].
        counted_TE: [T, E] the choices that count.
    """
    experts = len(angle_EMT)
    expert_C, token_C = counted_TE.mT.nonzero(as_tuple=True)
    angle_CM = angle_EMT[expert_C, :, token_C].double()
    finite_C = angle_CM.isfinite().all(-1)
    if not bool(finite_C.all()):
        expert_C, angle_CM = expert_C[finite_C], angle_CM[finite_C]
    size_CM = angle_CM.abs()
    bin_CM = ((angle_CM + math.pi) * (BINS / (2 * math.pi))).long().clamp(0, BINS - 1)
    place_CM = expert_C[:, None] * BINS + bin_CM
    count_EH = torch.bincount(place_CM.flatten(), minlength=experts * BINS).view(experts, BINS)
    rotation.histogram_EH += count_EH
    rotation.count_E += count_EH.sum(1)
    given_A = size_CM.new_tensor(rotation.angles)
    beyond_CA = (size_CM.unsqueeze(-1) > given_A).sum(1)
    rotation.beyond_EA.index_add_(0, expert_C, beyond_CA)
    for total_E, value_CM in (
        (rotation.cos_E, torch.cos(angle_CM)),
        (rotation.sin_E, torch.sin(angle_CM)),
        (rotation.absolute_E, size_CM),
    ):
        total_E.index_add_(0, expert_C, value_CM.sum(1))


def add_planes(
    layer: LayerStatistics, z_ERT: Tensor, turned_ERT: Tensor, counted_TE: Tensor
) -> None:
    """Add the planes span(z, z') of tokens, each weighted by sin^2 of the angle between both.

    u = z/|z|;  v = the part of z'/|z'| across u, so |v|^2 = w = sin^2
    w (u u^T + (v/|v|)(v/|v|)^T) = w u u^T + v v^T
    """
    counted_E1T = counted_TE.mT.unsqueeze(1)
    u, v = (
        w * torch.rsqrt(w.square().sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny))
        for w in (z_ERT, turned_ERT)
    )
    v = (v - (u * v).sum(1, keepdim=True) * u) * counted_E1T
    u = u * v.square().sum(1, keepdim=True).sqrt()
    both_ERN = torch.nan_to_num(torch.cat([u, v], dim=2), posinf=0.0, neginf=0.0)
    plane_ERR = (both_ERN @ both_ERN.mT).double()
    if layer.planes_ERR is None:
        layer.planes_ERR = plane_ERR
    else:
        layer.planes_ERR = layer.planes_ERR.to(plane_ERR.device).add_(plane_ERR)
