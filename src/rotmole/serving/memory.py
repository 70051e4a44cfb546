"""How many tokens the key-value cache of a server may hold."""

from __future__ import annotations

from typing import Any

from rotmole.models.room import free_memory, token_bytes

BLOCK = 256
"""Tokens of one block of the cache: transformers' default."""

SHARE_OF_GPU = 0.8
SHARE_OF_MEMORY = 0.3
"""Shares of the free memory; other processes need the memory of a computer, too."""


def cache_tokens(model: Any, *, window: int, parallel: int, models: int) -> int:
    """Return how many tokens the cache of one model may hold: a whole number of blocks.

    It is what `parallel` texts of the window's length need, or what fits the model's part of the
    free memory if that is less, and never less than one block for each text.

    Args:
        window: the most tokens of one text, prompt and answer together.
        parallel: texts that are generated at the same time.
        models: those that share the memory.
    """
    share = SHARE_OF_GPU if model.device.type == "cuda" else SHARE_OF_MEMORY
    fitting = int(share * free_memory(model.device) / models / token_bytes(model))
    wanted = parallel * _blocks(window)
    return BLOCK * max(parallel, min(wanted, fitting // BLOCK))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
