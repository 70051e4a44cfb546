"""A text, token by token: which experts each token uses, with which weights, turned how far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from rotmole.errors import ConfigError, did_you_mean
from rotmole.evaluation.scoring import evaluating
from rotmole.inspection.inspection import Passage, Table, TokenRouting
from rotmole.recording.watch import Seen, watch

LONGEST = 512
"""Tokens of a text that are shown."""


def matching(paths: Sequence[str], pattern: str | None) -> list[str]:
    """Return the layers that a pattern names: a part of the path, or with * and ? in it.

    Args:
        pattern: None names none.

    Raises:
        ConfigError: it names none of them.

    >>> matching(["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"], "layers.1.")
    ['model.layers.1.mlp.up_proj']
    """
    if pattern is None:
        return []
    named = [path for path in paths if fnmatch(path, f"*{pattern}*")]
    if not named:
        hint = did_you_mean(pattern, [part for path in paths for part in path.split(".")])
        raise ConfigError(
            f"--layer {pattern!r} names no adapted layer{hint or ';'} the first is {paths[0]!r}."
        )
    return named


def passage_of(
    model: Any, adapter: str, tokenizer: Any, text: str, layers: Sequence[str] = ()
) -> Passage:
    """Return where the tokens of a text go.

    Args:
        model: with the adapter.
        adapter: its name.
        tokenizer: of the model.
        text: its first LONGEST tokens are read.
        layers: paths of the layers to keep besides the mean.
    """
    ids = tokenizer(text)["input_ids"][:LONGEST]
    rows: dict[str, TokenRouting] = {}
    weights: dict[str, Tensor] = {}
    angles: dict[str, Tensor] = {}

    def look(seen: Seen) -> None:
        if seen.routing is None or seen.expert_TK is not None:
            return
        path = seen.layer.rotmole_path
        weights[path] = seen.routing.weight_TE.double().cpu()
        angle_TE = angles_of(seen)
        if angle_TE is not None:
            angles[path] = angle_TE

    device = next(model.parameters()).device
    with evaluating(model), watch(model, adapter, look):
        model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    for path in layers:
        if path in weights:
            rows[path] = TokenRouting(_table(weights[path]), _table(angles.get(path)))
    words = tuple(tokenizer.decode([number]) for number in ids)
    return Passage(words, _mean(weights, angles, len(ids)), rows)


def angles_of(seen: Seen) -> Tensor | None:
    """Return [T, E] by which angle each selected expert is turned, 0 for the others.

    Of several planes the mean of |angle|; None without a rotation.
    """
    turned = seen.turns()
    if turned is None:
        return None
    angle_EMT = turned[0].angle_EMT.double().cpu()
    angle_ET = angle_EMT[:, 0] if angle_EMT.shape[1] == 1 else angle_EMT.abs().mean(1)
    return angle_ET.T * turned[1].cpu()


def _mean(weights: dict[str, Tensor], angles: dict[str, Tensor], tokens: int) -> TokenRouting:
    """Average over the layers that have as many experts as most have."""
    if not weights:
        return TokenRouting(tuple(() for _ in range(tokens)))
    most = Counter(weight.shape[1] for weight in weights.values()).most_common(1)[0][0]
    alike = [path for path, weight in weights.items() if weight.shape[1] == most]
    weight_LTE = torch.stack([weights[path] for path in alike])
    angle_TE = None
    if turning := [path for path in alike if path in angles]:
        chosen_LTE = torch.stack([weights[path] != 0 for path in turning])
        angle_LTE = torch.stack([angles[path].abs() for path in turning])
        angle_TE = angle_LTE.sum(0) / chosen_LTE.sum(0).clamp(min=1)
    return TokenRouting(_table(weight_LTE.mean(0)) or (), _table(angle_TE))


def _table(values_TE: Tensor | None) -> Any:
    if values_TE is None:
        return None
    table: Table = tuple(map(tuple, values_TE.tolist()))
    return table
