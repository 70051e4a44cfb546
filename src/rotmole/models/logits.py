"""Logits of a model: at some positions only, and precise enough for a loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def accepts_logits_to_keep(model: Any) -> bool:
    """Return whether the model's forward takes logits_to_keep, the positions that need logits.

    Args:
        model: a causal language model, or a PeftModel around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
