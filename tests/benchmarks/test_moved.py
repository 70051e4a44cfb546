"""`make bench` ends with what moved beyond the spread, and compares nothing across machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = {"machine": "this one, 2 CPUs", "threads": "2", "commit": "aaa"}
NOW = HERE | {"commit": "bbb"}


def row(mode: str, value: float = 1.0, **changed: Any) -> Any:
    import common

    given = {"question": "layer", "case": "small", "measure": "step with base", "against": "LoRA",
             "low_10": value - 0.05, "high_90": value + 0.05}  # fmt: skip
    return common.Row(mode=mode, value=value, **(given | changed))


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function: planted rows of both sides -> the screen."""
    import common
    from moved import main

    def run(old: list[Any], new: list[Any], made: dict[str, str] = NOW, *more: str) -> str:
        common.write(tmp_path / "old" / "layer.csv", old, HERE)
        common.write(tmp_path / "new" / "layer.csv", new, made)
        folders = ["--old", str(tmp_path / "old"), "--new", str(tmp_path / "new")]
        monkeypatch.setattr(sys, "argv", ["moved.py", *folders, *more])
        assert main() == 0
        return capsys.readouterr().out

    return run


def test_each_figure_is_said_to_be_what_became_of_it(said) -> None:
    fast = {"measure": "tokens per second"}
    text = said(
        [row("a"), row("b"), row("c"), row("d"), row("e"), row("f", **fast)],
        [row("a", 1.04), row("b", 1.2), row("c", 0.8), row("new"), row("e"), row("f", 0.5, **fast)],
    )
    assert "2 worse, 1 better, 1 new, 1 gone, 2 within the spread, 0 not compared" in text
    lines = text.splitlines()
    starts = [(line.split()[0], lines[i + 1].split()[1]) for i, line in enumerate(lines)
              if line.startswith(("worse", "better", "new", "gone"))]  # fmt: skip
    assert starts == [
        ("worse", "f"),
        ("worse", "b"),
        ("better", "c"),
        ("new", "new"),
        ("gone", "d"),
    ]
    assert "worse  1 [0.95 .. 1.05] -> 1.2 x  step with base" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"high_90": 1.3}, {"value": 1.2}),  # inside the committed range
        ({}, {"value": 1.2, "low_10": 0.99}),  # the committed one is inside the fresh range
        ({"low_10": 1.0, "high_90": 1.0}, {"value": 1.009, "low_10": 1.009}),  # within 1 %
    ],
)
def test_what_one_spread_explains_did_not_move(said, old: Any, new: Any) -> None:
    text = said([row("a", **old)], [row("a", **new)])
    assert "0 worse, 0 better, 0 new, 0 gone, 1 within the spread" in text


def test_a_count_has_no_spread_and_moves_by_one(said) -> None:
    exact = {"unit": "operations", "low_10": 38.0, "high_90": 38.0}
    more = exact | {"low_10": 39.0, "high_90": 39.0}
    assert "1 worse" in said([row("a", 38.0, **exact)], [row("a", 39.0, **more)])


def test_a_figure_that_is_no_number_any_more_is_worse(said) -> None:
    nan = float("nan")
    text = said([row("a")], [row("a", nan, low_10=nan, high_90=nan)])
    assert "1 worse" in text
    assert "-> nan" in text


@pytest.mark.parametrize("key", ["machine", "threads"])
def test_another_machine_is_named_and_not_compared(said, key: str) -> None:
    text = said([row("a"), row("b")], [row("a", 3.0), row("b", 0.1)], NOW | {key: "7"})
    assert "0 worse, 0 better" in text
    assert "Not compared: 2 figures that were committed on this one, 2 CPUs, threads 2." in text


def test_what_was_not_measured_again_is_counted_apart(said) -> None:
    assert "0 within the spread, 1 not compared" in said([row("a")], [row("a")], HERE)


def test_seconds_of_the_profiler_are_not_compared(said) -> None:
    spent = {"unit": "s", "low_10": 1.0, "high_90": 1.0}
    slow = spent | {"low_10": 3.0, "high_90": 3.0}
    assert "0 worse" in said([row("a", **spent)], [row("a", 3.0, **slow)])
    assert "1 worse" in said([row("a", unit="s")], [row("a", 3.0, unit="s")])


def test_many_moves_fit_on_one_screen_unless_all_are_asked_for(said) -> None:
    old = [row(f"m{i}") for i in range(40)]
    new = [row(f"m{i}", 2.0 + i if i % 2 else 0.5) for i in range(40)]
    text = said(old, [*new, *(row(f"n{i}") for i in range(9))])
    assert len(text.splitlines()) <= 24
    assert "and 16 more worse: see --all" in text
    assert "m39" in text  # the largest change comes first
    whole = said(old, new, NOW, "--all")
    assert len(whole.splitlines()) == 1 + 2 * 49  # the nine new ones are in the file
    assert "more" not in whole


def test_the_committed_results_are_those_of_the_last_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import common
    import moved

    results = tmp_path / "results"
    common.write(results / "layer.csv", [row("a")], HERE)
    monkeypatch.setattr(moved, "RESULTS", results)
    (tmp_path / "old").mkdir()
    assert moved.committed(tmp_path / "old") is None  # no repository
    who = ["-c", "user.name=x", "-c", "user.email=x@y"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    common.write(results / "layer.csv", [row("a", 2.0)], NOW)
    folder = moved.committed(tmp_path / "old")
    (kept,) = common.read(folder).values()
    assert kept[0].value == 1.0
