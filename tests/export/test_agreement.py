from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import tiny
from rotmole.data.encode import equal_length_batches
from rotmole.export.agreement import agreement


def rows() -> list[dict[str, list[int]]]:
    """Three lengths; one row without labels, one with a learnt end, one in which nothing counts."""
    ids = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (7, 9, 9, 4)]
    half = [-100] * 5 + ids[1][5:]
    return [
        {"input_ids": ids[0]},
        {"input_ids": ids[1], "labels": half},
        {"input_ids": ids[2]},
        {"input_ids": ids[3], "labels": [-100] * 4},
    ]


def test_batches_hold_rows_of_one_length() -> None:
    found = list(equal_length_batches(rows(), 2))
    assert [tuple(each["input_ids"].shape) for each, _ in found] == [(1, 4), (1, 7), (2, 9)]
    assert all(bool(each["attention_mask"].all()) for each, _ in found)
    assert [int(counts.sum()) for _, counts in found] == [0, 7, 4 + 9]
    assert len(list(equal_length_batches(rows(), 1))) == 4


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_divergence_is_torchs_own_over_the_tokens_that_count(batch_size: int) -> None:
    first, second = tiny.llama(0), tiny.llama(1)
    divergences, same = [], []
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        labels = row.get("labels", row["input_ids"])
        with torch.no_grad():
            p, q = (Categorical(logits=model(ids).logits[0, :-1]) for model in (first, second))
        counts = [index for index, label in enumerate(labels[1:]) if label != -100]
        divergences += kl_divergence(p, q)[counts].tolist()
        same += (p.probs.argmax(-1) == q.probs.argmax(-1))[counts].tolist()
    found = agreement(first, second, rows(), batch_size=batch_size)
    assert found.tokens == len(divergences) == 6 + 4 + 8
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found.same == pytest.approx(sum(same) / len(same))


def test_a_model_agrees_with_itself_and_keeps_its_mode() -> None:
    model = tiny.llama().train()
    found = agreement(model, model, rows())
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.same == 1
    assert model.training


def test_no_rows_no_tokens() -> None:
    assert agreement(tiny.llama(), tiny.llama(), []).tokens == 0
