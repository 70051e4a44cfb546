"""The best linear map of rank r from sums over tokens: reduced-rank regression in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2
"""Chosen on one adapter (experiments/LOG.md): 1e-4 and 1e-1 were farther away on other text."""


@dataclass(frozen=True)
class Sums:
    """What a regression of y [T, O] on x [T, D] needs to know of the tokens, in float64.

    Attributes:
        XX_DD: sum over tokens of x^T x.
        XY_DO: sum of x^T y.
        power: sum of |y|^2.
        tokens: T.
    """

    XX_DD: Tensor
    XY_DO: Tensor
    power: float
    tokens: int

    def share(self, W_DO: Tensor) -> float:
        """Return which part of the power x W explains: 1 - sum |y - x W|^2 / sum |y|^2.

        It is negative if x W is farther from y than 0 is, and 1 if y is 0 and W too.
        """
        W_DO = W_DO.to(self.XX_DD)
        left = self.power - 2 * float((W_DO * self.XY_DO).sum())
        left += float((W_DO * (self.XX_DD @ W_DO)).sum())
        return 1 - left / self.power if self.power > 0 else float(not W_DO.any())


def mean(parts: Sequence[Sums]) -> Sums:
    """Return the sums of one average token of each part: the parts count alike, small or large.

    A part without tokens does not count.
    """
    filled = [part for part in parts if part.tokens]
    XX_DD, XY_DO = torch.zeros_like(parts[0].XX_DD), torch.zeros_like(parts[0].XY_DO)
    power = 0.0
    for part in filled:
        weight = 1 / (part.tokens * len(filled))
        XX_DD += weight * part.XX_DD
        XY_DO += weight * part.XY_DO
        power += weight * part.power
    return Sums(XX_DD, XY_DO, power, len(filled))


def best_map(sums: Sums, rank: int, *, ridge: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
    """Return the map of least squares, and the best one among those of a rank.

        W    = (X^T X + d I)^-1 X^T Y,  d = ridge * mean diagonal of X^T X
        W_r  = W V_r V_r^T,  V_r: first r right singular vectors of L^T W, L L^T = X^T X + d I

    Args:
        sums: over the tokens.
        rank: r; A and B have as many rows and columns, zeros if W has a smaller rank.
        ridge: relative to the mean of the diagonal; it keeps directions that hardly occur small.

    Returns:
        W [D, O], A [r, D] and B [O, r] with W_r = A^T B^T, balanced: A and B share the singular
        values.

    Source: Izenman (1975), reduced-rank regression.
    """
    XX_DD, XY_DO = sums.XX_DD, sums.XY_DO
    inputs, outputs = XY_DO.shape
    A_RD, B_OR = XX_DD.new_zeros(rank, inputs), XX_DD.new_zeros(outputs, rank)
    scale = XX_DD.diagonal().mean()
    if not (scale > 0 and sums.power > 0):
        return torch.zeros_like(XY_DO), A_RD, B_OR
    eye_DD = torch.eye(inputs, dtype=XX_DD.dtype, device=XX_DD.device)
    L_DD = torch.linalg.cholesky(XX_DD + ridge * scale * eye_DD)
    W_DO = torch.cholesky_solve(XY_DO, L_DD)
    U, S, Vh = torch.linalg.svd(L_DD.T @ W_DO, full_matrices=False)
    k = min(rank, len(S))
    root = S[:k].sqrt()
    A_RD[:k] = torch.linalg.solve_triangular(L_DD.T, U[:, :k] * root, upper=True).T
    B_OR[:, :k] = Vh[:k].T * root
    return W_DO, A_RD, B_OR


def shares_by_rank(fitted: Sums, judged: Sequence[Sums], *, ridge: float = RIDGE) -> list[Tensor]:
    """Return which part of the power the best map of each rank explains, on several tokens.

        W_r = W V_r V_r^T as in `best_map`;  share(r) = 1 - sum |y - x W_r|^2 / sum |y|^2

    The maps are nested, so one decomposition serves all ranks:

        sum <y, x W_r> = sum_{k <= r} (W v_k)^T X^T Y v_k
        sum |x W_r|^2  = sum_{k <= r} (W v_k)^T X^T X (W v_k)

    Args:
        fitted: the tokens that the maps are fitted on.
        judged: other tokens, and those once more if their own shares are wanted.
        ridge: as of `best_map`.

    Returns:
        For each of `judged` the shares [min(D, O)] at ranks 1, 2, 3 ...; ones without any power.
    """
    XX_DD, XY_DO = fitted.XX_DD, fitted.XY_DO
    ranks = min(XY_DO.shape)
    scale = XX_DD.diagonal().mean()
    if not (scale > 0 and fitted.power > 0):
        return [XX_DD.new_full((ranks,), float(part.power == 0)) for part in judged]
    eye_DD = torch.eye(len(XX_DD), dtype=XX_DD.dtype, device=XX_DD.device)
    L_DD = torch.linalg.cholesky(XX_DD + ridge * scale * eye_DD)
    W_DO = torch.cholesky_solve(XY_DO, L_DD)
    V_OK = torch.linalg.svd(L_DD.T @ W_DO, full_matrices=False).Vh.T
    WV_DK = W_DO @ V_OK
    shares = []
    for part in judged:
        both_K = (WV_DK * (part.XY_DO @ V_OK)).sum(0)
        square_K = (WV_DK * (part.XX_DD @ WV_DK)).sum(0)
        left_K = part.power - (2 * both_K - square_K).cumsum(0)
        shares.append(1 - left_K / part.power if part.power > 0 else torch.ones_like(left_K))
    return shares
