"""Runs are paired by row, and by seed where each method has several."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from judged_cases import made_cell
from rotmole.comparison.results import Row, read_results
from rotmole.comparison.runs import (
    Run,
    Trained,
    check_same_rows,
    compare_runs,
    trained,
    unequal,
)
from rotmole.data.examples import Example
from rotmole.errors import InputError

METRICS = ("exact_match", "perplexity")


def made_run(method: str, seed: int | None, shift: float, number: int = 0, rows: int = 6) -> Run:
    cell = made_cell(number, method, seed or 0, shift, rows=rows)
    return Run(f"{method}-{seed}", method, seed, cell.rows, {})


def test_two_runs_are_paired_by_row():
    first, second = made_run("a", 0, 0.0), made_run("b", 0, 0.2, 1)
    found = compare_runs([first, second], METRICS)
    assert (found.unit, found.baseline, found.claims) == ("row", "a-0", 2)
    overall = next(d for d in found.differences if (d.measure, d.task) == ("nll", ""))
    by_hand = [second.rows[name].nll - first.rows[name].nll for name in first.rows]
    assert overall.estimate.n == len(first.rows) == 24
    assert overall.estimate.value == pytest.approx(np.mean(by_hand))
    assert overall.verdict == "worse"
    tasks = {d.task for d in found.differences if d.measure == "nll"}
    assert tasks == {"", "dates", "units"}


def test_methods_with_several_seeds_are_paired_by_seed():
    runs = [
        made_run(method, seed, shift, number)
        for number, (method, shift) in enumerate([("a", 0.0), ("b", 0.3)])
        for seed in (1, 0, 2)
    ]
    found = compare_runs(runs, METRICS)
    assert found.unit == "seed"
    assert found.members == {
        "a-1 and 2 more": ("a-1", "a-0", "a-2"), "b-1 and 2 more": ("b-1", "b-0", "b-2"),
    }  # fmt: skip
    overall = next(d for d in found.differences if (d.measure, d.task) == ("nll", ""))
    assert overall.estimate.n == 3
    assert overall.verdict == "too few seeds for a claim"


@pytest.mark.parametrize(
    "keys",
    [
        [("a", 0), ("a", 1), ("b", 0)],  # one method has a single seed
        [("a", 0), ("a", 1), ("b", 2), ("b", 3)],  # no seed is shared
        [("a", 0), ("a", 0), ("a", 1), ("b", 0), ("b", 1)],  # one run twice
        [("a", 0), ("a", 1), ("b", None), ("b", 1)],  # a seed is not known
        [("a", 0), ("a", 1)],  # one method
    ],
)
def test_otherwise_the_row_is_the_unit(keys):
    runs = [
        replace(made_run(method, seed, 0.0, n), name=f"run {n}")
        for n, (method, seed) in enumerate(keys)
    ]
    assert compare_runs(runs, METRICS).unit == "row"


def test_metrics_of_many_rows_have_no_difference_by_row_and_one_by_seed():
    rows = {f"cola/{i}": Row("cola", "", 1.0 + i, 1, {"perplexity": 2.0}) for i in range(4)}
    runs = [
        Run(f"{m}-{s}", m, s, rows, {"cola": {"matthews": value}})
        for m, value in (("a", 0.1), ("b", 0.4))
        for s in (0, 1)
    ]
    found = compare_runs([runs[0], runs[2]], ("matthews", "perplexity"))
    assert [m.label for m in found.measures] == ["NLL"]
    assert (found.left_out, found.claims) == (("cola",), 1)
    found = compare_runs(runs, ("matthews", "perplexity"))
    assert found.left_out == ()
    overall = next(d for d in found.differences if (d.measure, d.task) == ("own metric", ""))
    assert overall.estimate.value == pytest.approx(0.3)


ROWS = {
    "film": [Example("film", "", "0", "a is", " good"), Example("film", "", "1", "b is", " bad")]
}
ANOTHER = replace(ROWS["film"][1], completion=" good")


def test_equal_rows_pass():
    check_same_rows({"a": ROWS, "b": {"film": list(ROWS["film"])}})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"film": ROWS["film"][:1]}, "in task 'film' \\(1 and 2 rows\\)"),
        ({"film": [ROWS["film"][0], ANOTHER]}, "is row 2: 'b is'"),
        ({"mood": ROWS["film"]}, "b has the tasks mood and a has film"),
    ],
)  # fmt: skip
def test_other_rows_are_refused(other, words):
    with pytest.raises(InputError, match=words) as caught:
        check_same_rows({"a": ROWS, "b": other})
    assert "--config RUN.yaml" in str(caught.value)


def test_what_tells_runs_apart_beside_their_methods():
    first = Trained(1000, 100, 5000, "rows")
    assert unequal(Trained(1015, 100, 5000, "rows"), first) == []
    assert unequal(Trained(700, 50, 5000, "others"), first) == [
        "-30.0 % trainable parameters", "other training rows",
        "another number of updates or tokens",
    ]  # fmt: skip
    assert unequal(replace(first, tokens=4999), first) == ["another number of updates or tokens"]
    assert unequal(Trained(), first) == []  # nothing is known
    assert unequal(first, Trained(0)) == []  # a base model alone


def test_how_a_run_came_about_is_read_from_its_folder(done):
    cells = {cell.method: cell for cell in read_results(done[0].folder).final if cell.seed == 0}
    found = {name: trained(cell.folder / "adapter") for name, cell in cells.items()}
    for name, cell in cells.items():
        assert found[name].parameters == cell.parameters
        assert (found[name].updates, found[name].tokens) == (cell.updates, cell.tokens)
    assert found["lora"].data == found["moe"].data
    checkpoint = next(cells["moe"].folder.glob("checkpoint-*"))
    assert trained(checkpoint) == replace(found["moe"], updates=None, tokens=None)
    assert trained(None) == Trained(parameters=0)
