"""Inside the smooth floors, where random problems never come, the two paths agree too."""

from __future__ import annotations

import pytest
import torch
from ops_cases import CONDITIONAL, FAST, SLOW, VARIANTS, Variant, assert_close, gradients, make

from rotmole.ops.reference import method as reference
from rotmole.ops.rotation.modes import floor_at, output_metric

# gates that read few numbers but not z cannot be made to say z
INSIDE = [v for v in VARIANTS if v.rotation in CONDITIONAL and (v.input_z or not v.small)]
# q = factor z, up to relative noise: z + q almost 0; q almost along z; q tiny and almost along z
POINTS = {"bias": [(-1.0, 2e-3), (-1.0, 5e-3)], "plane": [(2.0, 2e-3), (0.003, 0.01)]}


@pytest.mark.parametrize("point", [0, 1])
@pytest.mark.parametrize("variant", INSIDE, ids=str)
def test_outputs_and_every_gradient_inside_the_floor(variant: Variant, point: int) -> None:
    factor, noise = POINTS.get(variant.rotation, POINTS["plane"])[point]
    problem = make(variant, 3, T=1, E=3, K=2, R=4, D=5, O=6)
    z_TER, _ = problem.rotated()

    def near(name: str, t: torch.Tensor) -> torch.Tensor:
        if name == "rotation_center":
            t = z_TER[0] * factor
        elif name == "rotation_vector":
            full = torch.eye(4, dtype=t.dtype).expand(3, 4, 4)
            t = (full if variant.input_z else problem.A_ERD) * factor
        else:
            return t
        wave = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=t.dtype)
        return t * (1 + noise * (wave[:, None] if name == "rotation_vector" else wave))

    problem = problem.map(near).leaves()
    _, turned = problem.rotated()
    assert (turned.norm(dim=-1) < 0.95 * z_TER.norm(dim=-1)).any()  # here the floor acts
    for found, wanted in zip(problem.rotated(), problem.rotated(reference), strict=True):
        assert_close(found, wanted, 1e-12)
    fast = gradients(problem, lambda p: p.run(FAST))
    slow = gradients(problem, lambda p: p.run(SLOW))
    for name, found in fast.items():
        assert_close(found, slow[name], 1e-9, name)


def test_the_floor_is_what_its_formula_says() -> None:
    """floor_at(0, b) = b/3; at s = b/2, k = 1/2, it is b/2 + b/24; from b on it is s."""
    s = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    wanted = torch.tensor([2 / 3, 1 + 2 / 24, 2.0, 3.0], dtype=torch.float64)
    b = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(floor_at(s, b), wanted, rtol=1e-15, atol=0)
    torch.testing.assert_close(reference.floor_at(s, b), wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-150, 1e-9])
def test_the_metric_of_almost_no_B(size: float) -> None:
    """M is I at B = 0, positive definite everywhere, and the reference's."""
    B_ERO = size * torch.randn(
        2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for found_RR, B_RO in zip(output_metric(B_ERO), B_ERO, strict=True):
        assert_close(found_RR, reference.metric_matrix(B_RO, "output"), 1e-14)
        assert torch.linalg.eigvalsh(found_RR).min() > 0
        if not size:
            assert torch.equal(found_RR, torch.eye(3, dtype=torch.float64))
