"""Greedy decoding of many prompts, in which finished answers leave the batch.

A batch is decoded by transformers' generate() until a quarter of its rows are finished; these leave
it, and generate() goes on with the others and their key-value cache. Few rows that are left wait
until the leftovers of several batches make a batch again, so long answers are decoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rotmole.models.logits import accepts_logits_to_keep

LEAVING = 4
"""Rows leave a batch when one in so many is finished, and wait when so few of a batch are left."""

Stop = Callable[[Tensor], Sequence[StoppingCriteria]]
"""Makes what ends a row besides its end tokens, from [B] the column of its first new token."""


@dataclass(frozen=True)
class Rows:
    """Rows that are decoded together.

    Attributes:
        numbers_B: of their prompts.
        ids_BT: prompts, padded on the left, and what was generated.
        mask_BT: 0 where a row is padded.
        starts_B: column of each row's first new token.
        cache: of all tokens but the last one; None before the first step.
    """

    numbers_B: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    starts_B: Tensor
    cache: Any = None

    def __len__(self) -> int:
        return len(self.numbers_B)

    def new(self) -> Tensor:
        """Return [B] how many tokens were generated in each row."""
        return self.ids_BT.shape[1] - self.starts_B

    def only(self, keep_B: Tensor) -> Rows:
        """Return some of the rows; the cache is that of the rows before, made smaller."""
        index = keep_B.nonzero()[:, 0]
        self.cache.batch_select_indices(index)
        return Rows(
            self.numbers_B[index], self.ids_BT[index], self.mask_BT[index], self.starts_B[index],
            self.cache,
        )  # fmt: skip


def padded_left(rows: Sequence[Sequence[int]], fill: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and mask, each [B, longest row]."""
    length = max(map(len, rows))
    ids_BT = torch.full((len(rows), length), fill, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids_BT[row, length - len(tokens) :] = torch.tensor(tokens)
        mask_BT[row, length - len(tokens) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def last_position(model: Any) -> dict[str, Tensor]:
    """Return the argument that asks for the logits of the last position by its index.

    generate() asks by a slice, which is not contiguous: torch then multiplies each row of a batch
    by its own copy of the vocabulary matrix (five seconds for 48 rows of SmolLM2-135M).
    """
    if not accepts_logits_to_keep(model):
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=model.device)}


def can_leave(model: Any) -> bool:
    """Whether rows of a model's batch can leave it: its cache holds keys and values row by row."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:  # tokens in front, which the mask does not count
            return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_is_stateful", True) or not base._supports_default_dynamic_cache():
        return False
    if base.config.is_encoder_decoder or base.generation_config.cache_implementation is not None:
        return False
    layers = DynamicCache(config=base.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def decoded(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    size: int,
    config: GenerationConfig,
    stop: Stop,
    tick: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to what ended it.

    Args:
        model: `can_leave` holds for it.
        prompts: token ids; those of similar length should stand together.
        size: the most rows of a batch.
        config: greedy, with max_new_tokens, pad_token_id and all else.
        stop: see `Stop`.
        tick: called with the number of prompts that were finished since the last call.
    """
    results: list[list[int]] = [[]] * len(prompts)
    starts = list(range(0, len(prompts), size))[::-1]
    waiting: list[Rows] = []
    rows: Rows | None = None
    while starts or waiting or rows is not None:
        if rows is None and starts and sum(map(len, waiting)) <= size - size // LEAVING:
            start = starts.pop()
            rows = _first(model, prompts[start : start + size], start, config)
        elif rows is None:
            rows, waiting = _together(waiting, config.pad_token_id), []
        rows, lengths_B = _stepped(model, tokenizer, rows, config, stop)
        done_B = lengths_B >= 0
        for row in done_B.nonzero()[:, 0].tolist():
            first = int(rows.starts_B[row])
            tokens = rows.ids_BT[row, first : first + int(lengths_B[row])].tolist()
            results[int(rows.numbers_B[row])] = tokens
        if tick is not None:
            tick(int(done_B.sum()))
        if bool(done_B.all()):
            rows = None
            continue
        rows = rows.only(~done_B)
        if (starts or waiting) and len(rows) <= size // LEAVING and _can_join(rows.cache):
            waiting.append(rows)
            rows = None
    return results


class _Enough(StoppingCriteria):
    """Ends a call of generate() when a quarter of the rows are finished.

    Attributes:
        lengths_B: new tokens of each finished row, up to and with the one that ended it; else -1.
    """

    def __init__(self, rows: Rows, ends: Sequence[int], others: Sequence[StoppingCriteria]) -> None:
        self.starts_B, self.others = rows.starts_B, others
        device = rows.ids_BT.device
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self.lengths_B = torch.full((len(rows),), -1, device=device)
        self.enough = -(-len(rows) // LEAVING)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return [B], True for the finished rows of input_ids [B, T], or for all to end."""
        done_B = torch.isin(input_ids[:, -1], self.ends)
        for other in self.others:
            done_B = done_B | other(input_ids, scores, **kwargs)
        first_B = done_B & (self.lengths_B < 0)
        self.lengths_B[first_B] = (input_ids.shape[1] - self.starts_B)[first_B]
        finished_B = self.lengths_B >= 0
        return finished_B | (finished_B.sum() >= self.enough)


def _first(
    model: Any, prompts: Sequence[Sequence[int]], number: int, config: GenerationConfig
) -> Rows:
    ids_BT, mask_BT = padded_left(prompts, config.pad_token_id, model.device)
    numbers_B = torch.arange(number, number + len(prompts), device=ids_BT.device)
    return Rows(numbers_B, ids_BT, mask_BT, torch.full_like(numbers_B, ids_BT.shape[1]))


def _stepped(
    model: Any, tokenizer: Any, rows: Rows, config: GenerationConfig, stop: Stop
) -> tuple[Rows, Tensor]:
    """Decode until enough rows are finished, or one has all its tokens.

    Returns:
        The rows, and [B] the new tokens of those that are finished, -1 for the others.
    """
    left = config.max_new_tokens - int(rows.new().max())
    ends = config.eos_token_id or []
    enough = _Enough(rows, ends, stop(rows.starts_B))
    output = model.generate(
        input_ids=rows.ids_BT,
        attention_mask=rows.mask_BT,
        **({} if rows.cache is None else {"past_key_values": rows.cache}),
        **last_position(model),
        generation_config=_with_limit(config, left),
        stopping_criteria=StoppingCriteriaList([enough]),
        tokenizer=tokenizer,  # for stop strings of the model's own configuration
    )
    ids_BT = output.sequences
    new = ids_BT.shape[1] - rows.ids_BT.shape[1]
    rows = replace(
        rows, ids_BT=ids_BT, mask_BT=pad(rows.mask_BT, (0, new), value=1),
        cache=output.past_key_values,
    )  # fmt: skip
    full_B = (enough.lengths_B < 0) & (rows.new() >= config.max_new_tokens)
    return rows, torch.where(full_B, rows.new(), enough.lengths_B)


def _with_limit(config: GenerationConfig, tokens: int) -> GenerationConfig:
    config = copy(config)
    config.max_new_tokens, config.return_dict_in_generate = tokens, True
    return config


def _can_join(cache: Any) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _together(parts: Sequence[Rows], fill: int) -> Rows:
    """Join rows of several batches; all are padded on the left to the longest."""
    length = max(part.ids_BT.shape[1] for part in parts)
    more = [length - part.ids_BT.shape[1] for part in parts]
    cache = parts[0].cache
    for number, layer in enumerate(cache.layers):
        others = [part.cache.layers[number] for part in parts]
        for name in ("keys", "values"):
            states = [
                pad(getattr(other, name), (0, 0, columns, 0))
                for other, columns in zip(others, more, strict=True)
            ]
            setattr(layer, name, torch.cat(states))
    pairs = list(zip(parts, more, strict=True))
    return Rows(
        torch.cat([part.numbers_B for part in parts]),
        torch.cat([pad(part.ids_BT, (columns, 0), value=fill) for part, columns in pairs]),
        torch.cat([pad(part.mask_BT, (columns, 0)) for part, columns in pairs]),
        torch.cat([part.starts_B + columns for part, columns in pairs]),
        cache,
    )
