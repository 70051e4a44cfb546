"""How far two models are apart: divergence of their predictions, and how often they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotmole.data.encode import Row, equal_length_batches
from rotmole.evaluation.scoring import evaluating
from rotmole.models.logits import accepts_logits_to_keep


@dataclass(frozen=True)
class Agreement:
    """How near a second model's predictions are to the first one's, over some tokens.

    Attributes:
        kl: mean over tokens of KL(first || second), in nats.
        same: part of the tokens for which both think the same token the most likely.
        tokens: number of tokens.
    """

    kl: float
    same: float
    tokens: int


def agreement(first: Any, second: Any, rows: Sequence[Row], *, batch_size: int = 8) -> Agreement:
    """Compare the predictions of two models for the tokens of rows that count.

    Args:
        first: the model that the other one is to be like.
        second: on the same device, with the same vocabulary.
        rows: as in `equal_length_batches`.
    """
    total, same, count = 0.0, 0, 0
    with evaluating(first), evaluating(second):
        for arguments, counts_BT in equal_length_batches(rows, batch_size):
            # the logits at t predict token t + 1
            chosen_BT = counts_BT[:, 1:]
            if not chosen_BT.any():
                continue
            p_NV, q_NV = (_log_p(model, arguments, chosen_BT) for model in (first, second))
            total += float((p_NV.exp() * (p_NV - q_NV)).sum(dtype=torch.float64))
            same += int((p_NV.argmax(-1) == q_NV.argmax(-1)).sum())
            count += len(p_NV)
    return Agreement(total / max(count, 1), same / max(count, 1), count)


def _log_p(model: Any, arguments: Mapping[str, Tensor], chosen_BT: Tensor) -> Tensor:
    """Return log-probabilities [N, V] at the chosen positions."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in arguments.items()}
    inputs["use_cache"] = False
    positions = chosen_BT.any(0).nonzero().squeeze(-1)
    if accepts_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=positions.to(device)).logits
    else:
        logits = model(**inputs).logits[:, positions.to(device)]
    chosen = logits[chosen_BT[:, positions].to(device)]
    return torch.log_softmax(chosen.float(), dim=-1)
