"""What goes into the fused passes and comes out: banks of experts, and all tensors of a call.

The routed experts of a layer are one bank, its shared expert another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.compiled import letters_of
from rotmole.ops.rotation.table import Gate
from rotmole.ops.spec import Spec


class Rotated(NamedTuple):
    """One bank's activations before and after rotation, all in at least float32.

    Attributes:
        z_ERT, turned_ERT: [E, R, T].
        gate: what the rotation read besides z.
        weight_ET: what the bank's router made, 0 where not selected; None if it made none.
    """

    z_ERT: Tensor
    turned_ERT: Tensor
    gate: Gate
    weight_ET: Tensor | None


class How(NamedTuple):
    """What one call of the function needs besides tensors.

    Attributes:
        spec: of the layer; its rotations are not of kind "output", and its routing is read only if
            no weights are given.
        dtype: type of the products with A, B and the vector gate; gates, routing and rotation are
            computed in at least float32.
        keep_scale: what kept inputs are multiplied by under dropout, 1 / (1 - p).
        rotated: where the forward pass leaves its rotations, bank by bank, for who looks on; None:
            nobody does.
    """

    spec: Spec
    dtype: torch.dtype
    keep_scale: float = 1.0
    rotated: list[Rotated] | None = None


class Bank(NamedTuple):
    """The tensors of a bank of experts, or their gradients; shapes: spec.Weights.

    Attributes:
        router_ED: scores the experts; for the shared expert [1, D], whose sigmoid weighs it. None:
            the weights are given, or one.
    """

    A_ERD: Tensor
    B_ERO: Tensor
    router_ED: Tensor | None = None
    vector_EVN: Tensor | None = None
    angle_EMN: Tensor | None = None
    center_ER: Tensor | None = None
    down_HD: Tensor | None = None


class Parts(NamedTuple):
    """The tensors of one call; shapes: fused.fused_mixture."""

    base_TO: Tensor | None
    x_TD: Tensor
    keep_TD: Tensor | None
    weight_TE: Tensor | None
    logits_TE: Tensor | None
    routed: Bank
    shared: Bank | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return the tensors one after the other, as autograd wants them."""
        return (*self[:5], *self.routed, *(self.shared or ()))

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> Parts:
        """Return the parts from what `flat` returned."""
        count = 5 + len(Bank._fields)
        base_TO, x_TD, keep_TD, weight_TE, logits_TE = tensors[:5]
        assert x_TD is not None
        shared = Bank(*tensors[count:]) if len(tensors) > count else None  # type: ignore[arg-type] # as flat laid them out
        routed = Bank(*tensors[5:count])  # type: ignore[arg-type] # likewise
        return Parts(base_TO, x_TD, keep_TD, weight_TE, logits_TE, routed, shared)

    def banks(self, spec: Spec) -> list[tuple[Spec, Bank]]:
        """Return the routed bank and the shared one, if there is one, each with its spec."""
        if self.shared is None or spec.shared is None:
            return [(spec, self.routed)]
        return [(spec, self.routed), (spec.shared, self.shared)]


class Saved(NamedTuple):
    """What the backward pass needs of one bank besides its tensors.

    Attributes:
        z_ERT, vector_EVT, angle_EMT: activations and gates' values; the angle is computed again
            where there is a vector gate too, and both are if they are small.
        weight_KT, index_KT: weights and numbers of the chosen experts; or all weights and None;
            or None, None where weights were given or are one.
        probability_ET: softmax over all, where weights are not normalised over the chosen.
        few_NT: what small gates read, C x or the router's own logits; None if they read z, or x.
    """

    z_ERT: Tensor
    vector_EVT: Tensor | None
    angle_EMT: Tensor | None
    weight_KT: Tensor | None
    index_KT: Tensor | None
    probability_ET: Tensor | None
    few_NT: Tensor | None


class Gradients(NamedTuple):
    """Gradients of Parts, None where there is no such part or nobody wants one."""

    base_TO: Tensor | None
    x_TD: Tensor | None
    keep_TD: None
    weight_TE: Tensor | None
    logits_TE: Tensor | None
    routed: Bank
    shared: Bank | None

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return them in the order of Parts.flat."""
        return (*self[:5], *self.routed, *(self.shared or ()))


@cache
def letters_forward(banks: int) -> tuple[str, ...]:
    """Return the letters of the tensors of Parts.flat."""
    return letters_of([*Parts._fields[:5], *Bank._fields * banks])


@cache
def letters_backward(banks: int) -> tuple[str, ...]:
    """Return those, what is saved of each bank, and the gradients of y and of the logits."""
    return (*letters_forward(banks), *letters_of(Saved._fields) * banks, "TO", "TE")
