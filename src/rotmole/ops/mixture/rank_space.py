"""What lies between the matrix products of the fused passes: routing, rotating, weighing, and back.

All of it acts on T E R numbers and fewer, in some thirty to a hundred small operations. With
`kernels: compiled` a few kernels are made of them (ops/compiled.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.mixture.banks import Bank, Rotated, Saved
from rotmole.ops.mixture.products import read_gate, stack
from rotmole.ops.precision import at_least_float32
from rotmole.ops.rotation.adjoint import Adjoint, adjoint
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.routing.selection import choose, spread_chosen
from rotmole.ops.spec import Spec


class Kind(NamedTuple):
    """What the steps have to know besides tensors; layers that are alike have equal kinds.

    Attributes:
        specs: of each bank.
        sizes: (E, R) of each bank.
        routes: whether each bank has a router of its own.
        dtype: type of the products.
        scale: the part of s that the products with B and its gradient multiply by; where all banks
            have one s, it is all of s.
        few: whether tokens are few, so that operations are saved rather than memory.
    """

    specs: tuple[Spec, ...]
    sizes: tuple[tuple[int, int], ...]
    routes: tuple[bool, ...]
    dtype: torch.dtype
    scale: float = 1.0
    few: bool = False

    def factor(self, bank: int) -> float:
        """Return what is left of a bank's s for its weights."""
        return 1.0 if self.scale == self.specs[bank].scale else self.specs[bank].scale


class Small(NamedTuple):
    """The parameters of a bank that do not read x; shapes: spec.Weights.

    Attributes:
        vector_EVN, angle_EMN: gates that read few numbers, None if they read x.
        center_ER: one learned vector of each expert, or None.
    """

    vector_EVN: Tensor | None
    angle_EMN: Tensor | None
    center_ER: Tensor | None

    @classmethod
    def of(cls, spec: Spec, bank: Bank) -> Small:
        """Return those of a bank."""
        gates = (bank.vector_EVN, bank.angle_EMN) if spec.small_gates else (None, None)
        return cls(*gates, bank.center_ER)


class Read(NamedTuple):
    """What the maps of one bank make of x; the steps raise all of it to at least float32.

    Attributes:
        z_ERT: activations.
        logits_ET: of the router, if the weights are not given.
        vector_EVT, angle_EMT: values of gates that read x.
        few_NT: C x, or given logits: what small gates read, unless it is z.
    """

    z_ERT: Tensor
    logits_ET: Tensor | None
    vector_EVT: Tensor | None
    angle_EMT: Tensor | None
    few_NT: Tensor | None


class Weighed(NamedTuple):
    """What the steps forward make.

    Attributes:
        m_NT: f g_e R_e(x)[z_e] of all banks' experts, in the type of the products; f is what the
            products with B leave of s.
        logits_ET, index_KT: of the routed bank's router, and the numbers of the experts that it
            chose, or None.
        saved: what the way back needs, bank by bank.
    """

    m_NT: Tensor
    logits_ET: Tensor | None
    index_KT: Tensor | None
    saved: list[Saved]


class SmallBack(NamedTuple):
    """What small gates send back: to z [E, R, T] or few [N, T], and their own gradients."""

    z_ERT: Tensor | None = None
    few_NT: Tensor | None = None
    vector_EVN: Tensor | None = None
    angle_EMN: Tensor | None = None


class Turned(NamedTuple):
    """The way back of one bank, up to the maps that read x; gradients, None where nothing is.

    Attributes:
        z_ERT: of the activations, [1, R, T] where one A serves all experts.
        vector_EVT, angle_EMT: of the values of gates that read x.
        center_ER: of the learned vectors.
        small: what its small gates send back.
        router_ET: of its router's logits, None if the weights are given or one.
        weight_TE: of given weights.
    """

    z_ERT: Tensor
    vector_EVT: Tensor | None
    angle_EMT: Tensor | None
    center_ER: Tensor | None
    small: SmallBack
    router_ET: Tensor | None
    weight_TE: Tensor | None


def weigh(
    kind: Kind,
    smalls: Sequence[Small],
    reads: Sequence[Read],
    weight_TE: Tensor | None,
    rotated: list[Rotated] | None = None,
) -> Weighed:
    """Route, rotate and weigh the activations of all banks.

        m_e = f g_e(x) R_e(x)[z_e]

    Args:
        kind: of the layer.
        smalls, reads: of each bank.
        weight_TE: [T, E] given weights of the routed bank; None: by its router, or one.
        rotated: where the rotations are left, bank by bank; None: nowhere.

    >>> kind = Kind((Spec(num_experts=2),), ((2, 4),), (True,), torch.float32)
    >>> read = Read(torch.ones(2, 4, 5), torch.ones(2, 5), None, None, None)
    >>> weigh(kind, [Small(None, None, None)], [read], None).m_NT.shape
    torch.Size([8, 5])
    """
    m_NT, saved, logits_ET, chosen_KT = [], [], None, None
    for i in range(len(reads)):
        given_TE = weight_TE if i == 0 else None
        wide = Read(*(None if part is None else at_least_float32(part) for part in reads[i]))  # type: ignore[arg-type] # z is there
        m_ERT, index_KT, kept = _weighted(kind, i, smalls[i], wide, given_TE, rotated)
        m_NT.append(m_ERT.to(kind.dtype).flatten(0, 1))
        saved.append(kept)
        if i == 0:
            logits_ET, chosen_KT = wide.logits_ET, index_KT
    return Weighed(stack(m_NT), logits_ET, chosen_KT, saved)


def _weighted(
    kind: Kind,
    i: int,
    small: Small,
    read: Read,
    weight_TE: Tensor | None,
    rotated: list[Rotated] | None,
) -> tuple[Tensor, Tensor | None, Saved]:
    """Return f g_e R_e(x)[z_e] of each expert of bank i, whom it chose, and what is kept of it."""
    spec, (experts, _) = kind.specs[i], kind.sizes[i]
    z_ERT, logits_ET, vector, angle, few_NT = read
    weight_KT = index_KT = probability_ET = None
    if spec.rotation_input == "router" and few_NT is None:
        few_NT = logits_ET
    made_ET = None
    if logits_ET is not None and spec.scoring == "sigmoid":  # the shared expert's gate
        made_ET = weight_KT = torch.sigmoid(logits_ET)
    elif logits_ET is not None:
        weight_KT, index_KT, probability_ET = choose(
            logits_ET,
            top_k=spec.top_k,
            selection=spec.selection,
            norm_topk_prob=spec.norm_topk_prob,
        )
        made_ET = spread_chosen(weight_KT, index_KT, len(logits_ET))
        if index_KT is not None and not kind.few:
            index_KT = index_KT.to(torch.uint8 if len(logits_ET) <= 256 else torch.int32)
    rotate = ROTATIONS[spec.rotation].rotate
    assert rotate is not None
    each_ERT = z_ERT.expand(experts, -1, -1)  # one A may serve all experts
    if spec.small_gates:
        few_NT = None if few_NT is None else few_NT.to(z_ERT.dtype)
        vector, angle = read_small_gates(small, few_NT, each_ERT)
    gate = Gate(vector, angle, _wide(small.center_ER))
    turned_ERT = rotate(each_ERT, gate)
    if rotated is not None:
        rotated.append(Rotated(each_ERT, turned_ERT, gate, made_ET))
    weight_ET = made_ET if weight_TE is None else weight_TE.mT
    factor = kind.factor(i)
    if weight_ET is None:
        m_ERT = _times(factor, turned_ERT)
    else:
        m_ERT = _times(factor, weight_ET).unsqueeze(1) * turned_ERT
    if spec.small_gates:
        vector = angle = None  # computed again
    kept_angle = angle if vector is None else None
    kept = (made_ET, None) if kind.few else (weight_KT, index_KT)
    return m_ERT, index_KT, Saved(z_ERT, vector, kept_angle, *kept, probability_ET, few_NT)


def _times(factor: float, value: Tensor) -> Tensor:
    return value if factor == 1 else factor * value


def read_small_gates(
    small: Small, few_NT: Tensor | None, z_ERT: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the values of vector and angle gate, which read few_NT, or z if that is None.

    >>> small = Small(torch.ones(2, 4, 3), None, None)
    >>> read_small_gates(small, torch.ones(3, 5), torch.ones(2, 4, 5))[0].shape
    torch.Size([2, 4, 5])
    """
    source = z_ERT if few_NT is None else few_NT
    gates = (small.vector_EVN, small.angle_EMN)
    vector, angle = [None if gate is None else read_gate(gate, source) for gate in gates]
    return vector, angle


def _wide(center_ER: Tensor | None) -> Tensor | None:
    return None if center_ER is None else at_least_float32(center_ER)


def turn_back(
    kind: Kind,
    smalls: Sequence[Small],
    saved: Sequence[Saved],
    angles: Sequence[Tensor | None],
    weight_TE: Tensor | None,
    dm_NT: Tensor,
    dlogits_TE: Tensor | None,
) -> tuple[Tensor, list[Turned]]:
    """Go back from the gradients of all banks' weighted activations to those of what made them.

    Args:
        kind: of the layer.
        smalls: of each bank.
        saved: what `weigh` kept of each bank.
        angles: values of each bank's angle gate that were computed again, None where none were.
        weight_TE: as in `weigh`.
        dm_NT: [N, T] gradient of m.
        dlogits_TE: [T, E] further gradient of the router's logits, or None.

    Returns:
        m itself [N, T] in the type of the products, and the way back of each bank.

    >>> kind = Kind((Spec(num_experts=2),), ((2, 4),), (False,), torch.float32)
    >>> kept, small = Saved(torch.ones(2, 4, 5), *[None] * 6), Small(None, None, None)
    >>> m_NT, turned = turn_back(kind, [small], [kept], [None], None, torch.ones(8, 5), None)
    >>> turned[0].z_ERT.shape
    torch.Size([2, 4, 5])
    """
    rows = [experts * rank for experts, rank in kind.sizes]
    dm = [dm_NT] if len(rows) == 1 else torch.split(dm_NT, rows)
    m_NT, turned = [], []
    for i in range(len(rows)):
        given_TE, further_TE = (weight_TE, dlogits_TE) if i == 0 else (None, None)
        dm_ERT = at_least_float32(dm[i]).view(*kind.sizes[i], -1)
        m_ERT, back = _turned(kind, i, smalls[i], saved[i], angles[i], given_TE, dm_ERT)
        if further_TE is not None and back.router_ET is not None:
            back = back._replace(router_ET=back.router_ET + further_TE.mT)
        m_NT.append(m_ERT.to(kind.dtype).flatten(0, 1))
        turned.append(back)
    return stack(m_NT), turned


def _turned(
    kind: Kind,
    i: int,
    small: Small,
    saved: Saved,
    angle: Tensor | None,
    given_TE: Tensor | None,
    dm_ERT: Tensor,
) -> tuple[Tensor, Turned]:
    """Return the weighted activations of bank i, and its way back."""
    spec, experts = kind.specs[i], kind.sizes[i][0]
    if saved.weight_KT is not None:
        weight_ET = spread_chosen(saved.weight_KT, saved.index_KT, experts)
    else:
        weight_ET = dm_ERT.new_ones(1, 1) if given_TE is None else given_TE.mT
    factor = kind.factor(i)
    G_E1T = _times(factor, weight_ET).unsqueeze(1)
    z_ERT = saved.z_ERT.expand(experts, -1, -1)
    vector, angle = saved.vector_EVT, saved.angle_EMT if angle is None else angle
    if spec.small_gates:
        vector, angle = read_small_gates(small, saved.few_NT, z_ERT)
    gate = Gate(vector, angle, _wide(small.center_ER))
    gradient, back = adjoint(spec.rotation, z_ERT, gate, G_E1T, dm_ERT), SmallBack()
    dz, dvector, dangle = gradient.z_ERT, gradient.vector_EVT, gradient.angle_EMT
    if spec.small_gates:
        back = _small_back(small, saved, z_ERT, gradient)
        dz = dz if back.z_ERT is None else dz + back.z_ERT
        dvector = dangle = None
    if len(saved.z_ERT) != len(dz):
        dz = dz.sum(0, keepdim=True)
    drouter_ET = dweight_TE = None
    dweight_ET = _times(factor, gradient.weight_E1T).squeeze(1)
    if kind.routes[i]:
        drouter_ET = _into_router(spec, saved, weight_ET, dweight_ET, back)
    elif given_TE is not None:
        dweight_TE = dweight_ET.mT
    turned = Turned(dz, dvector, dangle, gradient.center_ER, back, drouter_ET, dweight_TE)
    return gradient.m_ERT, turned


def _into_router(
    spec: Spec, saved: Saved, weight_ET: Tensor, dweight_ET: Tensor, back: SmallBack
) -> Tensor:
    """Return the gradient of the logits, given that of the weights."""
    if spec.scoring == "sigmoid":
        return weight_ET * dweight_ET * (1 - weight_ET)
    drouter_ET: Tensor
    if saved.probability_ET is None:  # a softmax over the chosen; 0 where not chosen
        drouter_ET = torch._softmax_backward_data(dweight_ET, weight_ET, 0, weight_ET.dtype)
    else:
        moved_ET, p_ET = weight_ET * dweight_ET, saved.probability_ET
        drouter_ET = torch.addcmul(moved_ET, p_ET, moved_ET.sum(0), value=-1)
    if spec.rotation_input == "router" and back.few_NT is not None:
        drouter_ET = drouter_ET + back.few_NT
    return drouter_ET


def _small_back(small: Small, saved: Saved, z_ERT: Tensor, gradient: Adjoint) -> SmallBack:
    """Go back through gates that read z or few numbers."""
    dsource: Tensor | None = None
    grads: list[Tensor | None] = []
    pairs = (
        (small.vector_EVN, gradient.vector_EVT),
        (small.angle_EMN, gradient.angle_EMT),
    )
    for weight_EMN, value in pairs:
        if weight_EMN is None or value is None:
            grads.append(None)
            continue
        if saved.few_NT is None:
            grad_EMN = value @ z_ERT.mT
            back = weight_EMN.to(value.dtype).mT @ value
        else:
            flat_MT = value.flatten(0, 1)
            grad_EMN = (flat_MT @ saved.few_NT.mT).view(weight_EMN.shape)
            back = weight_EMN.to(value.dtype).flatten(0, 1).mT @ flat_MT
        grads.append(grad_EMN.to(weight_EMN.dtype))
        dsource = back if dsource is None else dsource + back
    in_z = saved.few_NT is None
    return SmallBack(dsource if in_z else None, None if in_z else dsource, *grads)
