"""Pruning: a copy of an adapter without experts that given rows do not need, and what changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rotmole.data.encode import IGNORED
from rotmole.errors import InputError, ModelError
from rotmole.evaluation.choices import Cut, routers_of
from rotmole.evaluation.scoring import evaluating
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.prune import check_prunable, prune_saved

Batch = Mapping[str, Tensor]
Show = Callable[[str, int, int], None]
PRUNED = "pruned"
"""Name of the second adapter while both are compared."""


@dataclass(frozen=True)
class Difference:
    """How far the outputs of the pruned mixture are from the mixture's, over the rows.

    Attributes:
        kl: mean over learnt tokens of KL(before || after) of the predictions, in nats.
        largest_kl: of any learnt token.
        logit: the largest difference of any logit of a learnt token.
        hidden: of each layer of the model the largest |h' - h| / |h| of any token.
        tokens: number of learnt tokens.
    """

    kl: float
    largest_kl: float
    logit: float
    hidden: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        cuts: one for each router.
        difference: of the outputs.
        parameters: of the adapter's experts and gates, before and after.
        config: of the pruned adapter.
    """

    cuts: tuple[Cut, ...]
    difference: Difference
    parameters: tuple[int, int]
    config: RotMoleConfig


def prune(
    model: PeftModel,
    batches: Sequence[Batch],
    output: Path,
    *,
    similarity: float | None = None,
    progress: Show | None = None,
) -> Pruned:
    """Write a copy of a model's adapter without the experts that given rows do not need.

    The copy is an ordinary adapter folder. It is put on the model beside the first one, to measure
    the difference, and taken off again. Whether the difference is small enough is for the caller to
    say.

    Args:
        model: with one RotMoLE adapter, which is active.
        batches: arguments of the model with labels and attention_mask, as of rotmole.data.Collator.
        output: a folder to fill.
        similarity: experts that are alike to this degree, at most 1, become one; None merges none.
        progress: called with (what, done, total).

    Raises:
        ConfigError: the mixture cannot be pruned.
        InputError: nothing can go.
        ModelError: the model has no such adapter.
        StorageError: the disk refused.
    """
    adapter = _adapter_of(model)
    config = model.peft_config[adapter]
    check_prunable(config)
    routers = routers_of(model, adapter, similarity)
    with evaluating(model), ExitStack() as hooks:
        for router in routers:
            hooks.callback(router.listen().remove)
        for batch in _shown(batches, "choices", progress):
            model(**_inputs(model, batch))
    cuts = tuple(router.cut() for router in routers)
    if not any(cut.unused or cut.merged for cut in cuts):
        raise InputError(_nothing(cuts, similarity))
    kept = {path: router.kept(cut) for router, cut in zip(routers, cuts, strict=True)
            for path in cut.layers}  # fmt: skip
    model.save_pretrained(str(output), selected_adapters=[adapter])
    folder = output if adapter == "default" else output / adapter
    pruned = prune_saved(folder, kept)
    before = _size(model, adapter)
    model.load_adapter(str(folder), adapter_name=PRUNED)
    try:
        difference = _difference(model, adapter, batches, progress)
        after = _size(model, PRUNED)
    finally:
        model.set_adapter(adapter)
        model.delete_adapter(PRUNED)
    return Pruned(cuts, difference, (before, after), pruned)


def _adapter_of(model: PeftModel) -> str:
    active = getattr(model, "active_adapters", [])
    if len(active) != 1 or not isinstance(model.peft_config[active[0]], RotMoleConfig):
        raise ModelError(
            f"pruning needs a model with one active RotMoLE adapter; active are {list(active)}"
        )
    return str(active[0])


def _nothing(cuts: Iterable[Cut], similarity: float | None) -> str:
    least = min((min(cut.share_E), cut.path) for cut in cuts)
    alike = "" if similarity is None else f" and no two are alike to {similarity:g}"
    return (
        f"nothing can go: every expert is chosen by some token{alike} (the least used one, in "
        f"{least[1]}, gets {least[0]:.2%} of the choices). --similarity below 1 merges experts "
        "that are alike."
    )


def _inputs(model: PeftModel, batch: Batch) -> dict[str, Any]:
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask")
    return {name: batch[name].to(device) for name in names} | {"use_cache": False}


def _shown(batches: Sequence[Batch], what: str, show: Show | None) -> Iterable[Batch]:
    for done, batch in enumerate(batches, 1):
        yield batch
        if show is not None:
            show(what, done, len(batches))


def _size(model: PeftModel, adapter: str) -> int:
    layers = [m for m in model.modules() if isinstance(m, RotMoleLayer)]
    return sum(
        p.numel()
        for layer in layers
        if adapter in layer.rotmole_experts
        for p in layer.experts(adapter).parameters()
    )


# What changes


def _difference(
    model: PeftModel, adapter: str, batches: Sequence[Batch], progress: Show | None
) -> Difference:
    kl = largest = logit = 0.0
    tokens, hidden_L = 0, torch.zeros(0)
    with evaluating(model):
        for batch in _shown(batches, "differences", progress):
            outputs = []
            for name in (adapter, PRUNED):
                model.set_adapter(name)
                outputs.append(_outputs(model, batch))
            (before_NV, states), (after_NV, new_states) = outputs
            # the rounding of float32 would be 1e-8 nats where nothing changed
            p_NV, q_NV = (x.log_softmax(-1, dtype=torch.float64) for x in (before_NV, after_NV))
            kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1).clamp(min=0)
            if len(kl_N):
                kl += float(kl_N.sum())
                largest = max(largest, float(kl_N.max()))
                logit = max(logit, float((before_NV - after_NV).abs().max()))
            tokens += len(kl_N)
            now_L = torch.stack([_relative(a, b) for a, b in zip(states, new_states, strict=True)])
            hidden_L = torch.maximum(hidden_L, now_L) if len(hidden_L) else now_L
    return Difference(kl / max(tokens, 1), largest, logit, tuple(hidden_L.tolist()), tokens)


def _outputs(model: PeftModel, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Return the logits [N, V] of the learnt tokens, and each layer's output of all tokens."""
    inputs = _inputs(model, batch) | {"output_hidden_states": True}
    device = inputs["input_ids"].device
    learnt_BT = (batch["labels"][:, 1:] != IGNORED).to(device)
    places = learnt_BT.any(0).nonzero()[:, 0]
    if accepts_logits_to_keep(model):
        outputs = model(**inputs, logits_to_keep=places)
        logits = outputs.logits
    else:
        outputs = model(**inputs)
        logits = outputs.logits[:, places]
    kept_BT = inputs["attention_mask"].bool()
    states = [state[kept_BT].float() for state in outputs.hidden_states[1:]]
    return logits[learnt_BT[:, places]].float(), states


def _relative(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    length_T = before_TD.norm(dim=-1).clamp(min=1e-30)
    return ((after_TD - before_TD).norm(dim=-1) / length_T).max().cpu()
