"""The diagnosis: what an inspection found, as sentences with their rules and with advice.

RULES is the table of all of them. A rule holds for places: a layer, a task, some experts. Each rule
that holds somewhere gives one verdict, which names the worst place first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from rotmole.inspection.inspection import ALL, Inspection, Layer, Usage, Verdict
from rotmole.inspection.pages.sheets import name_of, percent
from rotmole.inspection.usage import GROUP

SHOWN = 3
"""Places that a sentence names."""
ENOUGH = 50
"""Choices, or choices that even use would give an expert, below which nothing is said of it."""


class Place(NamedTuple):
    """Where a rule holds.

    Attributes:
        value: the number that the rule compares.
        words: the place and what is the case there.
        layer: its path; "" for the whole adapter.
        task: for which it holds; None for all.
        experts: for which it holds.
    """

    value: float
    words: str
    layer: str = ""
    task: str | None = None
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One thing that can be the case.

    Attributes:
        name: of it.
        words: when it is said, with the threshold in place of {}.
        threshold: of the number that is compared.
        advice: what to do.
        find: (inspection, threshold) -> where it is the case.
        worst: whether the largest (max) or the smallest (min) number is the worst.
        is_fault: whether something should be changed.
        head: first words of the sentence; {n} is the number of places, {of} that of all layers.
    """

    name: str
    words: str
    threshold: float
    advice: str
    find: Callable[[Inspection, float], Iterator[Place]]
    head: str
    worst: Callable[..., Place] = max
    is_fault: bool = True

    def verdict(self, inspection: Inspection) -> Verdict | None:
        """Return the verdict, None if the rule holds nowhere."""
        places = list(self.find(inspection, self.threshold))
        if not places:
            return None
        places.sort(key=lambda place: place.value, reverse=self.worst is max)
        layers = tuple(dict.fromkeys(place.layer for place in places if place.layer))
        named = "; ".join(place.words for place in places[:SHOWN])
        more = len(places) - SHOWN
        head = self.head.format(n=len(layers), of=len(inspection.layers), places=len(places))
        return Verdict(
            name=self.name,
            sentence=f"{head}{named}{f'; and {more} more' if more > 0 else ''}.",
            rule=self.words.format(f"{self.threshold:g}"),
            threshold=self.threshold,
            value=places[0].value,
            advice=self.advice,
            is_fault=self.is_fault,
            layers=layers,
            task=places[0].task,
            experts=places[0].experts,
        )


def diagnose(inspection: Inspection) -> tuple[Verdict, ...]:
    """Return a verdict for each rule that holds, in the order of RULES: faults first."""
    verdicts = [rule.verdict(inspection) for rule in RULES]
    return tuple(verdict for verdict in verdicts if verdict is not None)


def _is_dead(layer: Layer) -> bool:
    effects = layer.effects.get(ALL)
    return effects is not None and effects.added < DEAD_LAYER


def _alive(inspection: Inspection) -> Iterator[Layer]:
    yield from (layer for layer in inspection.layers if not _is_dead(layer))


def _routed(inspection: Inspection) -> Iterator[tuple[Layer, Usage]]:
    """Yield the layers with several experts that add something, and their usage by all tokens."""
    for layer in _alive(inspection):
        usage = layer.usage.get(ALL)
        if layer.num_experts > 1 and usage is not None and sum(usage.choices):
            yield layer, usage


def _numbers(experts: Sequence[int]) -> str:
    return f"expert{'' if len(experts) == 1 else 's'} {', '.join(map(str, experts))}"


def _dead_layers(inspection: Inspection, threshold: float) -> Iterator[Place]:
    for layer in inspection.layers:
        effects = layer.effects.get(ALL)
        if effects is None and layer.usage:  # of a block-routed block
            continue
        if effects is None:
            yield Place(0.0, f"{name_of(layer)} is never called", layer.path)
        elif effects.added < threshold:
            words = f"{name_of(layer)} adds {effects.added:.2g} of its output's length"
            yield Place(effects.added, words, layer.path)


def _top(usage: Usage, layer: Layer) -> tuple[float, tuple[int, ...], str]:
    """Return the share of the most used K experts, which they are, and of what the share is."""
    selects = layer.top_k < layer.num_experts
    shares, what = (usage.share, "choices") if selects else (usage.part, "weight")
    count = layer.top_k if selects else 1
    first = sorted(range(len(shares)), key=lambda e: -shares[e])[:count]
    return sum(shares[e] for e in first), tuple(sorted(first)), what


def _collapsed(inspection: Inspection, threshold: float) -> Iterator[Place]:
    for layer, usage in _routed(inspection):
        if usage.tokens < ENOUGH:
            continue
        share, first, what = _top(usage, layer)
        if share >= threshold:
            even = len(first) / layer.num_experts
            words = (
                f"{name_of(layer)}: {_numbers(first)} of {layer.num_experts} "
                f"{'has' if len(first) == 1 else 'have'} {percent(share)} of the {what}, where "
                f"even use is {percent(even)}"
            )
            yield Place(share, words, layer.path, experts=first)


def _dead_experts(inspection: Inspection, threshold: float) -> Iterator[Place]:
    gone = {place.layer for place in _collapsed(inspection, COLLAPSED)}
    for layer, usage in _routed(inspection):
        even = sum(usage.choices) / layer.num_experts
        if layer.path in gone or even < ENOUGH:
            continue
        dead = tuple(e for e, count in enumerate(usage.choices) if count < threshold * even)
        if dead:
            least = min(usage.choices[e] for e in dead)
            words = (
                f"{name_of(layer)}: {_numbers(dead)} of {layer.num_experts}, selected by "
                f"{least} of {usage.tokens:,} tokens"
            )
            yield Place(least / even, words, layer.path, experts=dead)


def _still_routers(inspection: Inspection, threshold: float) -> Iterator[Place]:
    for layer in _alive(inspection):
        drift = None if layer.experts is None else layer.experts.router_drift
        if drift is not None and drift < threshold:
            words = f"{name_of(layer)}: its entries moved by {percent(drift)} of their start"
            yield Place(drift, words, layer.path)


def _idle_rotations(inspection: Inspection, threshold: float) -> Iterator[Place]:
    for layer in _alive(inspection):
        effects = layer.effects.get(ALL)
        if layer.rotation == "none" or effects is None or effects.rotation_off is None:
            continue
        if effects.rotation_off < threshold:
            angle = _mean_angle(layer)
            turned = (
                "" if angle is None else f", and tokens are turned by {angle:.2g} rad on average"
            )
            words = (
                f"{name_of(layer)}: without rotation what it adds changes by "
                f"{percent(effects.rotation_off)}{turned}"
            )
            yield Place(effects.rotation_off, words, layer.path)


def _mean_angle(layer: Layer) -> float | None:
    usage = layer.usage.get(ALL)
    if usage is None or usage.angles is None:
        return None
    pairs = [(mean, n) for mean, n in zip(usage.angles.mean, usage.choices, strict=True)
             if mean is not None]  # fmt: skip
    count = sum(n for _, n in pairs)
    return sum(mean * n for mean, n in pairs) / count if count else None


def _one_plane(inspection: Inspection, threshold: float) -> Iterator[Place]:
    idle = {place.layer for place in _idle_rotations(inspection, IDLE)}
    for layer in _alive(inspection):
        usage = layer.usage.get(ALL)
        if usage is None or usage.angles is None or usage.angles.plane is None:
            continue
        if layer.rank <= 2 or layer.path in idle:  # rank 2 has one plane only
            continue
        planes = usage.angles.plane
        alike = tuple(
            e for e, plane in enumerate(planes)
            if plane is not None and plane >= threshold and usage.choices[e] >= ENOUGH
        )  # fmt: skip
        used = [e for e, plane in enumerate(planes)
                if plane is not None and usage.choices[e] >= ENOUGH]  # fmt: skip
        if alike and len(alike) == len(used):
            least = min(planes[e] or 0.0 for e in alike)
            words = f"{name_of(layer)}: {percent(least)} of the turning of {_numbers(alike)}"
            yield Place(least, words, layer.path, experts=alike)


def _duplicates(inspection: Inspection, threshold: float) -> Iterator[Place]:
    for layer in _alive(inspection):
        experts = layer.experts
        if experts is None:
            continue
        for i, j in combinations(range(layer.num_experts), 2):
            alike = experts.alike[i][j]
            if alike >= threshold:
                words = f"{name_of(layer)}: experts {i} and {j} are alike to {alike:.3f}"
                yield Place(alike, words, layer.path, experts=(i, j))


def _one_lora(inspection: Inspection, threshold: float) -> Iterator[Place]:
    static = inspection.static
    mixes = any(x.num_experts > 1 or x.rotation != "none" for x in inspection.layers)
    if static is None or not mixes or not static.power[1] > 0:
        return
    for rank, share in zip(static.ranks, static.held_out, strict=True):
        if share >= threshold:
            words = (
                f"{math.floor(100 * share)} % of what this adapter adds on held-out tokens is a "
                f"static map of rank {rank}: a LoRA of rank {rank} would do"
            )
            yield Place(share, words)
            return


def _turned_tasks(inspection: Inspection, threshold: float) -> Iterator[Place]:
    """Find experts that turn the tokens of one task or group farther than those of all others."""
    for layer in _alive(inspection):
        for e in range(layer.num_experts):
            best = max(
                (_apart(layer, e, part) for part in ("group", "task", "both")),
                key=lambda found: found[0],
            )
            more, means = best
            if more < threshold:
                continue
            first, second = sorted(means, key=lambda name: -means[name])[:2]
            rest = ", the rest less" if len(means) > 2 else ""
            words = (
                f"{name_of(layer)}: expert {e} turns the tokens of {first} by "
                f"{_degrees(means[first])} on average, those of {second} by "
                f"{_degrees(means[second])}{rest}"
            )
            yield Place(more, words, layer.path, first, (e,))


def _apart(layer: Layer, e: int, part: str) -> tuple[float, dict[str, float]]:
    """Return how far the largest mean |angle| of an expert is above the second, and all means.

    0 if it is not even twice the second.
    """
    sums: dict[str, tuple[float, int]] = {}
    for key, usage in _by(layer, part):
        mean = None if usage.angles is None else usage.angles.mean[e]
        if mean is not None:
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + mean * usage.choices[e], count + usage.choices[e])
    means = {key: total / count for key, (total, count) in sums.items() if count >= ENOUGH}
    if len(means) < 2:
        return 0.0, means
    first, second = sorted(means.values(), reverse=True)[:2]
    return (first - second if first >= 2 * second else 0.0), means


def _by(layer: Layer, part: str) -> Iterator[tuple[str, Usage]]:
    """Yield the usage of each task by its "task", its "group" such as a language, or "both"."""
    for name, usage in layer.usage.items():
        head, _, group = name.rpartition(GROUP)
        key = {"task": head or name, "group": group if head else "", "both": name}[part]
        if name != ALL and key:
            yield key, usage


def _degrees(angle: float) -> str:
    return f"{angle:.2f} rad ({math.degrees(angle):.0f} degrees)"


def _affinities(inspection: Inspection, threshold: float) -> Iterator[Place]:
    for layer, _ in _routed(inspection):
        known = {part: found for part, found in layer.affinity.items()
                 if found.information > found.limit and found.share >= threshold}  # fmt: skip
        if not known:
            continue
        part = max(known, key=lambda name: known[name].share)
        shares = _shares_by(layer, part)
        task, e, least = _strongest(shares)
        words = (
            f"{name_of(layer)}: the {part} says {percent(known[part].share)} of what there is to "
            f"say about the expert; expert {e} gets {percent(shares[task][e])} of the choices of "
            f"{task}, {percent(least)} of those of the others"
        )
        yield Place(known[part].share, words, layer.path, task, (e,))


def _shares_by(layer: Layer, part: str) -> dict[str, list[float]]:
    """Return the share of choices of each expert, by task or by group over all tasks."""
    choices: dict[str, list[int]] = {}
    for key, usage in _by(layer, part):
        before = choices.get(key, [0] * layer.num_experts)
        choices[key] = [a + b for a, b in zip(before, usage.choices, strict=True)]
    return {key: [n / max(sum(each), 1) for n in each] for key, each in choices.items()}


def _strongest(shares: dict[str, list[float]]) -> tuple[str, int, float]:
    """Return the task and expert that lean most to each other, and the others' mean share."""

    def others(task: str, e: int) -> float:
        rest = [each[e] for name, each in shares.items() if name != task]
        return sum(rest) / max(len(rest), 1)

    pairs = [(task, e) for task, each in shares.items() for e in range(len(each))]
    task, e = max(pairs, key=lambda pair: shares[pair[0]][pair[1]] - others(*pair))
    return task, e, others(task, e)


DEAD_LAYER, COLLAPSED, IDLE = 1e-4, 0.99, 0.01

RULES = (
    Rule(
        "dead layer",
        "|what the layer's adapter adds| < {} |the layer's output|, root mean squares over tokens",
        DEAD_LAYER,
        "No gradient may reach the layer: see whether it is frozen or unused, and whether its "
        "learning rate is 0; else leave it out of target_modules.",
        _dead_layers,
        "dead layers, {n} of {of}: ",
        worst=min,
    ),
    Rule(
        "collapsed",
        "as many experts as a token selects take at least {} of all choices (of the weight, if "
        "every token uses every expert)",
        COLLAPSED,
        "Train again with adapter.router_aux_loss_coef (0.01 is usual) or a smaller "
        "optimizer.scaling_gate_lr; or cut what is unused with rotmole prune.",
        _collapsed,
        "collapsed in {n} of {of} layers: ",
    ),
    Rule(
        "dead expert",
        "an expert gets under {} of the choices that even use would give it",
        0.005,
        "Train again with adapter.router_aux_loss_coef (0.01 is usual), or cut them with rotmole "
        "prune, which changes nothing on these tokens.",
        _dead_experts,
        "dead experts in {n} of {of} layers: ",
        worst=min,
    ),
    Rule(
        "router that never moved",
        "mean movement of a router's entries < {} of the bound they started within (estimated by "
        "how many lie outside it)",
        0.01,
        "It routes as it was drawn. Raise optimizer.scaling_gate_lr; with top_k 1 and "
        "norm_topk_prob a router has no gradient at all.",
        _still_routers,
        "the router never moved in {n} of {of} layers: ",
        worst=min,
    ),
    Rule(
        "rotation that does nothing",
        "|change of what is added, without rotation| < {} |what is added|",
        IDLE,
        "Raise optimizer.rotation_gate_lr or train longer; if nothing helps, rotation: none is as "
        "good and cheaper.",
        _idle_rotations,
        "the rotation does nothing in {n} of {of} layers: ",
        worst=min,
    ),
    Rule(
        "planes all alike",
        "every expert of the layer does at least {} of its turning in one plane",
        0.99,
        "The plane does not depend on the token, so rotation: givens with rotation_planes: 1 would "
        "do as well with fewer parameters.",
        _one_plane,
        "all tokens are turned in one plane in {n} of {of} layers: ",
    ),
    Rule(
        "duplicate experts",
        "2 <P_i, P_j> / (|P_i|^2 + |P_j|^2) >= {}, P = A^T B, and the same of their rotation gates",
        0.95,
        "One of them is enough: rotmole prune --similarity 0.95 makes them one.",
        _duplicates,
        "duplicate experts in {n} of {of} layers: ",
    ),
    Rule(
        "mixture that is one LoRA",
        "the static LoRA of some rank explains at least {} of the power of what is added, on rows "
        "that it was not fitted on",
        0.95,
        "See rotmole export --lora, which writes that LoRA and says what it loses.",
        _one_lora,
        "",
    ),
    Rule(
        "task turned alone",
        "an expert's mean |angle| for one task, or group such as a language, is at least {} rad "
        "above that for any other, and at least twice that",
        0.5,
        "The expert serves this task in another direction; rotation is used. Nothing to mend.",
        _turned_tasks,
        "one task is turned apart in {n} of {of} layers: ",
        is_fault=False,
    ),
    Rule(
        "task-expert affinity",
        "mutual information of task (or group) and expert, above chance, >= {} of the most it can "
        "be",
        0.2,
        "The experts have specialised. Nothing to mend; rotmole eval says whether it helps.",
        _affinities,
        "experts follow the task in {n} of {of} layers: ",
        is_fault=False,
    ),
)
