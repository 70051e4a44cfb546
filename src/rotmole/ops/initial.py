"""How experts start: segments of the base weight's SVD, Gaussian A, sparse A."""

from __future__ import annotations

import torch
from torch import Tensor

RHO = 10.0  # GOAT's rho: how much smaller the experts start than the singular values they stand for


def svd_segments(weight_OD: Tensor, experts: int, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Cut experts out of a weight's spectrum, each from its own segment.

        W = U diag(S) V^T;  segment i is the R singular directions from i floor(min(O, D) / E) on
        A_i = sqrt(S_i / (s rho)) V_i^T,   B_i^T = U_i sqrt(S_i / (s rho)),   rho = 10

    Args:
        weight_OD: [O, D] the base layer's weight.
        experts: E.
        rank: R; E R <= min(O, D), so that no two experts share a direction.
        scale: s, what the layer multiplies by.

    Returns:
        (A [E, R, D], B [E, R, O]) in float32, or float64 where the weight is.

    Raises:
        ValueError: E R is larger than min(O, D).

    Source: GOAT (arXiv 2502.16894), equation of the initial experts and its released code.

    >>> A, B = svd_segments(torch.eye(6), experts=2, rank=3, scale=2.0)
    >>> A.shape, B.shape
    (torch.Size([2, 3, 6]), torch.Size([2, 3, 6]))
    """
    narrow = min(weight_OD.shape)
    if experts * rank > narrow:
        raise ValueError(
            f"{experts} experts of rank {rank} need {experts * rank} singular directions; a weight "
            f"of {weight_OD.shape[0]} x {weight_OD.shape[1]} has {narrow}"
        )
    precise = weight_OD.detach().to(torch.promote_types(weight_OD.dtype, torch.float32))
    U_ON, S_N, V_ND = torch.linalg.svd(precise, full_matrices=False)
    first = torch.arange(experts, device=S_N.device) * (narrow // experts)
    index_ER = first[:, None] + torch.arange(rank, device=S_N.device)
    root_ER1 = torch.sqrt(S_N[index_ER] / (scale * RHO)).unsqueeze(-1)
    return root_ER1 * V_ND[index_ER], root_ER1 * U_ON.T[index_ER]


def gaussian(shape_ERD: tuple[int, int, int]) -> Tensor:
    """Draw A from N(0, 1/n^2), n the number of A's rows: all experts' ranks together.

    With one expert n = R, which is PEFT's "gaussian"; with experts of rank one and a frozen A it is
    FlyLoRA's. The numbers come from torch's global generator.

    Args:
        shape_ERD: (E, R, D), E = 1 where all experts share A.

    Returns:
        [E, R, D].

    Source: PEFT's LoRA; FlyLoRA (arXiv 2510.08396).

    >>> gaussian((4, 2, 3)).shape
    torch.Size([4, 2, 3])
    """
    return torch.randn(shape_ERD) / (shape_ERD[0] * shape_ERD[1])


def sparse_mask(shape_ERD: tuple[int, int, int], density: float) -> Tensor:
    """Choose at random which entries of A are not zero: max(1, floor(density D)) in every row.

    Args:
        shape_ERD: (E, R, D).
        density: share of entries that stay, 0 < density <= 1.

    Returns:
        [E, R, D], True where an entry stays.

    Source: FlyLoRA (arXiv 2510.08396), rho = p / n.

    >>> sparse_mask((2, 1, 8), 0.25).sum(-1).tolist()
    [[2], [2]]
    """
    inputs = shape_ERD[-1]
    entries = max(1, int(inputs * density))
    order_ERD = torch.rand(shape_ERD).argsort(-1)  # a random permutation of every row's columns
    return order_ERD < entries
