"""loss.svg: every loss, whole updates from 0, marks, and a small plot of each of several tasks."""

from __future__ import annotations

import re

import pytest

from rotmole.training.folder.plots import loss_svg


def log(tasks: list[str], updates: int, every: int = 1) -> list[dict]:
    rows: list[dict] = []
    for step in range(every, updates + 1, every):
        rows.append({"step": step, "loss": 3.0 - step / updates})
        losses = {f"eval_{task}_loss": 2.0 + number for number, task in enumerate(tasks)}
        rows.append({"step": step, "eval_loss": 2.5, **losses})
    return rows


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


def ticks(svg: str) -> list[str]:
    """Numbers below the axes of updates."""
    return [t for t in texts(svg) if re.fullmatch("[0-9]+", t)]


def test_every_loss_is_shown_and_an_empty_log_has_a_plot_too():
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, *log(["sums", "dates"], 2)]
    words = texts(loss_svg(rows, "run"))
    for label in ("training", "validation", "validation: sums", "validation: dates", "run"):
        assert words.count(label) == 1, label
    assert loss_svg([], "run").rstrip().endswith("</svg>")


@pytest.mark.parametrize("updates", [1, 2, 5, 40, 1000])
def test_the_axis_has_whole_updates_from_nought(updates):
    svg = loss_svg(log(["sums"], updates, max(updates // 5, 1)), "run")
    shown = ticks(svg)
    assert shown[0] == "0"
    assert str(updates) in shown
    assert not re.findall(r">[0-9]+\.[0-9]*5</text>.*update", svg)


def test_one_task_has_no_plot_of_its_own():
    assert "validation: sums" not in texts(loss_svg(log(["sums"], 4), "run"))


def test_resumes_and_the_result_are_marked_once():
    words = texts(loss_svg(log(["a", "b"], 9), "run", resumed=[3, 6, 6], kept=8))
    assert words.count("resumed") == 1
    assert words.count("result: update 8") == 1
    assert "resumed" not in texts(loss_svg(log(["a"], 9), "run"))


@pytest.mark.parametrize("name", ["мост 橋 γέφυρα", "$x^2_", "<b>&amp;", "x" * 200])
def test_any_name_can_be_drawn(name):
    svg = loss_svg(log([name, "other"], 3), name)
    assert svg.rstrip().endswith("</svg>")
    assert "橋" in svg or "橋" not in name
