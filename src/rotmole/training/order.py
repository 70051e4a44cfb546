"""The order in which training walks its rows: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSampler(Sampler[int]):
    """The order of rows, a function of (seed, epoch) alone.

    Epoch 0 keeps the mixture's own order, later ones are permutations. With lengths, every epoch
    is a permutation in which the rows of a batch are of similar length.

    Args:
        rows: number of rows N.
        seed: the run's seed.
        batch: rows of an update; with lengths only.
        lengths: tokens of each row, to save padding, or None.
    """

    def __init__(
        self, rows: int, seed: int, *, batch: int = 1, lengths: list[int] | None = None
    ) -> None:
        self.rows, self.seed = rows, seed
        self.batch, self.lengths = batch, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """Return the row numbers of one epoch, in order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.lengths is not None:
            grouped = LengthGroupedSampler(self.batch, lengths=self.lengths, generator=generator)
            return list(grouped)
        if epoch == 0:
            return list(range(self.rows))
        return torch.randperm(self.rows, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def __len__(self) -> int:
        return self.rows
