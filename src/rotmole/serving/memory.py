"""How many tokens the key-value cache of a server may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BLOCK = 256
"""Tokens of one block of the cache: transformers' default."""

SHARE_OF_GPU = 0.8
SHARE_OF_MEMORY = 0.3
"""Shares of the free memory; other processes need the memory of a computer, too."""

_CGROUP = Path("/sys/fs/cgroup")


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


def token_bytes(model: Any) -> int:
    """Return the bytes that the cache needs for one token: a key and a value in every layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of the computer within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = [int(psutil.virtual_memory().available)]
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free.append(max(limit - used, 0))
    return min(free)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
