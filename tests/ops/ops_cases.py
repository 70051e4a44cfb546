"""Random problems for the law tests, for every row of ROTATIONS: a new mode needs nothing here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rotmole.ops.mixture import dense
from rotmole.ops.reference import method as reference
from rotmole.ops.rotation.table import ROTATIONS, gate_shapes
from rotmole.ops.routing.selection import select
from rotmole.ops.spec import Spec, Weights


def fast_mixture(
    x_TD: Tensor,
    dropped_TD: Tensor,
    weight_TE: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: dict[str, Tensor],
    *,
    selected_TE: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """`mixture`, called as its slow twin is."""
    logits_TE = settings.pop("logits_TE", None)
    spec, weights = _layer(A_ERD, B_ERO, gates, settings)
    return dense.mixture(spec, x_TD, dropped_TD, weights, weight_TE, selected_TE, logits_TE)


def _layer(
    A_ERD: Tensor, B_ERO: Tensor, gates: dict[str, Tensor], settings: dict[str, Any]
) -> tuple[Spec, Weights]:
    dim = len(gates["rotation_down"]) if "rotation_down" in gates else None
    spec = Spec(num_experts=len(B_ERO), rotation_dim=dim, **settings)
    return spec, Weights(A_ERD, B_ERO, gates)


def fast_rotated(
    x_TD: Tensor,
    dropped_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: dict[str, Tensor],
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """`rotated`, called as its slow twin is."""
    logits_TE = settings.pop("logits_TE", None)
    spec, weights = _layer(A_ERD, B_ERO, gates, settings)
    return dense.rotated(spec, x_TD, dropped_TD, weights, logits_TE)


FAST = SimpleNamespace(route=select, mixture=fast_mixture, rotated=fast_rotated)
SLOW = SimpleNamespace(route=reference.route, mixture=reference.mixture, rotated=reference.rotated)

# Modes that keep |z| only where a condition holds; every other rotation must keep it everywhere.
CONDITIONAL = ("bias", "plane", "centroid")


@dataclass(frozen=True)
class Variant:
    """One mode with one combination of its switches."""

    rotation: str
    options: tuple[tuple[str, Any], ...] = ()  # keywords of mixture
    shapes: tuple[tuple[str, Any], ...] = ()  # keywords of gate_shapes alone

    def __str__(self) -> str:
        return "-".join([self.rotation, *(f"{k}={v}" for k, v in self.options + self.shapes)])

    @property
    def metric(self) -> bool:
        return dict(self.options).get("rotation_metric") == "output"

    @property
    def input_z(self) -> bool:
        return dict(self.options).get("rotation_input") == "z"

    @property
    def small(self) -> bool:
        """Whether gates read few numbers in place of x."""
        return dict(self.options).get("rotation_input", "x") != "x" or bool(
            dict(self.shapes).get("rotation_dim")
        )

    @property
    def reads_logits(self) -> bool:
        return dict(self.options).get("rotation_input") == "router"

    @property
    def reading(self) -> dict[str, Any]:
        """What of a Spec says what its gates read."""
        dim = dict(self.shapes).get("rotation_dim")
        return {
            "rotation_input": dict(self.options).get("rotation_input", "x"),
            "rotation_dim": dim,
        }

    @property
    def rank_options(self) -> dict[str, Any]:
        """The keywords that `rotated` takes too."""
        return {k: v for k, v in self.options if k.startswith("rotation_")}

    def ranks(self, most: int = 6) -> list[int]:
        row = ROTATIONS[self.rotation]
        return [
            r for r in range(row.min_rank, most + 1) if not (row.even_rank and r % 2)
        ]  # max_rank is far above


FEW = ("tangent", "plane", "givens", "centroid")  # modes tried with gates of few inputs


def _variants() -> list[Variant]:
    found = []
    for name, row in ROTATIONS.items():
        inputs = [("rotation_input", "z")], [("rotation_metric", "output")]
        found.append(Variant(name))
        if row.input_z:
            found.append(Variant(name, tuple(inputs[0])))
        if row.metric:
            found.append(Variant(name, tuple(inputs[1])))
        if row.input_z and row.metric and name == "bias":
            found.append(Variant(name, tuple(inputs[0] + inputs[1])))
        if row.linear_gates and name in FEW:
            found.append(Variant(name, shapes=(("rotation_dim", 2),)))
            found.append(Variant(name, (("rotation_input", "router"),)))
    found.append(Variant("givens", shapes=(("rotation_planes", 1),)))
    found.append(Variant("radar", options=(("radar_normalize", False),)))
    found.append(Variant("radar_pairs", shapes=(("radar_rank", 2),)))
    return found


VARIANTS = _variants()
IN_RANK_SPACE = [v for v in VARIANTS if ROTATIONS[v.rotation].kind != "output"]
ROTATING = [v for v in IN_RANK_SPACE if ROTATIONS[v.rotation].kind == "rotation"]


@dataclass
class Problem:
    """One layer's tensors: T tokens, D in, O out, E experts of rank R, K chosen per token."""

    variant: Variant
    top_k: int
    x_TD: Tensor
    keep_TD: Tensor  # dropout's factor, constant
    logits_TE: Tensor
    A_ERD: Tensor
    B_ERO: Tensor
    gates: dict[str, Tensor]
    scale: float = 1.7
    route_options: dict[str, Any] = field(default_factory=dict)

    @property
    def dropped_TD(self) -> Tensor:
        return self.x_TD * self.keep_TD.to(self.x_TD.dtype)

    def run(self, side: Any = FAST) -> Tensor:
        """The adapter's output, by the fast side or the slow one."""
        routed = side.route(self.logits_TE, top_k=self.top_k, **self.route_options)
        return side.mixture(
            self.x_TD,
            self.dropped_TD,
            routed.weight_TE,
            self.A_ERD,
            self.B_ERO,
            self.gates,
            rotation=self.variant.rotation,
            scale=self.scale,
            selected_TE=routed.selected_TE,
            logits_TE=self.logits_TE,
            **dict(self.variant.options),
        )

    def rotated(self, side: Any = FAST) -> tuple[Tensor, Tensor]:
        """z and z', [T, E, R]."""
        return side.rotated(
            self.x_TD,
            self.dropped_TD,
            self.A_ERD,
            self.B_ERO,
            self.gates,
            rotation=self.variant.rotation,
            logits_TE=self.logits_TE,
            **self.variant.rank_options,
        )

    def gate_value(self, name: str) -> Tensor:
        """The value of the gate "rotation_vector" or "rotation_angle": [T, E, its rows]."""
        weight_EMN = self.gates[name]
        if self.variant.input_z:
            return torch.einsum("emr,ter->tem", weight_EMN, self.rotated()[0])
        if self.variant.reads_logits:
            source_TN = self.logits_TE
        elif "rotation_down" in self.gates:
            source_TN = self.dropped_TD @ self.gates["rotation_down"].T
        else:
            source_TN = self.dropped_TD if name == "rotation_vector" else self.x_TD
        return torch.einsum("emn,tn->tem", weight_EMN, source_TN)

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "x": self.x_TD,
            "logits": self.logits_TE,
            "A": self.A_ERD,
            "B": self.B_ERO,
        }
        return named | self.gates

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Problem:
        """The same problem with every tensor replaced by change(name, tensor)."""
        new = {name: change(name, tensor) for name, tensor in self.tensors().items()}
        return replace(
            self,
            x_TD=new["x"],
            keep_TD=self.keep_TD[: len(new["x"])],
            logits_TE=new["logits"],
            A_ERD=new["A"],
            B_ERO=new["B"],
            gates={name: new[name] for name in self.gates},
        )

    def leaves(self) -> Problem:
        """The same problem on fresh tensors that collect gradients."""
        return self.map(lambda _, tensor: tensor.detach().clone().requires_grad_())

    def at_zero_start(self) -> Problem:
        zero = ROTATIONS[self.variant.rotation].zero
        return self.map(lambda name, t: torch.zeros_like(t) if name in zero else t)

    def without_rotation(self) -> Problem:
        return replace(self, variant=Variant("none"), gates={})


def make(
    variant: Variant,
    seed: int,
    *,
    T: int = 2,
    E: int = 2,
    K: int = 2,
    R: int | None = None,
    D: int = 3,
    O: int = 4,  # noqa: E741 - the legend's letter for out_features
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A random problem; x and drop(x) differ, so that a mix-up of the two shows."""
    R = variant.ranks()[-1] if R is None else R
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = gate_shapes(
        variant.rotation,
        E=E,
        R=R,
        D=D,
        O=O,
        rotation_input=dict(variant.options).get("rotation_input", "x"),
        **dict(variant.shapes),
    )
    keep_TD = (torch.rand(T, D, generator=generator) > 0.25) / 0.75
    return Problem(
        variant=variant,
        top_k=K,
        x_TD=normal(T, D),
        keep_TD=keep_TD,
        logits_TE=normal(T, E),
        A_ERD=normal(E, R, D),
        B_ERO=normal(E, R, O),
        gates={name: normal(*shape) for name, shape in shapes.items()},
    )


@st.composite
def problems(
    draw: st.DrawFn,
    variant: Variant,
    *,
    T: int = 3,
    E: int = 4,
    D: int = 5,
    O: int = 6,  # noqa: E741 - the legend's letter for out_features
    least_E: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random shapes up to those given and random numbers; O is even, which radar needs."""
    experts = draw(st.integers(least_E, E))
    return make(
        variant,
        draw(st.integers(0, 2**32 - 1)),
        T=draw(st.integers(1, T)),
        E=experts,
        K=draw(st.integers(min(least_E, experts), experts)),
        R=draw(st.sampled_from(variant.ranks())),
        D=draw(st.integers(1, D)),
        O=2 * draw(st.integers(1, O // 2)),
        dtype=dtype,
    )


def gradients(problem: Problem, run: Callable[[Problem], Tensor]) -> dict[str, Tensor | None]:
    """Gradients by name of a fixed random contraction of run(problem); problem holds leaves."""
    y = run(problem)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    names, tensors = zip(*problem.tensors().items(), strict=True)
    found = torch.autograd.grad((y * probe).sum(), tensors, allow_unused=True)
    return dict(zip(names, found, strict=True))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    """|found - wanted| <= tolerance * max(1, |wanted|), entry by entry with one common scale."""
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape, f"{what}: {found.shape} is not {wanted.shape}"
    if not wanted.numel():
        return
    bound = tolerance * max(1.0, float(wanted.abs().max()))
    error = float((found - wanted).abs().max())
    assert error <= bound, f"{what}: differs by {error:.3g}, more than {bound:.3g}"
