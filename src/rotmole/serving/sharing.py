"""Several models of one base: modules of their own, the base's tensors in common."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def shared_copy(model: nn.Module) -> Any:
    """Return a copy of a model whose modules are its own and whose tensors are the model's.

    An adapter put on the copy changes neither the model nor other copies. It costs no memory but
    that of the module objects. A weight that is replaced in the copy, as some PEFT methods do
    when they are loaded, is replaced there alone.

    Args:
        model: without an adapter.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised ones carry more than their data
        own = nn.Parameter(parameter.data, requires_grad=False) if plain else parameter
        memo[id(parameter)] = own
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)
