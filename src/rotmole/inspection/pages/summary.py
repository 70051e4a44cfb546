"""An inspection in short, for a terminal of 80 columns: sentences and small tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rotmole.inspection.inspection import (
    ALL,
    Answers,
    Inspection,
    Layer,
    StaticShare,
    TokenRouting,
    Usage,
)
from rotmole.inspection.pages.sheets import number, percent, shown

Lines = list[list[str]]

WIDEST, NAMED = 4, 3
"""Experts that a token's line has columns for; of more it names so many."""
TOKEN = 14
"""Letters of a token that are shown."""
SHADES = " ░▒▓█"


def verdict_lines(inspection: Inspection) -> list[str]:
    """Return the verdict: a line that counts, then each sentence with its rule and advice."""
    faults = sum(verdict.is_fault for verdict in inspection.verdicts)
    others = len(inspection.verdicts) - faults
    counted = f"{faults} thing{'' if faults == 1 else 's'} to mend" if faults else "nothing to mend"
    tokens = sum(inspection.source.tokens.values())
    known = f", {others} worth knowing" if others else ""
    lines = [f"{counted}{known}, as far as {tokens:,} tokens show."]
    for verdict in inspection.verdicts:
        lines += [
            f"{'!' if verdict.is_fault else '-'} {verdict.sentence}",
            f"    rule: {verdict.rule}.",
            f"    {verdict.advice}",
        ]
    return lines


def modules(inspection: Inspection) -> Lines:
    """Return a line for each kind of module, and one for all: use, angles and effects."""
    head = ["module", "layers", "unused", "most used", "angle", "adds", "rot. off", "uniform"]
    kinds: dict[str, list[Layer]] = {}
    for layer in inspection.layers:
        kinds.setdefault(layer.module, []).append(layer)
    lines = [_module(name, layers) for name, layers in kinds.items()]
    if len(kinds) > 1:
        lines.append(_module("all", inspection.layers))
    return [head, *lines]


def _module(name: str, layers: Sequence[Layer]) -> list[str]:
    use = [x.usage[ALL] for x in layers if ALL in x.usage and x.num_experts > 1]
    unused = sum(count == 0 for usage in use for count in usage.choices)
    total = sum(len(usage.choices) for usage in use)
    effects = [x.effects[ALL] for x in layers if ALL in x.effects]
    return [
        name,
        str(len(layers)),
        f"{unused} of {total}" if total else "-",
        percent(max((max(usage.share) for usage in use), default=None)),
        number(mean_angle(x.usage[ALL] for x in layers if ALL in x.usage), 2),
        percent(_mean(each.added for each in effects)),
        percent(_mean(each.rotation_off for each in effects)),
        percent(_mean(each.uniform for each in effects)),
    ]


MODULE_NOTES = (
    "unused: experts that no token selected. most used: largest share of choices of any expert. "
    "angle: mean |angle| in radians. adds: length of what the adapter adds, of the output's. "
    "rot. off, uniform: by how much that changes without rotation, and with equal weights for "
    "all experts. Means over layers.",
)


def mean_angle(usages: Iterable[Usage]) -> float | None:
    """Return the mean |angle| over the choices of several layers; None without any."""
    total, count = 0.0, 0
    for usage in usages:
        if usage.angles is not None:
            for mean, choices in zip(usage.angles.mean, usage.choices, strict=True):
                if mean is not None:
                    total, count = total + mean * choices, count + choices
    return total / count if count else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def static_lines(static: StaticShare) -> Lines:
    """Return which share of what is added a static LoRA explains, rank by rank."""
    parts = (("fitted on", static.calibration), ("held out", static.held_out))
    return [
        ["static share", "tokens", *(f"rank {rank}" for rank in static.ranks[-6:]), "linear"],
        *(
            [name, f"{static.tokens[i]:,}", *(percent(share) for share in shares[-6:]),
             percent(static.linear[i])]
            for i, (name, shares) in enumerate(parts)
        ),
    ]  # fmt: skip


STATIC_NOTES = (
    "static share: part of the power of what the adapter adds that the best static LoRA of a rank "
    "explains. linear: that of the best linear map; the rest is what routing and rotation do.",
)


def answer_lines(answers: dict[str, Answers]) -> Lines:
    """Return what answers cost in nats a token, with parts switched off."""
    return [
        ["nats a token", "tokens", "trained", "rotation off", "uniform", "no adapter"],
        *(
            ["all tasks" if task == ALL else task, f"{a.tokens:,}", number(a.trained, 3),
             number(a.rotation_off, 3), number(a.uniform, 3), number(a.base, 3)]
            for task, a in answers.items()
        ),
    ]  # fmt: skip


def token_lines(tokens: Sequence[str], routing: TokenRouting) -> Lines:
    """Return a line for each token: its experts' weights, shaded, and angles in radians."""
    experts = max((len(row) for row in routing.weight), default=0)
    few = experts <= WIDEST
    head = [f"expert {e}" for e in range(experts)] if few else ["experts of the largest weights"]
    lines = [["token", *head]]
    for i, text in enumerate(tokens):
        row = routing.weight[i]
        angles = None if routing.angle is None else routing.angle[i]
        cells = [_cell(row, angles, e) for e in range(len(row))]
        if not few:
            order = sorted(range(len(row)), key=lambda e: -row[e])[:NAMED]
            cells = ["  ".join(f"{e}: {cells[e]}" for e in order if row[e])]
        lines.append([_token(text), *cells])
    return lines


def _cell(weights: Sequence[float], angles: Sequence[float] | None, e: int) -> str:
    if not weights[e]:
        return ""
    turned = "" if angles is None else f" {angles[e]:+.2f}"
    return f"{shading(weights[e])} {weights[e]:.2f}{turned}"


def shading(weight: float) -> str:
    """Return a letter as dark as a weight is large.

    >>> [shading(weight) for weight in (0.0, 0.1, 0.5, 1.0)]
    [' ', '░', '▒', '█']
    """
    return SHADES[min(math.ceil(4 * weight), 4)] if weight > 0 else " "


def _token(text: str) -> str:
    word = shown(text)
    return word if len(word) <= TOKEN else f"{word[: TOKEN - 1]}…"
