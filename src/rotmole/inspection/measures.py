"""What one model shows of one law: how far its logits are apart where they should be equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PADS, NEW = 7, 4
"""Padding tokens, and tokens that are generated."""


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest change of a logit in standard deviations of the first logits."""
    one, other = first.double(), second.double()
    if torch.equal(one, other):
        return 0.0
    return float((one - other).abs().max() / one.std())


def logits_of(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Return logits [B, T, V]; positions are counted over the tokens that are no padding."""
    mask = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask, "use_cache": False}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if not virtual and "position_ids" in inspect.signature(inner.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(**inputs).logits
    return logits[:, -ids_BT.shape[1] :].float()  # virtual tokens come first


def all_logits(model: Any, sets: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of each set of rows."""
    return [logits_of(model, ids_BT) for ids_BT in sets]


def disabled_logits(model: Any, sets: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of each set of rows with the adapter disabled."""
    with model.disable_adapter():
        return all_logits(model, sets)


def _other_rows(model: Any, ids_BT: Tensor) -> float:
    return difference(logits_of(model, ids_BT[:1]), logits_of(model, ids_BT)[:1])


def _padded(model: Any, ids_BT: Tensor, *, left: bool) -> float:
    pads = ids_BT.new_full((1, PADS), _pad(model))
    absent, present = torch.zeros_like(pads), torch.ones_like(ids_BT[:1])
    ids, mask = [pads, ids_BT[:1]], [absent, present]
    if not left:
        ids, mask = ids[::-1], mask[::-1]
    logits = logits_of(model, torch.cat(ids, 1), torch.cat(mask, 1))
    logits = logits[:, PADS:] if left else logits[:, :-PADS]
    return difference(logits_of(model, ids_BT[:1]), logits)


def _padding_left(model: Any, ids_BT: Tensor) -> float:
    return _padded(model, ids_BT, left=True)


def _padding_right(model: Any, ids_BT: Tensor) -> float:
    return _padded(model, ids_BT, left=False)


def _cache(model: Any, ids_BT: Tensor) -> float:
    """Compare greedy generation, up to the first step after which the texts differ."""
    with_cache, without = (_generated(model, ids_BT[:1], cached) for cached in (True, False))
    last = NEW
    for step, (one, other) in enumerate(zip(with_cache, without, strict=True), start=1):
        if one.argmax() != other.argmax():
            last = step
            break
    return difference(torch.stack(without[:last]), torch.stack(with_cache[:last]))


def _generated(model: Any, ids_BT: Tensor, use_cache: bool) -> list[Tensor]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=use_cache,
        pad_token_id=_pad(model), output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    return [step.float() for step in model.generate(**inputs, generation_config=config).logits]


def _later_tokens(model: Any, ids_BT: Tensor) -> float:
    half = ids_BT.shape[1] // 2
    other = torch.cat([ids_BT[:1, :half], ids_BT[1:2, half:]], 1)
    return difference(logits_of(model, ids_BT[:1])[:, :half], logits_of(model, other)[:, :half])


def _training_mode(model: Any, ids_BT: Tensor) -> float:
    before = logits_of(model, ids_BT[:1])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        logits_of(model, ids_BT)
    model.eval()
    return difference(before, logits_of(model, ids_BT[:1]))


def _earlier_calls(model: Any, ids_BT: Tensor) -> float:
    """Compare after each kind of call: the next call may clear what one leaves."""
    before = logits_of(model, ids_BT[:1])
    calls: list[Callable[[], Any]] = [
        lambda: logits_of(model, ids_BT[1:]),
        lambda: _generated(model, ids_BT[1:2], use_cache=True),
    ]
    if hasattr(model, "disable_adapter"):
        calls.append(lambda: disabled_logits(model, [ids_BT]))
    changes = []
    for call in calls:
        call()
        changes.append(difference(before, logits_of(model, ids_BT[:1])))
    return max(changes)


MEASURES: Mapping[str, Callable[[Any, Tensor], float]] = {
    "other rows": _other_rows,
    "padding left": _padding_left,
    "padding right": _padding_right,
    "cache": _cache,
    "later tokens": _later_tokens,
    "training mode": _training_mode,
    "earlier calls": _earlier_calls,
}
"""Law -> its measure on a model and a set of rows [B, T], for laws that one model shows."""


def _pad(model: Any) -> int:
    pad = model.config.get_text_config().pad_token_id
    return 0 if pad is None else int(pad)
