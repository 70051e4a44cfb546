"""Inspect an adapter: run tokens through it, and put together what was seen."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from rotmole.data.encode import Row
from rotmole.inspection.answers import answers_of, systems
from rotmole.inspection.diagnose import ENOUGH, diagnose
from rotmole.inspection.geometry import geometry
from rotmole.inspection.inspection import ALL, Effects, Inspection, Layer, Passage, Source
from rotmole.inspection.passage import matching, passage_of
from rotmole.inspection.probe import Found, Power, Probes, adapted_layers
from rotmole.inspection.reach import reach_of
from rotmole.inspection.sample import Sample, batches, tokens_of
from rotmole.inspection.static_share import CALIBRATION, HELD_OUT, ranks_up_to, static_share, total
from rotmole.inspection.usage import affinities, usage_by_task
from rotmole.recording import RoutingLog, record_routing
from rotmole.recording.watch import adapter_to_watch

Progress = Callable[[str, int, int], None]

LARGEST_RANK = 64
"""Of the static LoRAs whose shares are computed."""
SETTINGS = (
    "rotation", "num_experts", "top_k", "r", "lora_alpha", "router", "selection", "router_scope",
    "shared_expert_r",
)  # fmt: skip
PACKAGES = ("rotmole", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Request:
    """What is to be looked at.

    Attributes:
        text: to show token by token; None for none.
        layer: pattern of the layers that are shown token by token besides the mean.
        answers: whether the likelihood of answers is measured, which takes up to four passes.
    """

    text: str | None = None
    layer: str | None = None
    answers: bool = True


def inspect_adapter(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    *,
    request: Request = Request(),
    target: str = "",
    curves: Mapping[str, tuple[tuple[float, float], ...]] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at what every expert, weight and angle of a model's adapter does on given tokens.

    The model is left as it was; its mode and random state do not matter.

    Args:
        model: a PeftModel with one active RotMoLE adapter.
        tokenizer: of the model.
        sample: the tokens.
        request: what else is wanted.
        target: a name for what is inspected.
        curves: losses of its run, for `Source`.
        progress: called with (what, done, total).

    Raises:
        ConfigError: the model has no such adapter, or request.layer names no layer.
    """
    began = time.perf_counter()
    adapter = adapter_to_watch(model, None)
    layers = adapted_layers(model, adapter)
    shown = matching(list(layers), request.layer)
    settings = model.peft_config[adapter]
    counts = tokens_of(sample.held_out)
    fitted = sum(tokens_of(sample.calibration).values())
    probes = Probes(layers, tokens=fitted)
    bar = _Bar(progress, fitted + sum(counts.values()))
    log = _recorded(model, adapter, sample, probes, bar)
    inspected = tuple(
        _layer(path, one, log, probes, settings, layers) for path, one in layers.items()
    )
    answers = {}
    if request.answers:
        passes = sum(block is not None for block in systems(model, adapter, layers).values())
        tick = bar.counter("answers", passes)
        answers = answers_of(model, adapter, layers, sample.held_out, tick)
    inspected = _with_reach(inspected, model, adapter, tokenizer, sample.held_out)
    passage: Passage | None = None
    if request.text is not None:
        passage = passage_of(model, adapter, tokenizer, request.text, shown)
    made = Inspection(
        source=Source(
            target=target,
            model=str(model.get_base_model().name_or_path),
            settings=_settings(settings),
            rows=sample.words,
            tokens=counts,
            versions={"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            seconds=round(time.perf_counter() - began, 1),
            curves=dict(curves or {}),
        ),
        verdicts=(),
        layers=inspected,
        static=total([layer.static for layer in inspected if layer.static is not None]),
        answers=answers,
        passage=passage,
        notes=_notes(layers, probes, fitted, sum(counts.values())),
    )
    return replace(made, verdicts=diagnose(made))


def _recorded(model: Any, adapter: str, sample: Sample, probes: Probes, bar: _Bar) -> RoutingLog:
    """Run the tokens through the model: those to fit on into the probes, the others into both."""
    for rows in sample.calibration.values():
        with probes.listening("", CALIBRATION, effects=False):
            probes.run(model, batches(rows, model), bar.tokens)
    part = HELD_OUT if any(sample.calibration.values()) else None
    with record_routing(model, adapter) as log:
        for task, rows in sample.held_out.items():
            with probes.listening(task, part, effects=True), log.of(task):
                probes.run(model, batches(rows, model), bar.tokens)
    return log


class _Bar:
    """Progress in tokens, then in passes."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def tokens(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress("tokens", self.done, self.total)

    def counter(self, what: str, total: int) -> Callable[[], None]:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if self.progress is not None:
                self.progress(what, done, total)

        return tick


def _settings(settings: Any) -> dict[str, str]:
    values = {name: getattr(settings, name) for name in SETTINGS}
    return {name: str(value) for name, value in values.items() if value not in (None, 0)}


def _layer(
    path: str,
    found: Found,
    log: RoutingLog,
    probes: Probes,
    settings: Any,
    layers: Mapping[str, Found],
) -> Layer:
    spec = found.experts.spec
    recorded = log.layers.get(path)
    ranks = ranks_up_to(min(max(_full_rank(one) for one in layers.values()), LARGEST_RANK))
    numbers = re.findall(r"\.(\d+)\.", path)
    usage, affinity = {}, {}
    if recorded is not None:
        usage, affinity = usage_by_task(recorded), affinities(recorded)
    return Layer(
        path=path,
        module=path.rpartition(".")[2],
        depth=int(numbers[0]) if numbers else None,
        num_experts=spec.num_experts,
        rank=found.experts.expert_B.shape[1],
        top_k=min(spec.chosen, spec.num_experts) if spec.selection == "top_k" else spec.num_experts,
        rotation=spec.rotation,
        usage=usage,
        affinity=affinity,
        experts=geometry(found, settings) if spec.num_experts > 1 else None,
        static=static_share(probes.sums(path), ranks) if path in probes.layers else None,
        effects=_effects(found, probes.power.get(path)),
    )


def _full_rank(found: Found) -> int:
    experts = found.experts
    return int(experts.spec.num_experts * experts.expert_B.shape[1])


def _effects(found: Found, power: Mapping[str, Power] | None) -> dict[str, Effects]:
    if power is None:
        return {}
    parts = dict(power) if len(power) > 1 else {}
    return {
        task: Effects(
            added=_ratio(each.added, each.output),
            rotation_off=_ratio(each.rotation_off, each.added) if found.rotates else None,
            uniform=_ratio(each.uniform, each.added) if found.weighs else None,
        )
        for task, each in ({ALL: sum(power.values(), Power())} | parts).items()
    }


def _ratio(part: float, whole: float) -> float:
    return float((part / whole) ** 0.5) if whole > 0 else 0.0


def _with_reach(
    layers: tuple[Layer, ...],
    model: Any,
    adapter: str,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Row]],
) -> tuple[Layer, ...]:
    """Add what two experts reach in the layer in which the rotation changes most."""
    turning = [x for x in layers if x.experts is not None and x.effects and x.rotation != "none"]
    if not turning:
        return layers
    most = max(turning, key=lambda layer: layer.effects[ALL].rotation_off or 0.0)
    ids = list(next(row["input_ids"] for each in rows.values() for row in each))
    reach = reach_of(model, adapter, tokenizer, ids, most.path)
    assert most.experts is not None
    drawn = replace(most, experts=replace(most.experts, reach=reach))
    return tuple(drawn if layer is most else layer for layer in layers)


def _notes(
    layers: Mapping[str, Found], probes: Probes, fitted: int, tokens: int
) -> tuple[str, ...]:
    notes = []
    if any(found.is_block for found in layers.values()):
        notes.append(
            "Static share, rotation off and routing uniform are not measured in block-routed "
            "blocks, whose experts are whole blocks with an activation inside."
        )
    if not fitted:
        notes.append(
            "The static share is not measured: there are no rows to fit a linear map on besides "
            "those that are looked at."
        )
    elif probes.sketched:
        notes.append(
            f"The static share of {len(probes.sketched)} of {len(layers)} layers is a lower bound: "
            f"their inputs are too wide for {fitted:,} tokens, so the linear map is fitted on a "
            "part of them; more tokens raise it."
        )
    specs = [found.experts.spec for found in layers.values() if found.experts.has_router]
    needed = max((ENOUGH * s.num_experts // s.chosen for s in specs), default=0)
    if tokens < needed:
        notes.append(
            f"{tokens:,} tokens are too few to judge the use of the experts; {needed:,} would give "
            f"each {ENOUGH} choices if they were used alike."
        )
    return tuple(notes)
