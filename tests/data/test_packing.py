"""Packs hold every row once and whole, and no batch says more or less than its rows."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
import trl
from datasets import Dataset, disable_progress_bars, enable_progress_bars

from rotmole.data import PackedCollator, PackedRows, model_inputs, pack, row_sums

WORDS = SimpleNamespace(pad_token_id=9, eos_token_id=8)
ROWS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "task_id": 1},
    {"input_ids": [4, 5], "labels": [4, 5], "task_id": 0},
    {"input_ids": [6], "labels": [6], "task_id": 1},
]


def test_packs_are_those_of_best_fit_decreasing() -> None:
    draw = random.Random(3)
    lengths = [draw.randint(20, 400) for _ in range(300)]
    packs = pack(lengths, 512, seed=1)
    assert sorted(row for each in packs for row in each) == list(range(300))
    sums = [sum(lengths[row] for row in each) for each in packs]
    assert max(sums) <= 512
    assert packs == pack(lengths, 512, seed=1) != pack(lengths, 512, seed=2)
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    disable_progress_bars()
    try:
        theirs = trl.pack_dataset(rows, 512)
    finally:
        enable_progress_bars()
    assert sorted(sums) == sorted(map(len, theirs["input_ids"]))
    ranks = [place for place, total in enumerate(sums) if total < 400]
    assert ranks != list(range(len(sums) - len(ranks), len(sums)))  # the short ones are mixed in


def test_a_data_set_of_packs() -> None:
    packed = PackedRows(Dataset.from_list(ROWS), [[1, 0], [2]])
    assert [[row["input_ids"] for row in packed[number]] for number in range(len(packed))] == [
        [[4, 5], [1, 2, 3]], [[6]],
    ]  # fmt: skip
    assert list(packed["input_ids"]) == [row["input_ids"] for row in ROWS]


def test_a_batch_of_packs() -> None:
    batch = PackedCollator(WORDS)([[ROWS[1], ROWS[0]], [ROWS[2]]])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5, 1, 2, 3], [6, 9, 9, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
        "labels": [[-100, 5, -100, 2, 3], [-100] * 5],
        "position_ids": [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]],
        "seq_idx": [[0, 0, 1, 1, 1], [0, -1, -1, -1, -1]],
        "task_id": [0, 1, 1],
    }
    assert "attention_mask" not in model_inputs(batch)
    sums = row_sums(torch.arange(1.0, 11.0).view(2, 5), batch)
    assert sums.tolist() == [3.0, 12.0, 6.0]


def test_a_batch_of_one_sequence() -> None:
    batch = PackedCollator(WORDS, flat=True)([[ROWS[1], ROWS[0]], [ROWS[2]]])
    assert batch.pop("max_length_q") == batch.pop("max_length_k") == 3
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5, 1, 2, 3, 6]],
        "attention_mask": [[1] * 6],
        "labels": [[-100, 5, -100, 2, 3, -100]],
        "position_ids": [[0, 1, 0, 1, 2, 0]],
        "seq_idx": [[0, 0, 1, 1, 1, 2]],
        "task_id": [0, 1, 1],
        "cu_seq_lens_q": [0, 2, 5, 6],
        "cu_seq_lens_k": [0, 2, 5, 6],
    }
