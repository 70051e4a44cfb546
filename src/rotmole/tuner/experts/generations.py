"""The tensors of a mixture that has grown: what each growth added lies in tensors of its own.

The tensors that were there keep their names, shapes and values; what a growth adds to `expert_B` is
`expert_B_1`, then `expert_B_2`. So a frozen tensor is a parameter that no optimizer ever sees, and
a trained one needs no mask. `joined` lays them together for the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Shapes = dict[str, tuple[int, ...]]
_PAIRS = "radar_pair_up"
"""[rho, E E], one column for each pair of experts."""


class Piece(NamedTuple):
    """One tensor: the parameter of which it is a part, the growth it came with, its shape.

    Attributes:
        whole: name of the parameter in a mixture that has not grown.
        growth: 0 for what was there from the start.
        shape: of this tensor.
    """

    whole: str
    growth: int
    shape: tuple[int, ...]


def pieces_of(generations: Sequence[int], shapes_of: Callable[[int], Shapes]) -> dict[str, Piece]:
    """Return the tensors of a mixture by name, oldest first.

    Args:
        generations: numbers of experts that came together.
        shapes_of: number of experts -> name and shape of each parameter.

    Returns:
        Name -> piece. Parameters that do not depend on the number of experts are whole.

    >>> list(pieces_of([2, 1], lambda E: {"expert_A": (E, 4, 8), "router_hidden": (16, 8)}))
    ['expert_A', 'router_hidden', 'expert_A_1']
    """
    pieces: dict[str, Piece] = {}
    before: Shapes = {}
    experts = 0
    for growth, count in enumerate(generations):
        experts += count
        now = shapes_of(experts)
        for whole, shape in now.items():
            if before.get(whole) == shape:
                continue
            name = f"{whole}_{growth}" if growth else whole
            part = _added(whole, shape, count, experts) if whole in before else shape
            pieces[name] = Piece(whole, growth, part)
        before = now
    return pieces


def _added(whole: str, shape: tuple[int, ...], count: int, experts: int) -> tuple[int, ...]:
    if whole == _PAIRS:
        return (shape[0], count * experts)
    return (count, *shape[1:])


def joined(whole: str, pieces: Sequence[Tensor]) -> Tensor:
    """Return a parameter as a mixture of all its experts has it.

    Where a gate reads all experts (radar_pairs; rotation_input router), those that came earlier
    read nothing of later ones: their entries there are 0.

    Args:
        whole: its name.
        pieces: its tensors, oldest first.
    """
    if len(pieces) == 1:
        return pieces[0]
    if whole == _PAIRS:
        rho, experts = pieces[-1].shape[0], _experts_of_pairs([p.shape[1] for p in pieces])
        rows = [piece.view(rho, -1, known) for piece, known in zip(pieces, experts, strict=True)]
        wide = [pad(row, (0, experts[-1] - row.shape[-1])) for row in rows]
        return torch.cat(wide, dim=1).flatten(1)
    width = pieces[-1].shape[-1]
    wide = [p if p.shape[-1] == width else pad(p, (0, width - p.shape[-1])) for p in pieces]
    return torch.cat(wide)


def _experts_of_pairs(columns: Sequence[int]) -> list[int]:
    """Return the number of experts after each growth: columns are n_j E_j, the first E_0^2."""
    experts: list[int] = []
    for column in columns:
        before = experts[-1] if experts else 0
        # n (before + n) = column
        count = round((-before + (before**2 + 4 * column) ** 0.5) / 2)
        experts.append(before + count)
    return experts
