"""How long the sequences of a training are, and how much of its batches is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotmole.data import pack
from rotmole.training.order import EpochSampler


@dataclass(frozen=True)
class Lengths:
    """The lengths of rows, and of the sequences that training makes of them.

    Attributes:
        rows: tokens of each row, in the mixture's order.
        sequences: tokens of each row, or pack of rows, in the order of training.
        batch: rows or packs of a batch.
        flat: whether the rows or packs of a batch are joined to one sequence.
        packing: whether sequences are packs.
    """

    rows: list[int]
    sequences: list[int]
    batch: int
    flat: bool
    packing: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any], rows: list[int], seed: int) -> Lengths:
        """Do with lengths what training does with rows.

        Args:
            settings: the arguments of trl.SFTConfig.
            rows: tokens of each row, in the mixture's order.
            seed: of the run.
        """
        batch = settings["per_device_train_batch_size"]
        packing = bool(settings.get("packing"))
        sequences = rows
        if packing:
            packs = pack(rows, settings["max_length"], seed=seed)
            sequences = [sum(rows[row] for row in each) for each in packs]
        elif settings.get("train_sampling_strategy") == "group_by_length":
            order = EpochSampler(len(rows), seed, batch=batch, lengths=rows).order(0)
            sequences = [rows[row] for row in order]
        return cls(rows, sequences, batch, bool(settings.get("padding_free")), packing)

    @property
    def shapes(self) -> Iterator[tuple[int, int]]:
        """The (sequences, tokens of each with its padding) of each batch of an epoch."""
        for start in range(0, len(self.sequences), self.batch):
            each = self.sequences[start : start + self.batch]
            yield (1, sum(each)) if self.flat else (len(each), max(each))

    def mean_shape(self) -> tuple[int, int]:
        """Return the shape of a batch as it is on average."""
        shapes = list(self.shapes)
        filled = sum(sequences * tokens for sequences, tokens in shapes)
        if self.flat:
            return 1, max(round(filled / len(shapes)), 1)
        return self.batch, max(round(filled / len(self.sequences)), 1)

    def largest_shape(self) -> tuple[int, int]:
        """Return the shape of the largest batch."""
        return (1 if self.flat else self.batch), max(tokens for _, tokens in self.shapes)

    def padding(self) -> str:
        """Say which share of a batch is padding, and which it would be if nothing were done."""
        filled = sum(sequences * tokens for sequences, tokens in self.shapes)
        plain = 1 - sum(self.rows) / padded(self.rows, self.batch)
        told = f"{1 - sum(self.rows) / filled:.0%} of a batch"
        if self.flat or self.sequences != self.rows:
            told += f" ({plain:.0%} with rows as they come, one a sequence)"
        return told


def padded(lengths: Sequence[int], batch: int) -> int:
    """Return the tokens of all batches of rows, padding included.

    >>> padded([3, 5, 2], batch=2)
    12
    """
    parts = (lengths[i : i + batch] for i in range(0, len(lengths), batch))
    return sum(max(part) * len(part) for part in parts)
