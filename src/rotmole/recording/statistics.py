"""Sums over tokens of what a layer's router and rotation did, and the figures they give.

Everything kept is a sum, so memory does not grow with the tokens, and two logs are merged by
adding. Letters: E experts, K selected per token, R rank, H bins of the histogram, A given angles.
Angles are in radians. A figure that has no tokens to stand on is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotmole.errors import ConfigError

BINS = 72
"""Bins of a histogram of angles over [-pi, pi]: 5 degrees each."""
ANGLES = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Angles that turns are compared with, unless others are given."""
PLANE_RANK = 32
"""Rank up to which planes of rotation are summed up: E R R numbers a layer."""


def bin_edges() -> list[float]:
    """Return the H + 1 edges of the histogram, from -pi to pi."""
    return [math.pi * (2 * number / BINS - 1) for number in range(BINS + 1)]


@dataclass
class RotationStatistics:
    """Sums over the choices of one task's tokens: an angle for each token and selected expert.

    What an angle is in each mode says `rotmole.ops.mixture.dense.turns`. With givens a choice has
    one angle for each plane; all of them count alike.

    Attributes:
        angles: the A given angles.
        count_E: angles that were summed up.
        histogram_EH: how many lay in each bin.
        cos_E, sin_E, absolute_E: sums of cos(angle), sin(angle), |angle|.
        beyond_EA: how many had |angle| > each given angle.
    """

    angles: tuple[float, ...]
    count_E: Tensor
    histogram_EH: Tensor
    cos_E: Tensor
    sin_E: Tensor
    absolute_E: Tensor
    beyond_EA: Tensor

    @classmethod
    def empty(cls, experts: int, angles: tuple[float, ...], device: Any) -> RotationStatistics:
        """Return the sums over no token."""

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def real() -> Tensor:
            return torch.zeros(experts, dtype=torch.float64, device=device)

        return cls(
            angles, whole(experts), whole(experts, BINS), real(), real(), real(),
            whole(experts, len(angles)),
        )  # fmt: skip

    @property
    def mean_absolute_E(self) -> Tensor:
        """[E] mean of |angle|."""
        return self.absolute_E / self.count_E

    @property
    def resultant_E(self) -> Tensor:
        """[E] length of the mean of (cos, sin): 1 if all angles are equal, 0 if all around."""
        return torch.hypot(self.cos_E, self.sin_E) / self.count_E

    @property
    def direction_E(self) -> Tensor:
        """[E] direction of that mean: the mean angle."""
        direction_E = torch.atan2(self.sin_E, self.cos_E)
        return torch.where(self.count_E > 0, direction_E, torch.nan)

    @property
    def beyond_share_EA(self) -> Tensor:
        """[E, A] share of the choices turned by more than each given angle."""
        return self.beyond_EA / self.count_E[:, None]


@dataclass
class TaskStatistics:
    """Sums over the unpadded tokens of one task in one layer.

    Attributes:
        tokens: tokens, and
        rows: rows of the batches that they came in, a row of each forward pass.
        choices_E: tokens that selected each expert.
        weight_E: sum of their weights g_e.
        part_E: sum of g_e / sum_j g_j.
        top_E: tokens in which the expert has the largest weight; of equal ones the lowest number.
        pairs_EE: tokens that selected both; the diagonal is choices_E.
        squares_E: sum over rows of (choices of e in the row)^2 / choices in the row.
        entropy: sum of the entropy of p, the softmax over all experts, in nats.
        rotation: None without a rotation.
    """

    tokens: int
    rows: int
    choices_E: Tensor
    weight_E: Tensor
    part_E: Tensor
    top_E: Tensor
    pairs_EE: Tensor
    squares_E: Tensor
    entropy: Tensor
    rotation: RotationStatistics | None = None

    @classmethod
    def empty(
        cls, experts: int, device: Any = "cpu", angles: tuple[float, ...] | None = None
    ) -> TaskStatistics:
        """Return the sums over no token; without angles there is no rotation."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        whole = torch.int64
        return cls(
            0, 0, zeros(experts, dtype=whole), zeros(experts), zeros(experts),
            zeros(experts, dtype=whole), zeros(experts, experts, dtype=whole), zeros(experts),
            zeros(),
            None if angles is None else RotationStatistics.empty(experts, angles, device),
        )  # fmt: skip

    @property
    def selection_share_E(self) -> Tensor:
        """[E] share of all choices: adds up to 1; even use is 1/E, 1/K the most there can be."""
        return self.choices_E / self.choices_E.sum()

    @property
    def token_share_E(self) -> Tensor:
        """[E] share of the tokens that selected the expert: adds up to K."""
        return self.choices_E / _at_least(self.tokens)

    @property
    def mean_weight_E(self) -> Tensor:
        """[E] mean weight of the expert, given that it was selected."""
        return self.weight_E / self.choices_E

    @property
    def weight_share_E(self) -> Tensor:
        """[E] mean over tokens of g_e / sum_j g_j: adds up to 1."""
        return self.part_E / self.part_E.sum()

    @property
    def top_share_E(self) -> Tensor:
        """[E] share of tokens in which the expert has the largest weight."""
        return self.top_E / _at_least(self.tokens)

    @property
    def pair_share_EE(self) -> Tensor:
        """[E, E] share of tokens that selected both."""
        return self.pairs_EE / _at_least(self.tokens)

    @property
    def mean_entropy(self) -> float:
        """Mean over tokens of the entropy of p, in nats: how undecided the router is."""
        return float(self.entropy) / _at_least(self.tokens)

    @property
    def mean_entropy_share(self) -> float:
        """The same as a share of log E, the entropy of a router that knows nothing."""
        return _share_of_log(self.mean_entropy, len(self.choices_E))

    @property
    def usage_entropy(self) -> float:
        """Entropy of the shares of choices, in nats: log E if all are used alike."""
        share_E = self.selection_share_E
        return float(torch.special.entr(share_E).sum())

    @property
    def usage_entropy_share(self) -> float:
        """The same as a share of log E."""
        return _share_of_log(self.usage_entropy, len(self.choices_E))


class MutualInformation(NamedTuple):
    """How much the task of a token says about the experts that it selected.

        I = sum over tasks t and experts e of  p(t, e) log(p(t, e) / (p(t) p(e)))

    p are shares of all N choices. If experts did not depend on tasks, 2 N I / f would be close to
    chi-squared with (E - 1)(T - 1) degrees of freedom, E and T the experts and tasks with choices:

        chance = f (E - 1)(T - 1) / (2 N)

    f says how much choices of a row resemble each other (tokens of one text are not drawn apart):
    with c_re the choices of e in row r, n_r all its choices, and p_te the shares in its task,

        f = sum of (c_re - n_r p_te)^2 / (n_r p_te)  /  sum over tasks of (rows - 1)(E - 1)

    and 1 if that is less (Rao and Scott 1981, the first-order correction).

    Attributes:
        value: I in nats.
        chance: its expectation if experts do not depend on tasks.
        limit: what it exceeds then in 5 of 100 logs.
        ceiling: the most it can be: the smaller one of the entropies of tasks and of experts.
    """

    value: float
    chance: float
    limit: float
    ceiling: float


@dataclass
class LayerStatistics:
    """What one adapter did in one layer.

    Attributes:
        experts: E.
        top_k: the most experts that a token selects: K, or E without top_k.
        selection, rotation: as in the settings.
        rank: R.
        has_router: False for a layer of one expert, whose sums say that all tokens use it, and for
            the layers of a block-routed block after its first one, which show its routing.
        tasks: name -> sums.
        planes_ERR: sum over choices of the weighted projector onto the plane span(z, z'), for
            `plane_drift_E`; None without rotation, for radar modes, or above rank 32.
        shared: of the shared expert, a layer of one expert; None if there is none.
    """

    experts: int
    top_k: int
    selection: str
    rotation: str
    rank: int
    has_router: bool
    tasks: dict[str, TaskStatistics] = field(default_factory=dict)
    planes_ERR: Tensor | None = None
    shared: LayerStatistics | None = None

    def total(self) -> TaskStatistics:
        """Return the sums over all tasks."""
        tasks = list(self.tasks.values())
        if not tasks:
            return TaskStatistics.empty(self.experts)
        total = tasks[0]
        for other in tasks[1:]:
            total = added(total, other)
        return total

    @property
    def plane_drift_E(self) -> Tensor | None:
        """[E] how far the planes in which tokens are turned lie from one common plane.

            P = sum over choices of w (u u^T + v v^T);   drift = 1 - (l1 + l2) / trace P

        u, v are an orthonormal basis of a token's plane span(z, z'), w = sin^2 of the angle between
        z and z' (a token that is not turned has no plane), l1, l2 the largest eigenvalues of P. 0
        if all tokens are turned in one plane, 1 - 2/R if planes point everywhere alike. NaN for an
        expert that turned nothing.
        """
        if self.planes_ERR is None:
            return None
        trace_E = self.planes_ERR.diagonal(dim1=-2, dim2=-1).sum(-1)
        largest_E = torch.linalg.eigvalsh(self.planes_ERR)[:, -2:].sum(-1)
        turned_E = trace_E > 1e-9 * _at_least(self.total().tokens)
        return torch.where(turned_E, 1 - largest_E / trace_E, torch.nan)

    def mutual_information(self) -> MutualInformation | None:
        """Return what tasks say about experts; None if there are not two tasks and two experts."""
        tasks = [task for task in self.tasks.values() if int(task.choices_E.sum())]
        if len(tasks) < 2 or self.experts < 2:
            return None
        choices_TE = torch.stack([task.choices_E.double() for task in tasks])
        squares_TE = torch.stack([task.squares_E for task in tasks])
        count = float(choices_TE.sum())
        p_TE = choices_TE / count
        p_T, p_E = p_TE.sum(1), p_TE.sum(0)
        of_tasks, of_experts, of_both = (
            float(torch.special.entr(p).sum()) for p in (p_T, p_E, p_TE)
        )
        used = int((p_E > 0).sum())
        share_TE = choices_TE / choices_TE.sum(1, keepdim=True)
        excess_TE = torch.where(share_TE > 0, squares_TE / share_TE - choices_TE, 0.0)
        rows = sum(task.rows - 1 for task in tasks)
        alike = float(excess_TE.sum()) / (rows * (used - 1)) if rows and used > 1 else 1.0
        alike = max(alike, 1.0)
        free = (used - 1) * (len(tasks) - 1)
        limit = _chi2_95(free) if free else 0.0
        return MutualInformation(
            value=max(of_tasks + of_experts - of_both, 0.0),
            chance=alike * free / (2 * count),
            limit=alike * limit / (2 * count),
            ceiling=min(of_tasks, of_experts),
        )

    def merge(self, other: LayerStatistics) -> None:
        """Add the sums of another log's same layer."""
        for name, task in other.tasks.items():
            self.tasks[name] = added(self.tasks[name], task) if name in self.tasks else task
        if other.planes_ERR is not None:
            mine = self.planes_ERR
            self.planes_ERR = other.planes_ERR if mine is None else mine + other.planes_ERR
        if self.shared is not None and other.shared is not None:
            self.shared.merge(other.shared)


def added(one: Any, other: Any) -> Any:
    """Return the sum of two TaskStatistics or RotationStatistics, field by field."""
    values = {}
    for entry in fields(one):
        mine, theirs = getattr(one, entry.name), getattr(other, entry.name)
        if entry.name == "angles" or mine is None:
            values[entry.name] = mine
        elif isinstance(mine, RotationStatistics):
            values[entry.name] = added(mine, theirs)
        else:
            values[entry.name] = mine + theirs
    return type(one)(**values)


def as_dict(statistics: Any) -> Any:
    """Return statistics as what JSON can hold: names without letters, tensors as lists."""
    if isinstance(statistics, Tensor):
        return statistics.tolist()
    if isinstance(statistics, Mapping):
        return {name: as_dict(value) for name, value in statistics.items()}
    if not hasattr(statistics, "__dataclass_fields__"):
        return list(statistics) if isinstance(statistics, tuple) else statistics
    return {
        _plain(entry.name): as_dict(getattr(statistics, entry.name)) for entry in fields(statistics)
    }


def _plain(name: str) -> str:
    head, _, letters = name.rpartition("_")
    return head if letters.isupper() else name


def _at_least(tokens: int) -> float:
    return tokens if tokens else math.nan


def _share_of_log(entropy: float, experts: int) -> float:
    return entropy / math.log(experts) if experts > 1 else math.nan


def _chi2_95(free: int) -> float:
    """Return the 95 % quantile of chi squared with that many degrees of freedom."""
    try:
        from scipy.stats import chi2  # takes half a second, and belongs to the extra `train`
    except ImportError as error:
        raise ConfigError(
            "the chance level of mutual information needs scipy: pip install 'rotmole[train]'."
        ) from error
    return float(chi2.ppf(0.95, free))
