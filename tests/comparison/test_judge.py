"""Verdicts of made-up studies whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from judged_cases import FACTS, made_results
from rotmole.comparison.judge import judge
from rotmole.comparison.judgement import read_judgement, write_judgement
from rotmole.comparison.pages.tables import remarks, screen
from rotmole.comparison.results import Row
from rotmole.errors import InputError


def verdicts(judgement, measure="nll") -> dict[str, str]:
    return {
        d.method: d.verdict for d in judgement.differences if d.measure == measure and not d.task
    }


def test_planted_differences_are_found_and_their_direction():
    judged = judge(made_results({"lora": 0, "good": -0.1, "bad": 0.1}))
    assert verdicts(judged) == {"good": "better", "bad": "worse"}
    found = judged.difference("good", "nll").estimate
    assert found.low < -0.1 < found.high
    assert found.n == 8
    assert judged.claims == 4  # two methods by two measures
    assert judged.headline == "rates tuned, eight seeds, 4 claims"


def test_one_method_under_two_names_is_alike():
    results = made_results({"lora": 0, "rotmole": 0.1})
    twins = [replace(c, method="again") for c in results.final if c.method == "lora"]
    results = replace(results, methods=("lora", "rotmole", "again"), final=(*results.final, *twins))
    judged = judge(results)
    assert verdicts(judged)["again"] == "no difference found"
    found = judged.difference("again", "nll").estimate
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_no_difference_says_what_could_have_been_seen():
    judged = judge(made_results({"lora": 0, "same": 0}))
    d = judged.difference("same", "nll")
    assert d.verdict == "no difference found"
    assert 0.005 < d.detectable < 0.1


def test_few_seeds_make_no_claim_however_large_the_difference():
    judged = judge(made_results({"lora": 0, "good": -0.3}, seeds=range(5)))
    assert verdicts(judged) == {"good": "too few seeds for a claim"}
    assert judged.seeds_needed == 7  # of two claims
    assert "five seeds: too few seeds for a claim (7 for 2 claims)" in judged.headline
    assert judged.difference("good", "nll").estimate.high < 0


def test_rates_not_tuned_decide_nothing():
    judged = judge(made_results({"lora": 0, "good": -0.1}, seeds=(0, 1), tuned=False))
    assert judged.headline == "rates not tuned, two seeds: shows the tool, decides nothing"


def test_methods_that_are_not_equal_are_part_of_no_claim():
    results = made_results({"lora": 0, "good": -0.1, "large": -0.2})
    final = [replace(c, equal=c.method != "large", difference=0.05) for c in results.final]
    judged = judge(replace(results, final=tuple(final)))
    assert verdicts(judged) == {"good": "better", "large": "not equal"}
    assert judged.claims == 2
    assert judged.difference("large", "nll").adjusted is None
    assert judged.difference("large", "nll").estimate is not None


def test_a_baseline_that_is_not_equal_leaves_no_claim():
    results = made_results({"lora": 0, "good": -0.1})
    final = [replace(c, equal=c.method != "lora") for c in results.final]
    judged = judge(replace(results, final=tuple(final)))
    assert judged.claims == 0
    assert "no claim, as no method is equal to the baseline" in judged.headline
    assert verdicts(judged) == {"good": "not equal"}


@pytest.mark.parametrize("fact", ["dtype", "device", "threads", "processor", "data"])
def test_cells_on_other_terms_are_not_paired(fact):
    results = made_results({"lora": 0, "good": -0.1})
    final = [
        replace(c, facts=FACTS | {fact: "other"}) if (c.method, c.seed) == ("good", 3) else c
        for c in results.final
    ]
    judged = judge(replace(results, final=tuple(final)))
    assert judged.difference("good", "nll").estimate.n == 7
    assert any(note.startswith(f"good, seed 3, is not paired with lora: {fact} is")
               for note in judged.notes)  # fmt: skip


def test_tuning_on_different_data_is_told():
    results = made_results({"lora": 0, "good": -0.1})
    first, *others = results.tuning
    odd = replace(first, facts=FACTS | {"data": "other"})
    assert not judge(results).notes
    (note,) = judge(replace(results, tuning=(odd, *others))).notes
    assert "tuning cells of seed 100 were trained on different data" in note


def test_another_commit_is_told_and_paired():
    results = made_results({"lora": 0, "good": -0.1})
    final = [
        replace(c, facts=FACTS | {"commit": "def"}) if c.seed == 3 else c for c in results.final
    ]
    judged = judge(replace(results, final=tuple(final)))
    assert judged.difference("good", "nll").estimate.n == 8
    assert "The cells differ in commit: abc; def." in judged.notes
    assert "commit" not in judged.facts
    assert judged.facts["dtype"] == "float32"


@pytest.mark.parametrize(
    ("split", "said"),
    [("validation", "Where these choose settings"), ("train", "rows that they were trained on")],
)
def test_other_rows_than_those_of_the_test_split_are_told(split, said):
    results = made_results({"lora": 0, "good": -0.1})
    assert not any("are scored on" in note for note in judge(results).notes)
    (note,) = judge(replace(results, plan={"split": split})).notes
    assert said in note


def test_a_method_that_was_trained_otherwise_is_told_and_paired():
    results = made_results({"lora": 0, "same": -0.1, "short": 0.1, "others": 0.1})
    changes = {"short": {"updates": 50, "tokens": 500}, "others": {"tokens": 1100}}
    final = [replace(c, **changes.get(c.method, {})) for c in results.final]
    lora = next(c for c in final if c.method == "lora")
    judged = judge(replace(results, final=tuple(final)))
    assert verdicts(judged)["short"] == "worse"
    told = [note for note in judged.notes if "was not trained as lora was" in note]
    assert [note.split()[0] for note in told] == ["short", "others"]
    assert "50 updates on 500 tokens a cell" in told[0]
    assert f"lora {lora.updates} updates on {lora.tokens:,} tokens." in told[0]


def test_cells_that_scored_other_rows_are_not_paired():
    results = made_results({"lora": 0, "good": -0.1})
    first, *others = [c for c in results.final if c.method == "good"]
    lost = dict(list(first.rows.items())[1:])
    base = [c for c in results.final if c.method == "lora"]
    judged = judge(replace(results, final=(*base, replace(first, rows=lost), *others)))
    assert judged.difference("good", "nll").estimate.n == 7
    assert any("scored other rows (23 and 24)" in note for note in judged.notes)


def test_missing_cells_are_named_and_the_rest_is_judged():
    results = made_results({"lora": 0, "good": -0.1})
    final = tuple(c for c in results.final if (c.method, c.seed) != ("good", 2))
    judged = judge(replace(results, final=final, missing=("cells/final/good/seed-2",)))
    assert judged.difference("good", "nll").estimate.n == 7
    assert judged.notes == ("1 cell is not finished: cells/final/good/seed-2.",)
    assert judged.missing == ("cells/final/good/seed-2",)


def test_without_the_baseline_nothing_is_judged():
    results = made_results({"lora": 0, "good": -0.1})
    final = tuple(c for c in results.final if c.method != "lora")
    with pytest.raises(InputError, match="baseline 'lora'"):
        judge(replace(results, final=final))


def test_a_seed_that_diverged_is_said_and_gives_no_figure():
    results = made_results({"lora": 0, "wild": -0.1})
    final = []
    for cell in results.final:
        rows = dict(cell.rows)
        if (cell.method, cell.seed) == ("wild", 4):
            rows["dates/de0"] = replace(rows["dates/de0"], nll=float("inf"))
        final.append(replace(cell, rows=rows))
    judged = judge(replace(results, final=tuple(final)))
    assert verdicts(judged) == {"wild": "diverged"}
    assert judged.score("wild", "nll").value is None
    assert judged.score("wild", "nll").by_seed[4] is None
    assert judged.difference("wild", "nll", "units").estimate is not None


def row(task: str, group: str, nll: float, **metrics: float) -> Row:
    return Row(task, group, nll, 1, metrics)


def test_groups_and_tasks_count_alike_whatever_their_rows():
    rows = {
        "a/0": row("a", "x", 1.0), "a/1": row("a", "x", 1.0), "a/2": row("a", "y", 4.0),
        "b/0": row("b", "", 10.0),
    }  # fmt: skip
    judged = judge(_only(rows))
    assert judged.score("lora", "nll", "a", "x").value == 1.0
    assert judged.score("lora", "nll", "a").value == 2.5
    assert judged.score("lora", "nll", "b").value == 10.0
    assert judged.score("lora", "nll").value == 5.0  # of x, y and b


def _only(rows: dict[str, Row], figures=None, metrics=("nll",)):
    """Results of one cell that scored these rows."""
    results = made_results({"lora": 0}, seeds=(0,))
    cell = replace(results.final[0], rows=rows, figures=figures or {})
    return replace(results, metrics=metrics, final=(cell,))


def test_each_task_is_judged_by_its_own_metric():
    rows = {
        "cola/0": row("cola", "", 1.0, perplexity=2.7),
        "sst2/0": row("sst2", "", 1.0, accuracy=1.0, perplexity=2.7),
        "sst2/1": row("sst2", "", 1.0, accuracy=0.0, perplexity=2.7),
    }
    figures = {"cola": {"matthews": 0.3, "perplexity": 2.7}, "sst2": {"accuracy": 0.5}}
    judged = judge(_only(rows, figures, ("nll", "perplexity", "matthews", "accuracy")))
    assert judged.own_metrics == {"cola": "matthews", "sst2": "accuracy"}
    assert [m.label for m in judged.measures] == ["NLL", "own metric"]
    assert judged.score("lora", "own metric", "cola").value == 0.3
    assert judged.score("lora", "own metric").value == pytest.approx(0.4)


def test_the_own_metric_of_all_tasks_gives_its_name():
    judged = judge(made_results({"lora": 0, "good": -0.3}))
    assert [(m.label, m.higher_is_better) for m in judged.measures] == [
        ("NLL", False), ("exact_match", True),
    ]  # fmt: skip
    assert verdicts(judged, "own metric") == {"good": "better"}  # a higher share is better


def test_equal_seconds_are_those_of_the_quicker_method():
    """The slow method has made half of its updates where the baseline ends."""
    judged = judge(made_results({"lora": 0, "slow": 0}, seconds={"slow": 200}))
    (slow,) = judged.clock.at_equal_seconds
    assert (slow.budget, slow.share) == (100, 0.5)
    assert slow.estimate.value == pytest.approx(2 * (0.1353 - 0.0183), abs=0.03)
    (flops,) = judged.at_equal_flops  # each update of the second method costs twice as much
    assert (flops.budget, flops.share) == (1e11, 0.5)


def test_no_validation_within_the_budget_is_no_figure():
    results = made_results({"lora": 0, "slow": 0}, seconds={"slow": 200})
    final = [replace(c, curve=c.curve[-1:]) if c.method == "slow" else c for c in results.final]
    judged = judge(replace(results, final=tuple(final)))
    assert judged.clock.at_equal_seconds[0].estimate is None
    final = [replace(c, curve=()) for c in results.final]
    judged = judge(replace(results, final=tuple(final)))
    assert judged.at_equal_flops[0].budget is None


def test_operations_that_are_not_known_are_left_out_and_said(tmp_path):
    results = made_results({"lora": 0, "loha": -0.1, "moe": -0.1})
    final = [
        replace(c, flops=None, curve=[replace(p, flops=None) for p in c.curve])
        if c.method == "loha" else c for c in results.final
    ]  # fmt: skip
    judged = judge(replace(results, final=tuple(final)))
    assert verdicts(judged)["loha"] == "better"
    assert [m.flops is None for m in judged.methods] == [False, True, False]
    loha, moe = judged.at_equal_flops
    assert (loha.budget, loha.estimate) == (None, None)
    assert moe.budget == 1e11
    assert "The operations of loha depend on values and were not counted" in judged.notes[-1]
    path = write_judgement(judged, tmp_path / "study.json")
    assert read_judgement(path) == judged
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_study_json_reads_back_and_keeps_the_clock_apart(tmp_path):
    shifts = {"lora": 0, "good": -0.1}
    judged = judge(made_results(shifts))
    path = write_judgement(judged, tmp_path / "study.json")
    assert read_judgement(path) == judged
    later = judge(made_results(shifts, seconds={"lora": 170, "good": 190}))
    first, second = (json.loads(text) for text in (
        path.read_text(encoding="utf-8"),
        write_judgement(later, tmp_path / "later.json").read_text(encoding="utf-8"),
    ))  # fmt: skip
    assert first.pop("clock") != second.pop("clock")
    assert first == second


def test_held_out_tasks_have_a_measure_of_their_own_and_change_no_other():
    shifts = {"lora": 0, "good": -0.1, "bad": 0.1}
    tasks = {"dates": ("de", "fr"), "units": ("de", "fr"), "dutch": ("nl",), "greek": ()}
    results = made_results(shifts, tasks=tasks)
    judged = judge(replace(results, held_out=("dutch", "greek")))
    seen = [
        replace(
            cell,
            rows={n: row for n, row in cell.rows.items() if row.task in ("dates", "units")},
            figures={n: f for n, f in cell.figures.items() if n in ("dates", "units")},
        )
        for cell in results.final
    ]
    alone = judge(replace(results, final=tuple(seen)))
    *others, unseen = judged.measures
    assert (tuple(others), unseen.name) == (alone.measures, "held-out nll")
    assert [s for s in judged.scores if s.measure != unseen.name] == list(alone.scores)
    assert [d for d in judged.differences if d.measure != unseen.name] == list(alone.differences)
    assert judged.claims == alone.claims
    for cell in results.final:
        by_part = [
            [row.nll for row in cell.rows.values() if row.task == t] for t in ("dutch", "greek")
        ]
        score = judged.score(cell.method, unseen.name)
        assert score.by_seed[cell.seed] == pytest.approx(np.mean([np.mean(v) for v in by_part]))
    for name in ("good", "bad"):
        difference = judged.difference(name, unseen.name)
        assert (difference.verdict, difference.adjusted) == ("", None)
        assert difference.estimate.value == pytest.approx(shifts[name], abs=0.03)
    assert "held-out" not in remarks(judged)[1]
    shown = dict(screen(judged))["NLL of held-out tasks minus that of lora"]
    assert [line[0] for line in shown] == ["method", "good", "bad"]


@pytest.mark.parametrize("text", ["{}", "not json", '{"format": 1}'])
def test_what_is_no_study_json_is_refused(tmp_path, text):
    (tmp_path / "study.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="of `rotmole compare`"):
        read_judgement(tmp_path / "study.json")
    with pytest.raises(InputError, match="No such file"):
        read_judgement(tmp_path / "none.json")
