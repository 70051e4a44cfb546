"""Whether a model can compute logits at some positions only."""

from __future__ import annotations

import inspect
from typing import Any


def accepts_logits_to_keep(model: Any) -> bool:
    """Return whether the model's forward takes logits_to_keep, the positions that need logits.

    Args:
        model: a causal language model, or a PeftModel around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
