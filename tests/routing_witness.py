"""What a recording must say, by loops over tokens, from the inputs that hooks saw."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotmole.ops.mixture.block import slot_experts
from rotmole.ops.reference.turns import turns
from rotmole.ops.routing.route import route
from rotmole.ops.spec import Tokens
from rotmole.recording.log import RoutingLog
from rotmole.recording.statistics import BINS, LayerStatistics
from rotmole.tuner.layer import RotMoleLayer


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the input of every adapted layer in the last forward pass, by path."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for layer in model.modules():
        if isinstance(layer, RotMoleLayer):

            def keep(module: Any, args: Any) -> None:
                inputs[module.rotmole_path] = args[0].detach()

            handles.append(layer.register_forward_pre_hook(keep))  # type: ignore[attr-defined] # all are modules
    yield inputs
    for handle in handles:
        handle.remove()


@torch.no_grad()
def facts(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor, adapter: str = "default"
) -> dict[str, dict[str, Any]]:
    """Return path -> selected and weight [T, E], and the angles of [token][expert], padded or not.

    The layers of a block-routed block have the routing of their block, and the outer layer's angles
    are those of each expert's own slot.
    """
    found: dict[str, dict[str, Any]] = {}
    lead: dict[str, Any] = {}
    for layer in model.modules():
        if not isinstance(layer, RotMoleLayer):
            continue
        path, experts = layer.rotmole_path, layer.experts(adapter)
        spec, weights, x = experts.spec, experts.weights(), inputs[layer.rotmole_path]
        part = layer.rotmole_blocks.get(adapter)
        x_TD = x.flatten(0, -2) if part is None or not part.outer else x[0].flatten(0, -2)
        logits_TE = None
        if experts.has_router:
            tokens = Tokens(ids.flatten(), mask.flatten().bool(), sequences=len(ids))
            logits_TE, routing = route(spec, x_TD, weights, tokens=tokens)
            lead = {"selected": routing.selected_TE, "weight": routing.weight_TE,
                    "probability": routing.probability_TE}  # fmt: skip
        one = {"selected": torch.ones(len(x_TD), 1).bool(), "weight": torch.ones(len(x_TD), 1),
               "probability": torch.ones(len(x_TD), 1)}  # fmt: skip
        fact = dict(lead if spec.num_experts > 1 else one)
        keys = ("rotation", "rotation_input", "rotation_metric", "radar_normalize")
        settings = {key: getattr(spec, key) for key in keys}

        def angles(x_TD: Tensor, selected: Tensor, logits: Tensor | None, w=weights, s=settings):
            return turns(x_TD, x_TD, w.A_ERD, w.B_ERO, w.gates, selected, logits_TE=logits, **s)

        if spec.rotation != "none" and (part is None or not part.outer):
            fact["angles"] = angles(x_TD, fact["selected"], logits_TE)
        elif spec.rotation != "none":
            slots = x.flatten(1, -2)
            expert_TK = slot_experts(fact["selected"], len(slots))
            fact["angles"] = [[[] for _ in range(spec.num_experts)] for _ in x_TD]
            for k, x_of_slot in enumerate(slots):
                sits = torch.nn.functional.one_hot(expert_TK[:, k], spec.num_experts).bool()
                for t, row in enumerate(angles(x_of_slot, sits & fact["selected"], None)):
                    for e, angle in enumerate(row):
                        fact["angles"][t][e] += angle
        found[path] = fact
    return found


def assert_log(
    log: RoutingLog,
    model: nn.Module,
    seen: Sequence[tuple[dict[str, dict[str, Any]], Tensor, Sequence[str]]],
) -> None:
    """Compare a log with (facts, mask, task of each row) of all forward passes."""
    assert list(log.layers) == list(seen[0][0])
    for path, layer in log.layers.items():
        tasks = list(dict.fromkeys(name for _, _, names in seen for name in names))
        assert sorted(layer.tasks) == sorted(tasks)
        for task in tasks:
            assert_task(layer, path, task, seen)


def assert_task(layer: LayerStatistics, path: str, task: str, seen: Any) -> None:
    """Compare the sums of one task in one layer."""
    experts = layer.experts
    tokens = rows = entropy = 0.0
    choices, weight, part, top = ([0.0] * experts for _ in range(4))
    pairs = [[0.0] * experts for _ in range(experts)]
    squares = [0.0] * experts
    angles = defaultdict(list)
    for facts_of_pass, mask, names in seen:
        fact, width = facts_of_pass[path], mask.shape[1]
        for row, name in enumerate(names):
            if name != task or not mask[row].any():
                continue
            rows += 1
            in_row = [0.0] * experts
            for t in range(row * width, (row + 1) * width):
                if not mask[row, t - row * width]:
                    continue
                tokens += 1
                g = fact["weight"][t].tolist()
                chosen = [e for e in range(experts) if fact["selected"][t, e]]
                entropy -= sum(p * math.log(p) for p in fact["probability"][t].tolist() if p > 0)
                if chosen:
                    top[g.index(max(g))] += 1
                for e in chosen:
                    in_row[e] += 1
                    choices[e] += 1
                    weight[e] += g[e]
                    part[e] += g[e] / sum(g)
                    for other in chosen:
                        pairs[e][other] += 1
                    if "angles" in fact:
                        angles[e] += fact["angles"][t][e]
            for e in range(experts):
                squares[e] += in_row[e] ** 2 / max(sum(in_row), 1)
    sums = layer.tasks[task]
    assert (sums.tokens, sums.rows) == (tokens, rows), path
    assert sums.choices_E.tolist() == choices, path
    assert sums.top_E.tolist() == top
    assert sums.pairs_EE.tolist() == pairs
    assert sums.weight_E.tolist() == pytest.approx(weight, rel=1e-9)
    assert sums.part_E.tolist() == pytest.approx(part, rel=1e-9)
    assert sums.squares_E.tolist() == pytest.approx(squares, rel=1e-9)
    assert float(sums.entropy) == pytest.approx(entropy, rel=1e-9)
    if not angles:
        assert sums.rotation is None or not sums.rotation.count_E.any()
        return
    assert_angles(sums.rotation, [angles[e] for e in range(experts)])


def assert_angles(rotation: Any, angles: list[list[float]]) -> None:
    """Compare the sums of angles."""
    near = 1e-6
    assert rotation.count_E.tolist() == [len(of_expert) for of_expert in angles]
    for e, of_expert in enumerate(angles):
        assert rotation.cos_E[e] == pytest.approx(sum(map(math.cos, of_expert)), abs=near)
        assert rotation.sin_E[e] == pytest.approx(sum(map(math.sin, of_expert)), abs=near)
        assert rotation.absolute_E[e] == pytest.approx(sum(map(abs, of_expert)), abs=near)
        counts = [0] * BINS
        for angle in of_expert:
            counts[min(int((angle + math.pi) / (2 * math.pi) * BINS), BINS - 1)] += 1
        assert rotation.histogram_EH[e].tolist() == counts
        beyond = [sum(abs(angle) > limit for angle in of_expert) for limit in rotation.angles]
        assert rotation.beyond_EA[e].tolist() == beyond
