"""What two experts of a layer reach for one token: with weights alone, and with rotations too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rotmole.evaluation.scoring import evaluating
from rotmole.inspection.inspection import Reach
from rotmole.recording.watch import Seen, watch

STEPS = 48
"""Angles all around at which an expert's output is computed."""
SMALLEST = 1e-6
"""Relative length below which two directions count as one."""


def reach_of(model: Any, adapter: str, tokenizer: Any, ids: list[int], path: str) -> Reach | None:
    """Return the outputs that two experts of a layer reach, in the plane of both.

    The token is the one whose second expert has the largest weighted output; the experts are its
    two with the largest ones.

    Args:
        model: with the adapter.
        adapter: its name.
        tokenizer: of the model.
        ids: tokens of one row.
        path: of the layer.

    Returns:
        None if no token uses two experts that have a plane of rotation.
    """
    reached: list[Reach | None] = []

    def look(seen: Seen) -> None:
        if seen.layer.rotmole_path == path and seen.expert_TK is None:
            token = _token(seen)
            reached.append(None if token is None else _reach(seen, *token, tokenizer, ids))

    device = next(model.parameters()).device
    with evaluating(model), watch(model, adapter, look):
        model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return reached[0] if reached else None


def _outputs(seen: Seen) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return z and z' [T, E, R] and s B [E, R, O] in float64, or None if z is not turned."""
    turned = seen.turns()
    if turned is None or turned[0].turned_ERT is None or turned[0].turned_ERT is turned[0].z_ERT:
        return None
    z_TER, turned_TER = (
        t.permute(2, 0, 1).double().cpu() for t in (turned[0].z_ERT, turned[0].turned_ERT)
    )
    B_ERO = seen.experts.weights().B_ERO.double().cpu() * seen.experts.spec.scale
    return z_TER, turned_TER, B_ERO


def _token(seen: Seen) -> tuple[int, int, int] | None:
    """Choose the token, and its two experts, the larger one first."""
    parts = _outputs(seen)
    if parts is None or seen.routing is None or seen.routing.weight_TE.shape[1] < 2:
        return None
    z_TER, _, B_ERO = parts
    length_TE = torch.einsum("ter,ero->teo", z_TER, B_ERO).norm(dim=-1)
    two = (length_TE * seen.routing.weight_TE.double().cpu().abs()).topk(2, dim=-1)
    token = int(two.values[:, 1].argmax())
    if not two.values[token, 1] > 0:
        return None
    return token, int(two.indices[token, 0]), int(two.indices[token, 1])


def _reach(
    seen: Seen, token: int, first: int, second: int, tokenizer: Any, ids: list[int]
) -> Reach | None:
    parts = _outputs(seen)
    assert parts is not None
    z_TER, turned_TER, B_ERO = parts
    pair = [first, second]
    z_2R, turned_2R, B_2RO = z_TER[token, pair], turned_TER[token, pair], B_ERO[pair]
    v_2O = torch.einsum("er,ero->eo", z_2R, B_2RO)
    axes_2O = _plane(v_2O)
    circles = [_circle(z, turned) for z, turned in zip(z_2R, turned_2R, strict=True)]
    if axes_2O is None or any(circle is None for circle in circles):
        return None
    circle_2NR = torch.stack([circle for circle in circles if circle is not None])
    turned_2NO = torch.einsum("enr,ero->eno", circle_2NR, B_2RO)
    actual_2O = torch.einsum("er,ero->eo", turned_2R, B_2RO)
    corners_3O = torch.cat([torch.zeros_like(v_2O[:1]), v_2O])
    around_NO = torch.cat([corners_3O, turned_2NO.flatten(0, 1)])

    def points(vectors_NO: Tensor) -> tuple[tuple[float, float], ...]:
        return tuple((x, y) for x, y in (vectors_NO @ axes_2O.T).tolist())

    outputs, actual = points(v_2O), points(actual_2O)
    return Reach(
        (first, second), (outputs[0], outputs[1]), points(corners_3O), points(around_NO),
        (actual[0], actual[1]), tokenizer.decode([ids[token]]),
    )  # fmt: skip


def _plane(v_2O: Tensor) -> Tensor | None:
    """Return orthonormal axes [2, O]: along the first vector, and across it to the second."""
    along = v_2O[0] / v_2O[0].norm().clamp(min=1e-300)
    across = v_2O[1] - (v_2O[1] @ along) * along
    if not across.norm() > SMALLEST * v_2O[1].norm():
        return None
    return torch.stack([along, across / across.norm()])


def _circle(z_R: Tensor, turned_R: Tensor) -> Tensor | None:
    """Return [N, R]: z turned all around in the plane in which it was turned."""
    length = z_R.norm()
    if not length > 0:
        return None
    unit = z_R / length
    across = turned_R - (turned_R @ unit) * unit
    if not across.norm() > SMALLEST * length:
        return None
    across = across / across.norm()
    angle_N1 = torch.arange(STEPS, dtype=z_R.dtype).unsqueeze(-1) * (2 * math.pi / STEPS)
    return length * (angle_N1.cos() * unit + angle_N1.sin() * across)
