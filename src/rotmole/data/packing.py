"""Rows that share a sequence: which ones, the batch that they make, and how they are told apart."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotmole.data.encode import IGNORED, Collator

if TYPE_CHECKING:
    from datasets import Dataset


def pack(lengths: Sequence[int], most: int, *, seed: int) -> list[list[int]]:
    """Put rows together into packs of at most `most` tokens: best fit decreasing, no row is cut.

    The longest row comes first, and each goes where it leaves the least room.

    Args:
        lengths: tokens of each row, none above `most`.
        most: tokens of a pack.
        seed: of the order of the packs, for best fit leaves the short ones to the end.

    Returns:
        The numbers of the rows of each pack.

    Source: TRL's packing strategy "bfd". TRL joins the columns of its rows token by token; here a
    row stays whole, because its task and its id belong to it.

    >>> sorted(pack([3, 7, 2, 5], 8, seed=0))
    [[1], [3, 0], [2]]
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens of room -> packs
    rooms: list[int] = []  # the keys, in order
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(rooms, lengths[row])
        if place == len(rooms):
            number, room = len(packs), most
            packs.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop(0)
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[number].append(row)
        room -= lengths[row]
        if room and room not in with_room:
            insort(rooms, room)
        if room:
            with_room.setdefault(room, []).append(number)
    random.Random(f"pack:{seed}").shuffle(packs)
    return packs


class PackedRows(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """A data set of packs: an item is the rows that share a sequence.

    Args:
        rows: encoded rows.
        packs: from `pack`.
    """

    def __init__(self, rows: Dataset, packs: list[list[int]]) -> None:
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: Any) -> Any:
        """Return the rows of a pack, or by its name a column of all rows."""
        if isinstance(number, str):
            return self.rows[number]
        return [self.rows[row] for row in self.packs[number]]


class PackedCollator(Collator):
    """Joins encoded rows to sequences in which positions begin anew with each row.

    The first token of a row is not learnt, because nothing of its row predicts it.

    Args:
        tokenizer, pad_to_multiple_of: as of Collator; the latter not if `flat`.
        flat: join all rows of a batch to one sequence, as kernels of flash attention read it.
    """

    def __init__(
        self, tokenizer: Any, pad_to_multiple_of: int | None = None, *, flat: bool = False
    ) -> None:
        super().__init__(tokenizer, pad_to_multiple_of)
        self.flat = flat

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return a batch of B packs, or of B rows as packs of one.

        Args:
            rows: encoded rows, or lists of them.

        Returns:
            [B, longest pack] input_ids, labels, attention_mask, position_ids, and in seq_idx each
            token's number of its row in the pack, -1 for what fills a short pack up; with `flat`
            [1, all tokens], and cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k as
            transformers' FlashAttentionKwargs; task_id [rows] if rows have one.
        """
        packs = [row if isinstance(row, list) else [row] for row in rows]
        packs = [list(chain(*packs))] if self.flat else packs
        lengths = [[len(row["input_ids"]) for row in each] for each in packs]
        joined = super().__call__([_joined(each) for each in packs])
        longest = joined["input_ids"].shape[1]
        places = [list(chain(*map(range, each))) for each in lengths]
        numbers = [
            list(chain(*([n] * length for n, length in enumerate(each)))) for each in lengths
        ]
        joined["position_ids"] = self._padded(places, 0, longest)
        joined["seq_idx"] = self._padded(numbers, -1, longest).int()
        if "task_id" in packs[0][0]:
            joined["task_id"] = torch.tensor([int(row["task_id"]) for row in chain(*packs)])
        if not self.flat:
            return joined
        ends = torch.tensor([0, *lengths[0]]).cumsum(0).int()
        kernels = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        return joined | kernels | {f"max_length_{name}": max(lengths[0]) for name in "qk"}


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    joined = {"input_ids": list(chain(*(row["input_ids"] for row in rows)))}
    if "labels" in rows[0]:
        joined["labels"] = list(chain(*([IGNORED, *row["labels"][1:]] for row in rows)))
    return joined


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the model that are in a batch, labels included.

    transformers tells the rows of a pack apart by their positions, and only without a mask; what
    fills a short pack up is then a sequence of its own. The mask is for whoever counts tokens.
    """
    masked = "seq_idx" not in batch
    return {name: value for name, value in batch.items() if masked or name != "attention_mask"}


def row_sums(values_BS: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sum what belongs to tokens over each row of a batch.

    Args:
        values_BS: a number for each token of the batch.
        batch: from Collator or PackedCollator.

    Returns:
        [rows] sums, in the order of the rows.
    """
    number_BS = batch.get("seq_idx")
    if number_BS is None:
        return values_BS.sum(1)
    rows_B = number_BS.max(1).values.long() + 1
    first_B1 = (rows_B.cumsum(0) - rows_B)[:, None]
    row_BS = first_B1 + number_BS.clamp(min=0)
    values_BS = values_BS * (number_BS >= 0)
    sums = values_BS.new_zeros(int(rows_B.sum()))
    return sums.index_add(0, row_BS.flatten(), values_BS.flatten())
