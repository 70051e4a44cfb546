"""What a method costs: operations of its training, from one traced update without weights."""

from __future__ import annotations

import json
import warnings
from functools import lru_cache
from typing import Any

import torch

from rotmole.config.adapter import check_adapter
from rotmole.config.schema import ModelSection, RunFile
from rotmole.models.memory import UnknownCostError, traced_update
from rotmole.models.preview import preview

IGNORED = -100


def flops_per_token(run: RunFile, rows: Any) -> float | None:
    """Estimate the floating-point operations of training, forward and backward, for one token.

        (products of a traced row of the mean length + 4 L D V) / length

    with L learnt tokens of a row, D the width and V the vocabulary of the output layer.
    Recomputation by checkpointing is left out.

    Args:
        run: the run.
        rows: its tokenised training rows, with the columns input_ids and labels.

    Returns:
        The number; None if it depends on values of the weights, as in some methods of PEFT.
    """
    count = max(len(rows["input_ids"]), 1)
    length = max(round(sum(map(len, rows["input_ids"])) / count), 1)
    learnt = sum(sum(label != IGNORED for label in labels) for labels in rows["labels"]) / count
    adapter = json.dumps(run.adapter, sort_keys=True, default=sorted)
    try:
        products, head = _traced(run.model.model_dump_json(), adapter, length)
    except UnknownCostError:
        return None
    return (products + 4 * learnt * head) / length


@lru_cache(maxsize=64)
def _traced(section: str, adapter: str, length: int) -> tuple[int, int]:
    """Return the products of one row's forward and backward, and the size of the output layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = check_adapter(json.loads(adapter))[1]
        assert config is not None  # the run was checked
        model = preview(ModelSection.model_validate_json(section), config, torch.float32)
    vocabulary, width = model.get_input_embeddings().weight.shape
    traced = traced_update(model, batch=1, length=length, checkpointing=False)
    return traced.products, vocabulary * width
