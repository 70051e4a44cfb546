"""bench-check compares ratios, never seconds, and says when the baseline itself moved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


def row(**changed: Any) -> Any:
    import common

    given = {"question": "layer", "case": "small", "mode": "none", "measure": "step with base",
             "against": "PEFT LoRA r=8", "value": 1.0, "low_10": 0.95, "high_90": 1.05,
             "ours": 0.010, "baseline": 0.010, "rounds": 20}  # fmt: skip
    return common.Row(**(given | changed))


def check(tmp_path: Path, old: list[Any], new: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    import common
    from check import main

    for name, rows in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        if rows:
            common.write(tmp_path / name / "layer.csv", rows, common.about(threads=2))
    folders = ["--old", str(tmp_path / "old"), "--new", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["check.py", *folders])
    return main()


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, 0),
        ({"value": 1.09}, 0),  # outside the range, but by less than a tenth
        ({"value": 1.2}, 1),
        ({"value": 0.5}, 0),  # better is never worse
        ({"value": float("nan")}, 1),
        ({"ours": 0.1, "baseline": 0.1}, 0),  # ten times slower, both: seconds decide nothing
    ],
)
def test_a_ratio_that_left_its_range_is_worse(
    changed: dict[str, Any], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, [row()], [row(**changed)], monkeypatch) == status


def test_a_wide_committed_range_is_forgiving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, [row(high_90=1.5)], [row(value=1.4)], monkeypatch) == 0


@pytest.mark.parametrize("measure", ["tokens per second", "their saved for backward"])
def test_where_more_is_better_less_is_worse(
    measure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = row(measure=measure)
    assert check(tmp_path, [old], [row(measure=measure, value=0.8)], monkeypatch) == 1


def test_more_of_what_is_good_is_not_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (row(measure="tokens per second", value=value) for value in (1.0, 3.0))
    assert check(tmp_path, [old], [new], monkeypatch) == 0


@pytest.mark.parametrize(("seconds", "said"), [(0.0132, True), (0.0068, True), (0.0128, False)])
def test_a_baseline_that_moved_by_a_third_is_said(
    seconds: float,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check(tmp_path, [row()], [row(baseline=seconds)], monkeypatch) == 0
    assert ("baseline moved" in capsys.readouterr().out) == said


def test_seconds_without_a_baseline_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (row(unit="s", against="", value=value, ours=None, baseline=None)
                for value in (1.0, 9.0))  # fmt: skip
    assert check(tmp_path, [old], [new], monkeypatch) == 0


def test_nothing_to_compare_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, [], [row()], monkeypatch) == 2
    assert "run make bench first" in capsys.readouterr().out


def test_results_that_share_no_figure_are_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, [row()], [row(mode="plane")], monkeypatch) == 2


def test_other_figures_are_counted_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, gone, added = row(), row(mode="plane"), row(mode="givens", value=9.0)
    assert check(tmp_path, [shared, gone], [shared, added], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "not measured this time: 1 of 2" in said
    assert "not among the committed: 1" in said


def test_rows_survive_the_file(tmp_path: Path) -> None:
    import common

    rows = [row(), row(mode="x, y", value=float("nan"), ours=None, baseline=None)]
    common.write(tmp_path / "a.csv", rows, {"torch": "2", "commit": "abc"})
    found = common.read(tmp_path)
    assert found[rows[0].key] == (rows[0], {"torch": "2", "commit": "abc"})
    assert found[rows[1].key][0].baseline is None


def test_rows_that_were_not_measured_again_stay(tmp_path: Path) -> None:
    import common

    first = [row(case="small"), row(case="large", value=2.0)]
    common.write(tmp_path / "a.csv", first, {"torch": "2", "commit": "abc"})
    common.write(
        tmp_path / "a.csv",
        [row(case="new"), row(case="small", value=3.0)],
        {"torch": "2", "commit": "def"},
    )
    found = common.read(tmp_path)
    values = [(r.case, r.value, made["commit"]) for r, made in found.values()]
    assert values == [("small", 3.0, "def"), ("large", 2.0, "abc"), ("new", 1.0, "def")]
