"""The fingerprint of a base model: its architecture, its shapes, a hash of its last norm.

An adapter's configuration holds that of the model it was made for, so that putting the adapter on
another model is refused or warned of.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotmole.errors import AdapterError
from rotmole.tuner.targets import linear_widths

_INSIDE_AN_ADAPTER = frozenset(
    {"base_layer", "rotmole_experts", "rotmole_dropout", "modules_to_save", "token_adapter"}
)


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe a base model by what stays the same in copies, other number formats and quantised.

    Args:
        model: the base model, with or without adapters in it.

    Returns:
        architecture: transformers' model_type, else the class's name; shapes: module name ->
        "count x inputs -> outputs", without heads of transformers models and without the rows of
        embeddings, which users change; final_norm: SHA-256 of the last norm's weight, rounded to
        bfloat16 so that the format a model is loaded in does not matter, None if there is no norm
        or its weight is not loaded.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    counts: dict[str, Counter[str]] = {}
    norm: Tensor | None = None
    for name, module in _own_modules(body):
        shape = _shape(module)
        if shape:
            counts.setdefault(name, Counter())[shape] += 1
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            norm = weight
    shapes = {
        name: ", ".join(f"{count} x {shape}" for shape, count in sorted(shape_counts.items()))
        for name, shape_counts in counts.items()
    }
    architecture = kind if isinstance(kind, str) and kind else type(model).__name__
    return {"architecture": architecture, "shapes": shapes, "final_norm": _digest(norm)}


def _own_modules(body: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the last word of the name of each module that is not part of an adapter."""
    for path, module in body.named_modules():
        parts = path.split(".")
        wrapper = isinstance(module, AuxiliaryTrainingWrapper)  # shows its inner module's widths
        if not wrapper and not _INSIDE_AN_ADAPTER.intersection(parts):
            words = [part for part in parts if not part.isdigit() and part != "original_module"]
            yield (words[-1] if words else ""), module


def _shape(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return f"embedding of {module.embedding_dim}"
    widths = linear_widths(module)
    return "" if widths is None else f"{widths[0]} -> {widths[1]}"


def _digest(weight: Tensor | None) -> str | None:
    plain = type(weight) in (Tensor, nn.Parameter)  # a sharded weight is only in part here
    if weight is None or not plain or weight.is_meta or not weight.numel():
        return None
    values = weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return "sha256:" + hashlib.sha256(values.numpy().astype("<i2").tobytes()).hexdigest()


def fingerprint_problems(saved: Any) -> list[str]:
    """Say why a saved fingerprint cannot be one; None is right."""
    if saved is None:
        return []
    rule = "it must hold architecture (text), shapes (names to text) and final_norm (text or null)"
    if not isinstance(saved, dict) or saved.keys() != {"architecture", "shapes", "final_norm"}:
        return [f"base_fingerprint is {saved!r}; {rule}"]
    shapes = saved["shapes"]
    words = [saved["architecture"], saved["final_norm"] or ""]
    if isinstance(shapes, dict):
        words += [*shapes, *shapes.values()]
    if not isinstance(shapes, dict) or not all(isinstance(word, str) for word in words):
        return [f"base_fingerprint is {saved!r}; {rule}"]
    return []


def compare_bases(
    saved: dict[str, Any], now: dict[str, Any], saved_name: str | None, now_name: str | None
) -> str | None:
    """Compare the base model that an adapter was made for with the one it is put on.

    Args:
        saved: the fingerprint in the adapter's configuration.
        now: the fingerprint of the model that the adapter is put on.
        saved_name, now_name: their names or paths.

    Returns:
        A warning that names both models if only name or hash differ, else None.

    Raises:
        AdapterError: the architecture differs, or a shape of a module that both have.
    """
    made_for = f"it was made for {saved_name!r}, this is {now_name!r}"
    advice = (
        "load the model it was made for (if you know better, take base_fingerprint out of "
        "adapter_config.json)"
    )
    if saved.get("architecture") not in (None, now["architecture"]):
        raise AdapterError(
            f"the adapter belongs to a base model of architecture {saved['architecture']!r}, this "
            f"one is {now['architecture']!r} ({made_for}); {advice}."
        )
    differ = [
        f"{name} is {now['shapes'][name]}, not {shape}"
        for name, shape in (saved.get("shapes") or {}).items()
        if now["shapes"].get(name, shape) != shape
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise AdapterError(
            f"the adapter belongs to a base model of other shapes: {'; '.join(differ[:3])}{more} "
            f"({made_for}); {advice}."
        )
    return _notice(saved.get("final_norm"), now["final_norm"], saved_name, now_name)


def _notice(
    saved: str | None, now: str | None, saved_name: str | None, now_name: str | None
) -> str | None:
    other_norm = bool(saved and now and saved != now)
    other_name = bool(saved_name and now_name) and not _same_place(saved_name, now_name)
    if not other_norm and not other_name:
        return None
    first, second = repr(saved_name), repr(now_name)
    if other_norm:
        first, second = f"{first} (last norm {_short(saved)})", f"{second} ({_short(now)})"
        judgement = "the weights differ, so the answers will not be those it was trained for"
    elif saved and now:
        judgement = "the last norm is the same, so it is probably a copy"
    else:
        judgement = "whether the weights are the same is not known"
    return f"the adapter was made for the base model {first} and is put on {second}; {judgement}"


def _same_place(first: str | None, second: str | None) -> bool:
    """Tell whether two names are of one place, one perhaps relative to another working folder."""
    one, other = Path(first or ""), Path(second or "")
    if one == other or one.resolve() == other.resolve():
        return True
    short, long = sorted((one.parts, other.parts), key=len)
    relative = not Path(*short).is_absolute() and Path(*long).is_absolute()
    return relative and long[-len(short) :] == short


def _short(digest: str | None) -> str:
    return (digest or "")[: len("sha256:") + 12]
