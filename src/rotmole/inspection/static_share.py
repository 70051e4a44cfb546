"""How much of a mixture is mixture: the share of what it adds that a static LoRA does as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rotmole.inspection.inspection import StaticShare
from rotmole.inspection.regression import Sums, shares_by_rank

CALIBRATION, HELD_OUT = "calibration", "held-out"


def static_share(sums: dict[str, Sums], ranks: Sequence[int]) -> StaticShare | None:
    """Return the static share of one layer at some ranks; None without tokens of both parts.

        share(r) = 1 - sum |y - W_r x|^2 / sum |y|^2,  W_r of rank r, fitted on CALIBRATION

    Args:
        sums: of `Probes`, by part of the tokens.
        ranks: ascending; a rank above the layer's widths is that of the best linear map.
    """
    if CALIBRATION not in sums or HELD_OUT not in sums:
        return None
    parts = [sums[CALIBRATION], sums[HELD_OUT]]
    fitted, other = shares_by_rank(parts[0], parts)
    at = [min(rank, len(fitted)) - 1 for rank in ranks]
    return StaticShare(
        tuple(ranks),
        tuple(float(fitted[i]) for i in at),
        tuple(float(other[i]) for i in at),
        (float(fitted[-1]), float(other[-1])),
        (parts[0].tokens, parts[1].tokens),
        (_mean_power(parts[0]), _mean_power(parts[1])),
    )


def ranks_up_to(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4 ... and the largest rank.

    >>> ranks_up_to(12)
    (1, 2, 4, 8, 12)
    """
    powers = [1 << i for i in range(largest.bit_length())]
    return (*[rank for rank in powers if rank < largest], largest)


def total(shares: Sequence[StaticShare]) -> StaticShare | None:
    """Return the share over all layers, each weighed by its power; None without layers.

    All must have the same ranks.
    """
    if not shares:
        return None
    power_L2 = torch.tensor([share.power for share in shares], dtype=torch.float64)
    sum_2 = power_L2.sum(0)

    def mean(values: Sequence[Sequence[float]], part: int) -> tuple[float, ...]:
        if sum_2[part] == 0:
            return tuple(1.0 for _ in values[0])
        weight_L = power_L2[:, part] / sum_2[part]
        return tuple((weight_L @ torch.tensor(values, dtype=torch.float64)).tolist())

    fitted, other = (
        mean([s.calibration for s in shares], 0),
        mean([s.held_out for s in shares], 1),
    )
    linear = tuple(mean([(s.linear[i],) for s in shares], i)[0] for i in (0, 1))
    return StaticShare(
        shares[0].ranks, fitted, other, (linear[0], linear[1]), shares[0].tokens,
        (float(sum_2[0]), float(sum_2[1])),
    )  # fmt: skip


def _mean_power(sums: Sums) -> float:
    return sums.power / max(sums.tokens, 1)
