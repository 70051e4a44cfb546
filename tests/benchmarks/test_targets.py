"""The table of targets: the worst row stands for a target, and nothing measured says so."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest


def row(value: float, **changed: Any) -> Any:
    import common

    given = {"question": "step", "case": "q,k,v,o", "mode": "none", "measure": "training step",
             "against": "PEFT LoRA r=8", "value": value, "low_10": value,
             "high_90": value}  # fmt: skip
    return common.Row(**(given | changed))


def test_the_worst_row_stands_for_a_target() -> None:
    from targets import TARGETS, line

    target = next(t for t in TARGETS if t.what == "whole training step")
    assert "not measured" in line(target, [])
    rows = [row(1.05), row(1.07, mode="tangent"), row(9.0, measure="something else")]
    assert "| 1.07 |" in line(target, rows)
    assert "(2)" in line(target, rows)
    assert "1.30 (missed)" in line(target, [*rows, row(1.3)])


def test_where_more_is_better_the_least_is_worst() -> None:
    from targets import TARGETS, line

    target = next(t for t in TARGETS if t.what.startswith("decoding"))
    decode = {"question": "decode", "measure": "tokens per second"}
    assert "0.80 (missed)" in line(target, [row(0.8, **decode), row(0.95, **decode)])


def test_a_figure_that_is_not_a_number_is_worst() -> None:
    from targets import TARGETS, line

    target = next(t for t in TARGETS if t.what == "whole training step")
    assert "nan (missed)" in line(target, [row(1.0), row(float("nan"), mode="tangent")])


def test_the_table_is_written_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import common
    from targets import DOCUMENT, main

    common.write(tmp_path / "step.csv", [row(1.01)], common.about(threads=2))
    document = tmp_path / "performance.md"
    text = DOCUMENT.read_text(encoding="utf-8")
    document.write_text(text, encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["targets.py", "--results", str(tmp_path), "--document", str(document)]
    )
    assert main() == 0
    written = document.read_text(encoding="utf-8")
    assert "| whole training step | at most 1.08 | 1.01 |" in written
    measured = "targets|operations|launches|memory|measured on a gpu"
    tables = re.compile(f"(<!-- ({measured}) -->).*?(<!-- end of)", re.DOTALL)
    assert tables.sub(r"\1\3", written) == tables.sub(r"\1\3", text)


def test_the_committed_table_is_what_the_committed_results_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets import DOCUMENT, main

    document = tmp_path / "performance.md"
    text = DOCUMENT.read_text(encoding="utf-8")
    document.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["targets.py", "--document", str(document)])
    assert main() == 0
    assert document.read_text(encoding="utf-8") == text


def test_every_target_matches_what_its_script_measures() -> None:
    """The names are written twice, here and in the scripts: they must be found there."""
    from targets import TARGETS

    scripts = Path(__file__).parents[2] / "benchmarks"
    for target in TARGETS:
        source = (scripts / f"{target.question}.py").read_text(encoding="utf-8")
        assert f'"{target.measure}"' in source, target


def test_a_cards_file_becomes_a_table(tmp_path: Path) -> None:
    import tables

    assert tables.cards(tmp_path) == "Nothing here was measured on a GPU."
    kept = {
        "cards": ["NVIDIA X", "NVIDIA X"], "made": {"torch": "2", "cuda": "13", "commit": "abc"},
        "checks": {"a": "", "b": "differs"}, "ranks": {"c": ""},
        "bench": [
            asdict(row(1.25, question="gpu", measure="step with base", ours=2e-4, baseline=1.6e-4)),
            asdict(row(3.0, question="gpu", measure="kernels of a step with base")),
        ],
    }  # fmt: skip
    (tmp_path / "gpu-nvidia-x.json").write_text(json.dumps(kept))
    said = tables.cards(tmp_path)
    assert said.startswith("2 x NVIDIA X, torch 2, CUDA 13, commit abc: 3 checks, 1 failed.")
    assert said.splitlines()[-1] == (
        "| q,k,v,o | none | step with base | 1.25 | 1.25 .. 1.25 | 0.0002 | 0.00016 | 3.00 |"
    )


def test_counts_of_a_small_layer_stand_side_by_side() -> None:
    import tables

    rows = [row(2.0, question="launches", measure=measure, ours=ours, baseline=baseline)
            for measure, ours, baseline in (
                ("operations, forward and backward", 32.0, 12.0),
                ("compiled kernels, forward and backward", 17.0, 11.0),
                ("fixed cost, forward and backward", 5e-4, 3e-4),
                ("operations, one token", 13.0, 5.0),
                ("fixed cost, one token", 9e-5, 6e-5))]  # fmt: skip
    last = tables.launches(rows).splitlines()[-1]
    assert last == "| none | 32 / 12 | 17 / 11 | 500 / 300 | 13 / 5 | 90 / 60 |"
