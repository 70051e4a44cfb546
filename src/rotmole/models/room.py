"""How much memory is free, and how many tokens of a forward pass or of a cache fit into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHARE = 0.5
"""Of the free memory that a forward pass without gradients may take."""

_CGROUP = Path("/sys/fs/cgroup")


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


def token_bytes(model: Any) -> int:
    """Return the bytes that the cache needs for one token: a key and a value in every layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


def pass_bytes(model: Any, *, logits: bool) -> int:
    """Return the bytes that a forward pass without gradients needs for each token.

        b (4 F + 10 D) + V (b + 8)      b bytes a number; F, D the inner and outer width of a layer

    One layer's tensors live at a time. Logits over V words lie there in the model's type, in
    float32, and once more while they are summed up.

    Args:
        logits: every token gets its logits; otherwise the second term is left out.
    """
    config = model.config.get_text_config()
    width = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    size = model.dtype.itemsize
    words = int(model.get_output_embeddings().weight.shape[0]) if logits else 0
    return int(size * (4 * inner + 10 * width) + words * (size + 8))


def tokens_that_fit(model: Any, each: int) -> int:
    """Return how many tokens of `each` bytes fit into half of the free memory; at least one."""
    return max(1, int(SHARE * free_memory(model.device)) // each)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
