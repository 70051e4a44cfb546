"""The plan: a grid grows for all methods where the best of one lies on its edge, up to a limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from rotmole.comparison.plan import Plan, make_plan
from rotmole.comparison.results import CELL
from rotmole.comparison.study import Study, load_study

Loss = Callable[[str, Mapping[str, float]], float | None]
RATE = "training.learning_rate"


def finish(study: Study, loss: Loss) -> Plan:
    """Pretend that cells are trained, with these validation losses, until none is left to tune."""
    plan = make_plan(study)
    while plan.open:
        for cell in plan.cells:
            folder = study.folder / cell.name
            folder.mkdir(parents=True, exist_ok=True)
            content = {
                "method": cell.method, "stage": cell.stage, "seed": cell.seed, "rate": 0.1,
                "settings": dict(cell.settings), "parameters": 1, "gate_parameters": 0,
                "difference": 0.0, "equal": True, "updates": 1, "tokens": 1, "train_seconds": 1.0,
                "flops": 1.0, "facts": {}, "nll": loss(cell.method, dict(cell.settings)),
            }  # fmt: skip
            (folder / CELL).write_text(json.dumps(content), encoding="utf-8")
            (folder / "metrics.jsonl").write_text("", encoding="utf-8")
        plan = make_plan(study)
    return plan


def study(yaml: Path, tmp_path: Path, growth: int) -> Study:
    return load_study(yaml, [f"tune.growth={growth}"], output=tmp_path / "out")


def test_without_growth_every_method_on_the_edge_is_named(study_yaml: Path, tmp_path: Path) -> None:
    plan = finish(study(study_yaml, tmp_path, 0), lambda method, settings: -settings[RATE])
    assert plan.chosen == {"lora": {RATE: 0.02}, "moe": {RATE: 0.02}}
    assert plan.on_edge == ("lora", "moe")  # both on the same one


@pytest.mark.parametrize("growth", [1, 5])
def test_the_grid_grows_for_all_until_the_best_lies_inside(
    study_yaml: Path, tmp_path: Path, growth: int
) -> None:
    best = {"lora": 0.01, "moe": 0.04}

    def loss(method: str, settings: Mapping[str, float]) -> float:
        return abs(settings[RATE] - best[method])

    plan = finish(study(study_yaml, tmp_path, growth), loss)
    wanted = [0.005, 0.01, 0.02] if growth == 1 else [0.005, 0.01, 0.02, 0.04, 0.08]
    assert plan.grid == {RATE: wanted}
    assert plan.on_edge == (("moe",) if growth == 1 else ())
    tried = {cell.settings[0][1] for cell in plan.cells if cell.stage == "tuning"}
    assert tried == set(wanted)
    assert plan.chosen["lora"] == {RATE: 0.01}
    assert len([cell for cell in plan.cells if cell.stage == "final"]) == 4


def test_a_method_that_diverged_is_never_chosen(study_yaml: Path, tmp_path: Path) -> None:
    plan = finish(
        study(study_yaml, tmp_path, 0),
        lambda method, settings: None if settings[RATE] > 0.01 else 1.0,
    )
    assert plan.chosen == {"lora": {RATE: 0.01}, "moe": {RATE: 0.01}}
