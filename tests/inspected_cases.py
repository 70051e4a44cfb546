"""Records of made-up inspections with known numbers, for tests of figures and of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rotmole.inspection.inspection import (
    ALL,
    Affinity,
    Angles,
    Answers,
    Effects,
    Experts,
    Inspection,
    Layer,
    Passage,
    Reach,
    Source,
    StaticShare,
    TokenRouting,
    Usage,
    Verdict,
)

TASKS = ("dates", "units")
MODULES = ("q_proj", "v_proj")
BINS = 72
RANKS = (1, 2, 4, 8)
LAW = "Share of all choices that went to the most used expert of a layer, at least 0.9"


def made_inspection(
    *,
    layers: int = 4,
    modules: Sequence[str] = MODULES,
    tasks: Sequence[str] = TASKS,
    experts: int = 4,
    rotation: str = "tangent",
    target: str = "runs/made",
    passage: bool = True,
) -> Inspection:
    """A record whose numbers follow from layer, expert and task; see `angle_of` and `share_of`."""
    made = [
        made_layer(depth, module, number, layers, tasks, experts, rotation)
        for depth in range(layers)
        for number, module in enumerate(modules)
    ]
    rotates = rotation != "none"
    answers = {
        task: Answers(0.5, 0.52 if rotates else None, 0.61, 2.5, 400) for task in (*tasks, ALL)
    }
    return Inspection(
        source=Source(
            target=target, model="SmolLM2-135M-Instruct",
            settings={"num_experts": str(experts), "r": "8", "rotation": rotation, "top_k": "2"},
            rows="validation rows of runs/made", tokens=dict.fromkeys(tasks, 2000),
            versions={"torch": "2.13"}, seconds=12.5, curves=curves(tasks),
        ),
        verdicts=(
            Verdict(
                "collapsed", "layer 1 q_proj sends 97 % of all choices to expert 2", LAW, 0.9, 0.97,
                "raise router_aux_loss_coef, or lower num_experts", True,
                ("model.layers.1.self_attn.q_proj",), None, (2,),
            ),
            Verdict(
                "affinity", "task dates prefers expert 0 in 1 of 8 layers", "Information above 0.2",
                0.2, 0.31, "nothing to do", False, ("model.layers.0.self_attn.q_proj",), tasks[0],
                (0,),
            ),
        ),
        layers=tuple(made),
        static=StaticShare(RANKS, (0.5, 0.7, 0.9, 0.98), (0.4, 0.6, 0.8, 0.9), (0.99, 0.91),
                           (3000, 1000), (1.0, 1.0)),
        answers=answers,
        passage=made_passage(made[0].path, experts) if passage else None,
        notes=("The static share was measured on 4,000 tokens.",),
    )  # fmt: skip


def curves(tasks: Sequence[str], shift: float = 0.0) -> dict[str, tuple[tuple[float, float], ...]]:
    """Training loss "" and validation losses: 2 / (1 + update / 50), a step more for each task."""
    updates = (0, 50, 100, 150)
    return {
        name: tuple((float(u), 2 / (1 + u / 50) + number + shift) for u in updates)
        for number, name in enumerate(("", *tasks))
    }


def angle_of(depth: int, module: int, expert: int, task: int) -> float:
    """Middle of the bin in which all angles of this expert lie: known, and different for each."""
    step = 2 * math.pi / BINS
    return ((depth % 4) * 4 + task * 2 + expert + module + 0.5) * step


def share_of(depth: int, expert: int, task: int, experts: int) -> float:
    """Share of the choices: most go to one expert, which moves with depth and task."""
    return 0.7 if expert == (depth + task) % experts else 0.3 / (experts - 1)


def made_layer(
    depth: int, module: str, number: int, layers: int, tasks: Sequence[str], experts: int,
    rotation: str,
) -> Layer:  # fmt: skip
    """One layer of the record."""
    rotates = rotation != "none"
    usage = {
        task: made_usage(depth, number, [index], experts, rotates)
        for index, task in enumerate(tasks)
    }
    usage[ALL] = made_usage(depth, number, range(len(tasks)), experts, rotates)
    grid = np.linspace(0, 1, 3)
    v1, v2 = np.array([1.0, 0.0]), np.array([0.3, 0.8])
    scaled = [tuple(map(float, a * v1 + b * v2)) for a in grid for b in grid]
    around = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    turned = [(1.9 * math.cos(t), 1.6 * math.sin(t)) for t in around]
    off = 0.01 * (depth + 1) if rotates else None
    effects = {task: Effects(0.1 + 0.01 * depth, off, 0.02 * (depth + 1)) for task in (*tasks, ALL)}
    cosine = np.eye(experts) + 0.1 * (depth + 1) / layers * (1 - np.eye(experts))
    return Layer(
        path=f"model.layers.{depth}.self_attn.{module}", module=module, depth=depth,
        num_experts=experts, rank=8, top_k=2, rotation=rotation, usage=usage,
        affinity={"task": Affinity(0.05 * (depth + 1), 0.01, 0.69)} if len(tasks) > 1 else {},
        experts=Experts(
            norm=tuple(0.01 * (e + 1) for e in range(experts)),
            drift=tuple(0.005 * (e + 1) for e in range(experts)),
            cosine=rows(cosine), alike=rows(cosine), input_angle=rows(1.5 * (1 - np.eye(experts))),
            output_angle=rows(1.2 * (1 - np.eye(experts))), router_drift=0.3,
            reach=Reach((0, 1), ((1.0, 0.0), (0.3, 0.8)), tuple(scaled), tuple(turned),
                        ((0.9, 0.2), (0.1, 0.7)), " März") if rotates else None,
        ),
        static=StaticShare(
            RANKS, tuple(0.9 - 0.5 / rank for rank in RANKS),
            tuple(0.8 - 0.4 / rank - 0.01 * (depth % 8) for rank in RANKS), (0.95, 0.85),
            (3000, 1000), (1.0 + number, 1.0 + number),
        ),
        effects=effects,
    )  # fmt: skip


def made_usage(depth: int, number: int, tasks: Sequence[int], experts: int, rotates: bool) -> Usage:
    """Usage over the tokens of some tasks, 1,000 tokens each."""
    share = np.mean(
        [[share_of(depth, e, task, experts) for e in range(experts)] for task in tasks], axis=0
    )
    choices = np.rint(2000 * len(tasks) * share).astype(int)
    together = np.full((experts, experts), 0.2) + np.diag(2 * share - 0.2)
    edges = np.linspace(-math.pi, math.pi, BINS + 1)
    counts = np.zeros((experts, BINS), dtype=int)
    for expert in range(experts):
        for task in tasks:
            place = np.digitize(angle_of(depth, number, expert, task), edges) - 1
            counts[expert, place] += choices[expert] // len(tasks)
    means = tuple(
        float(np.mean([angle_of(depth, number, e, task) for task in tasks])) for e in range(experts)
    )
    ones = (1.0,) * experts
    angles = Angles(
        tuple(map(float, edges)), rows(counts), means, ones, means, {"0.1": ones, "0.5": ones},
        (0.4,) * experts,
    )  # fmt: skip
    return Usage(
        1000 * len(tasks), tuple(map(int, choices)), tuple(map(float, share)), (0.5,) * experts,
        tuple(map(float, share)), 1.1, rows(together), angles if rotates else None,
    )  # fmt: skip


def made_passage(path: str, experts: int) -> Passage:
    """Three tokens, one of them markup, each with two experts."""
    weight = tuple(
        tuple(0.75 if e == t % experts else 0.25 if e == (t + 1) % experts else 0.0
              for e in range(experts)) for t in range(3)
    )  # fmt: skip
    angle = tuple(tuple(0.5 * (w > 0) for w in line) for line in weight)
    routing = TokenRouting(weight, angle)
    return Passage(("<b>", " März", "\n"), routing, {path: routing})


def rows(table: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Return a matrix as tuples."""
    return tuple(tuple(map(float, line)) for line in table)
