"""What training shows of a log: how evenly experts are used, how far they turn; in words too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rotmole.recording.log import RoutingLog
from rotmole.recording.statistics import LayerStatistics, TaskStatistics

FIGURES = (
    "experts_unused", "experts_total", "largest_expert_share", "largest_expert_share_mean",
    "expert_share_even", "expert_share_ceiling", "rotation_angle",
)  # fmt: skip
SHARE = "expert_share/"
"""How the names of the figures of single experts begin; the name of the expert follows."""
COLLAPSED = 0.99
"""Share of a layer's choices that its K most chosen experts take when it has collapsed."""


def usage_figures(layers: Mapping[str, LayerStatistics]) -> dict[str, float]:
    """Return how evenly experts are used, over the layers in which tokens choose among more.

    experts_unused, experts_total: (layer, expert) pairs that no token chose, and all of them.
    largest_expert_share: the most chosen expert's share of a layer's choices, the largest of all
        layers; largest_expert_share_mean: the mean of the layers.
    expert_share_even, expert_share_ceiling: what that share is at best, 1/E, and at most, 1/K, in
        the layer where it is largest.
    rotation_angle: mean of |angle| over the choices of all layers with a rotation, in radians.

    What has no layer to stand on is left out.
    """
    totals = {path: layer.total() for path, layer in layers.items()}
    figures = _evenness({p: totals[p] for p, layer in layers.items() if chooses(layer)}, layers)
    turned = [total.rotation for total in totals.values() if total.rotation is not None]
    angles = sum(float(rotation.absolute_E.sum()) for rotation in turned)
    count = sum(int(rotation.count_E.sum()) for rotation in turned)
    return figures | ({"rotation_angle": angles / count} if count else {})


def _evenness(
    totals: Mapping[str, TaskStatistics], layers: Mapping[str, LayerStatistics]
) -> dict[str, float]:
    if not totals:
        return {}
    choices = {path: total.choices_E.tolist() for path, total in totals.items()}
    shares = {path: max(count) / sum(count) for path, count in choices.items() if sum(count)}
    figures: dict[str, float] = {
        "experts_unused": sum(chosen == 0 for count in choices.values() for chosen in count),
        "experts_total": sum(map(len, choices.values())),
    }
    if not shares:
        return figures
    most = max(shares, key=lambda path: shares[path])
    return figures | {
        "largest_expert_share": shares[most],
        "largest_expert_share_mean": sum(shares.values()) / len(shares),
        "expert_share_even": 1 / len(choices[most]),
        "expert_share_ceiling": 1 / layers[most].top_k,
    }


def chooses(layer: LayerStatistics) -> bool:
    """Tell whether tokens choose a fixed number of experts among more, by its own router."""
    return layer.has_router and layer.selection == "top_k" and layer.top_k < layer.experts


def collapsed_layers(layers: Mapping[str, LayerStatistics]) -> list[str]:
    """Return the layers whose K most chosen experts took 99 % of all choices."""
    collapsed = []
    for path, layer in layers.items():
        choices = sorted(layer.total().choices_E.tolist(), reverse=True)
        taken, whole = sum(choices[: layer.top_k]), sum(choices)
        if chooses(layer) and whole and taken >= COLLAPSED * whole:
            collapsed.append(path)
    return collapsed


def named_shares(
    log: RoutingLog, names: Sequence[str], task: str | None = None
) -> dict[str, float]:
    """Return name -> mean over layers and tokens of g_e / sum_j g_j; {} if nothing was recorded.

    Args:
        log: of a mixture whose experts have names.
        names: of the experts, in order.
        task: whose tokens count; None: all.
    """
    total_E = torch.zeros(len(names), dtype=torch.float64)
    for layer in log.layers.values():
        if layer.has_router and (task is None or task in layer.tasks):
            of_layer = layer.total() if task is None else layer.tasks[task]
            total_E += of_layer.part_E.cpu()
    if not total_E.any():
        return {}
    return dict(zip(names, (total_E / total_E.sum()).tolist(), strict=True))


def in_words(figures: Mapping[str, Any]) -> list[str]:
    """Say the figures of `usage_figures`, and the shares of named experts, with their ceilings.

    >>> in_words({"experts_unused": 3, "experts_total": 480, "largest_expert_share": 0.5,
    ...           "expert_share_even": 0.25, "expert_share_ceiling": 0.5, "rotation_angle": 0.12})
    ... # doctest: +NORMALIZE_WHITESPACE
    ['3 of 480 experts unused',
     'most used expert of any layer 50 % of choices (even 25 %, at most 50 %)',
     'turned by 0.12 rad (at most 3.14)']
    """
    words = []
    if figures.get("experts_unused"):
        words.append(
            f"{figures['experts_unused']:,} of {figures['experts_total']:,} experts unused"
        )
    if "largest_expert_share" in figures:
        most, even, ceiling = (
            f"{100 * figures[name]:.0f} %"
            for name in ("largest_expert_share", "expert_share_even", "expert_share_ceiling")
        )
        words.append(
            f"most used expert of any layer {most} of choices (even {even}, at most {ceiling})"
        )
    if "rotation_angle" in figures:
        words.append(f"turned by {figures['rotation_angle']:.2g} rad (at most {math.pi:.2f})")
    if shares := shares_in_words(figures):
        words.append(shares)
    return words


def shares_in_words(figures: Mapping[str, Any]) -> str:
    """Say how much experts with names are used.

    >>> shares_in_words({"expert_share/math": 0.25, "expert_share/code": 0.75})
    'math 25 %, code 75 %'
    """
    return ", ".join(
        f"{name.removeprefix(SHARE)} {100 * share:.0f} %"
        for name, share in figures.items()
        if name.startswith(SHARE)
    )
