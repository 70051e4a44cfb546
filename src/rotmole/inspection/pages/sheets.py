"""Tables of a report: every number as text, with a shade where a column of numbers is a map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rotmole.inspection.inspection import ALL, Inspection, Layer, TokenRouting
from rotmole.inspection.usage import GROUP

SHADES = 9
"""Shades of a cell: 0 is none, 9 the strongest."""
MOST_LAYERS, MOST_EXPERTS, MOST_LINES = 12, 16, 1200
"""What is shown: layers of a table, experts of a matrix or of a token, lines of tokens in all."""
ALL_TOKENS = "all tokens"


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: its number.
        shade: 0 to SHADES, a second way to see the number.
    """

    text: str
    shade: int = 0


Line = tuple[Cell, ...]


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        caption: what its numbers are.
        head: name of each column; the first column names the lines.
        lines: below it.
    """

    caption: str
    head: tuple[str, ...]
    lines: tuple[Line, ...]


def percent(value: float | None) -> str:
    """Return a share as text.

    >>> percent(0.9843), percent(0.00213), percent(None)
    ('98 %', '0.2 %', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1%}".replace("%", " %") if 0 < abs(value) < 0.0995 else f"{100 * value:.0f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as text, "-" if it is unknown."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def shade(value: float | None, most: float = 1.0) -> int:
    """Return how strongly a number is shaded.

    >>> shade(0.5), shade(2.0), shade(None)
    (5, 9, 0)
    """
    if value is None or not math.isfinite(value) or most <= 0:
        return 0
    return min(SHADES, math.floor(SHADES * abs(value) / most + 0.5))


def shares(values: Iterable[float | None], most: float = 1.0) -> Line:
    """Return cells of shares, shaded."""
    return tuple(Cell(percent(value), shade(value, most)) for value in values)


def numbers(values: Iterable[float | None], most: float | None = None, digits: int = 2) -> Line:
    """Return cells of numbers, shaded if the largest one is given."""
    return tuple(
        Cell(number(value, digits), 0 if most is None else shade(value, most)) for value in values
    )


def name_of(layer: Layer) -> str:
    """Return how a layer is called where there is little room.

    >>> name_of(Layer("model.layers.3.self_attn.q_proj", "q_proj", 3, 4, 8, 2, "none"))
    '3 q_proj'
    """
    return layer.path if layer.depth is None else f"{layer.depth} {layer.module}"


def by_depth(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Return layers by the number of their block; those without one by their own path."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.path if layer.depth is None else str(layer.depth), []).append(layer)
    return groups


Parts = dict[str, tuple[str, ...]]
"""Name of a part of the tokens -> names of the usages that it is made of."""


def _tasks_and_groups(inspection: Inspection) -> tuple[Parts, Parts]:
    """Return the tasks, and the groups over all tasks; neither if there is only one."""
    names = dict.fromkeys(n for layer in inspection.layers for n in layer.usage if n != ALL)
    tasks: Parts = {}
    groups: Parts = {}
    for name in names:
        task, _, group = name.rpartition(GROUP)
        tasks[task or name] = (*tasks.get(task or name, ()), name)
        if task:
            groups[group] = (*groups.get(group, ()), name)
    return (tasks if len(tasks) > 1 else {}), (groups if len(groups) > 1 else {})


def parts_of(inspection: Inspection) -> Parts:
    """Return the tasks, then the groups such as languages; all tokens if there is one part."""
    tasks, groups = _tasks_and_groups(inspection)
    both = tasks | {g if g not in tasks else f"group {g}": keys for g, keys in groups.items()}
    return both or {ALL_TOKENS: (ALL,)}


def tasks_of(inspection: Inspection) -> Parts:
    """Return parts without a token in common: the tasks, else the groups, else all tokens."""
    tasks, groups = _tasks_and_groups(inspection)
    return tasks or groups or {ALL_TOKENS: (ALL,)}


def used(layer: Layer, names: Iterable[str] = (ALL,)) -> list[float] | None:
    """Return each expert's part of what a layer does for some tokens; the parts add up to 1.

    That is its share of the choices or, if every token uses every expert, of the weights. None if
    no token came by.
    """
    usages = [layer.usage[name] for name in names if name in layer.usage]
    if layer.top_k < layer.num_experts:
        sums = [float(sum(each)) for each in zip(*(use.choices for use in usages), strict=True)]
    else:
        known = [[use.tokens * share for share in use.part or use.share] for use in usages]
        sums = [sum(each) for each in zip(*known, strict=True)]
    return [each / sum(sums) for each in sums] if sum(sums) > 0 else None


def grid(inspection: Inspection, caption: str, cells: Mapping[str, Cell]) -> Sheet:
    """Return a table with a line for each block of the model and a column for each module.

    Args:
        inspection: whose layers are shown.
        caption: of the table.
        cells: path of a layer -> its cell; layers without one stay empty.
    """
    known = [layer for layer in inspection.layers if layer.path in cells]
    modules = tuple(dict.fromkeys(layer.module for layer in known))
    lines = []
    for name, group in by_depth(known).items():
        places = {layer.module: cells[layer.path] for layer in reversed(group)}
        lines.append((Cell(name), *(places.get(module, Cell("")) for module in modules)))
    return Sheet(caption, ("layer", *modules), tuple(lines))


def usage_grid(inspection: Inspection) -> Sheet:
    """Return how much the most used expert of each layer is used."""
    cells = {}
    layers = routed_layers(inspection)
    for layer in layers:
        share = used(layer)
        if share is not None:
            best = max(range(len(share)), key=share.__getitem__)
            cells[layer.path] = Cell(f"{percent(share[best])} ({best})", shade(share[best]))
    even = dict.fromkeys(percent(1 / layer.num_experts) for layer in layers)
    caption = (
        "Share of the most used expert of each layer, in brackets which one; even use is "
        f"{' or '.join(even)}"
    )
    return grid(inspection, caption, cells)


def affinity_grids(inspection: Inspection) -> list[Sheet]:
    """Return how much the task, and the group, of a token says about its expert."""
    sheets = []
    for part in ("task", "group"):
        cells = {
            layer.path: Cell(percent(known.share), shade(known.share))
            for layer in inspection.layers
            if (known := layer.affinity.get(part)) is not None
        }
        caption = f"How much a token's {part} says about its expert: 0 % is chance, 100 % all"
        if cells:
            sheets.append(grid(inspection, caption, cells))
    return sheets


def routed_layers(inspection: Inspection) -> list[Layer]:
    """Return the layers in which tokens were shared out among experts."""
    return [layer for layer in inspection.layers if layer.usage and layer.num_experts > 1]


def chosen_layers(inspection: Inspection) -> list[Layer]:
    """Return the layers for which there is room: all, or those that most is to be said of.

    Layers of verdicts come first, then those in which the task says most about the expert.
    """
    routed = routed_layers(inspection)
    if len(routed) <= MOST_LAYERS:
        return routed
    named = list(dict.fromkeys(path for v in inspection.verdicts for path in v.layers[:3]))
    ranks = {path: place for place, path in enumerate(named)}

    def worth(layer: Layer) -> tuple[int, float]:
        most = max((known.share for known in layer.affinity.values()), default=0.0)
        return ranks.get(layer.path, len(ranks)), -most

    chosen = {layer.path for layer in sorted(routed, key=worth)[:MOST_LAYERS]}
    return [layer for layer in routed if layer.path in chosen]


def usage_by_part(inspection: Inspection) -> dict[str, Sheet]:
    """Return part of the tokens -> each expert's share of the choices by layer."""
    layers, sheets = chosen_layers(inspection), {}
    for part, names in parts_of(inspection).items():
        lines = [
            (Cell(name_of(layer)), *shares(found))
            for layer in layers
            if (found := used(layer, names)) is not None
        ]
        if lines:
            length = max(map(len, lines))
            sheets[part] = Sheet(
                f"Share of each expert by layer: {part}",
                ("layer", *(f"expert {e}" for e in range(length - 1))),
                tuple(_filled(line, length) for line in lines),
            )
    return sheets


def _filled(line: Line, length: int) -> Line:
    return line + (Cell(""),) * (length - len(line))


def routing(inspection: Inspection) -> Sheet | None:
    """Return weights, entropies and pairs of the chosen layers, over all tokens."""
    lines = []
    for layer in chosen_layers(inspection):
        use = layer.usage.get(ALL)
        if use is None:
            continue
        E = layer.num_experts
        pairs = [(use.together[i][j], i, j) for i in range(E) for j in range(i)]
        share, i, j = max(pairs, default=(None, 0, 0))
        weights = [weight for weight in use.weight if weight is not None]
        spread = f"{min(weights):.2f} to {max(weights):.2f}" if weights else "-"
        unused = sum(count == 0 for count in use.choices)
        top = Cell(percent(max(use.top)), shade(max(use.top)))
        pair = f"{percent(share)} ({j} and {i})" if share is not None else "-"
        even = None if use.entropy is None or E < 2 else use.entropy / math.log(E)
        lines.append((
            Cell(name_of(layer)), top, Cell(spread), Cell(percent(even), shade(even)), Cell(pair),
            Cell(str(unused)),
        ))  # fmt: skip
    head = ("layer", "first", "weights", "entropy", "pair", "unused")
    caption = (
        "Over all tokens: how often one expert has the largest weight, the experts' mean weights "
        "if selected, entropy of the router in % of the largest, the pair most often together, "
        "experts unused"
    )
    return Sheet(caption, head, tuple(lines)) if lines else None


def most_alike(inspection: Inspection) -> Layer | None:
    """Return the layer in which two experts are most alike."""
    known = [x for x in inspection.layers if x.experts is not None and x.num_experts > 1]

    def largest(layer: Layer) -> float:
        assert layer.experts is not None
        table = layer.experts.cosine
        return max(abs(table[i][j]) for i in range(len(table)) for j in range(i))

    return max(known, key=largest, default=None)


def similarity(inspection: Inspection) -> Sheet | None:
    """Return the cosines between the experts of the layer in which two are most alike."""
    layer = most_alike(inspection)
    if layer is None or layer.experts is None:
        return None
    table = layer.experts.cosine
    closest = {e: max(abs(v) for i, v in enumerate(line) if i != e) for e, line in enumerate(table)}
    shown = sorted(sorted(closest, key=closest.__getitem__)[-MOST_EXPERTS:])
    lines = tuple((Cell(f"expert {e}"), *numbers((table[e][i] for i in shown), 1.0)) for e in shown)
    caption = f"Cosines between experts of layer {name_of(layer)}, in which two are most alike"
    if len(shown) < len(table):
        caption += f": {len(shown)} of {len(table)} experts"
    return Sheet(caption, ("", *(f"expert {e}" for e in shown)), lines)


def expert_sizes(inspection: Inspection) -> Sheet | None:
    """Return size and drift of every expert of the chosen layers."""
    chosen = chosen_layers(inspection) or inspection.layers[:MOST_LAYERS]
    known = [(layer, layer.experts) for layer in chosen if layer.experts is not None]
    if not known:
        return None
    pairs = [pair for _, each in known for pair in zip(each.norm, each.drift, strict=True)]
    from_zero = all(drift is not None and math.isclose(norm, drift) for norm, drift in pairs)
    lines, most = [], max(layer.num_experts for layer, _ in known)
    for layer, each in known:
        texts = [
            percent(norm) + ("" if from_zero else f" ({percent(drift)})")
            for norm, drift in zip(each.norm, each.drift, strict=True)
        ]
        cells = (Cell(name_of(layer)), Cell(number(each.router_drift)), *map(Cell, texts))
        lines.append(_filled(cells, most + 2))
    moved = "they started at zero" if from_zero else "in brackets how far it is from its start"
    caption = f"Size of each expert's map relative to the base weight; {moved}"
    head = ("layer", "router moved", *(f"expert {e}" for e in range(most)))
    return Sheet(caption, head, tuple(lines))


def tokens(names: Sequence[str], found: TokenRouting, caption: str, most: int) -> Sheet:
    """Return each token with its experts' weights and angles.

    Args:
        names: text of each token.
        found: their routing.
        caption: which layer it is of.
        most: tokens that are shown.
    """
    experts = len(found.weight[0]) if found.weight else 0
    every = range(experts)
    lines = []
    for place, name in enumerate(names[:most]):
        weights = found.weight[place]
        if experts <= MOST_EXPERTS:
            cells = [_token_cell(found, place, e) for e in every]
        else:
            first = sorted(every, key=weights.__getitem__, reverse=True)[:MOST_EXPERTS]
            cells = [_token_cell(found, place, e, f"{e}: ") for e in first]
        lines.append((Cell(shown(name)), *cells))
    if len(names) > most:
        caption += f"; {len(names) - most:,} further tokens are in inspect.json"
    heads = (
        [f"expert {e}" for e in every] if experts <= MOST_EXPERTS
        else [f"expert and weight {n + 1}" for n in range(MOST_EXPERTS)]
    )  # fmt: skip
    return Sheet(caption, ("token", *heads), tuple(lines))


def _token_cell(found: TokenRouting, place: int, expert: int, prefix: str = "") -> Cell:
    weight = found.weight[place][expert]
    if weight == 0:
        return Cell("")
    angle = "" if found.angle is None else f" at {found.angle[place][expert]:.2f}"
    return Cell(f"{prefix}{percent(weight)}{angle}", shade(weight))


def shown(token: str) -> str:
    r"""Return the text of a token with its spaces and line ends made visible.

    >>> shown(" a\n")
    '·a⏎'
    """
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "(empty)"
