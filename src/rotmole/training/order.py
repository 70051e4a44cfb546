"""The order in which training walks its rows: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

WINDOW = 32
"""Batches among which rows change places so that those of a batch are of similar length."""


class EpochSampler(Sampler[int]):
    """The order of rows, a function of (seed, epoch) alone.

    Epoch 0 keeps the mixture's own order, later ones are permutations. With lengths, the rows of
    WINDOW batches are sorted by length and cut into batches, which then come in random order. So
    every window has the rows that it had, its tasks in the mixture's shares, and no length comes
    sooner than others.

    Args:
        rows: number of rows N.
        seed: the run's seed.
        batch: rows of a batch of all processes together; with lengths only.
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
        order = list(range(self.rows))
        if epoch > 0:
            order = torch.randperm(self.rows, generator=generator).tolist()
        if self.lengths is None:
            return order
        size = self.batch * WINDOW
        windows = [order[start : start + size] for start in range(0, self.rows, size)]
        return [row for window in windows for row in self._grouped(window, generator)]

    def _grouped(self, window: list[int], generator: torch.Generator) -> list[int]:
        """Sort by length, and shuffle the batches; one that is not full stays the last."""
        assert self.lengths is not None
        by_length = sorted(window, key=self.lengths.__getitem__)
        spare = len(window) % self.batch
        # the last batch of an epoch may be smaller: the longest rows, for which memory is scarce
        full, rest = by_length[: len(window) - spare], by_length[len(window) - spare :]
        places = torch.randperm(len(full) // self.batch, generator=generator).tolist()
        batches = [full[place * self.batch : (place + 1) * self.batch] for place in places]
        return [row for batch in batches for row in batch] + rest

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def __len__(self) -> int:
        return self.rows
