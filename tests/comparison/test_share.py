"""A study from its file to its results: alone, killed, shared by processes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from safetensors.torch import load_file, save_file

import warm
from rotmole.comparison.cells import cell_lock, failure, is_done
from rotmole.comparison.judge import judge
from rotmole.comparison.judgement import write_judgement
from rotmole.comparison.plan import make_plan
from rotmole.comparison.results import PLAN, read_results
from rotmole.comparison.share import check_cells, fix_machine, work
from rotmole.comparison.study import load_study
from rotmole.errors import ConfigError, InputError, NonFiniteError
from rotmole.training.run import train
from study_cases import figures, write_study


def test_every_cell_is_done_and_described(done):
    study, left = done
    assert left.failed == {}
    assert not left.blocked
    results = read_results(study.folder)
    assert len(results.tuning) == 4
    assert [(cell.method, cell.seed) for cell in results.final] == [
        ("lora", 0), ("moe", 0), ("lora", 1), ("moe", 1),
    ]  # fmt: skip
    assert results.missing == ()
    for cell in results.final:
        assert cell.updates == 4
        assert cell.parameters == study.sized[cell.method].parameters
        assert cell.rate == study_rate(results, cell.method)
        assert cell.facts["dtype"] == "float32"
        assert cell.facts["threads"] == 1
        assert cell.flops > 2 * cell.parameters * cell.tokens
        assert len(cell.rows) == 12
        assert {row.task for row in cell.rows.values()} == {"colours", "sums"}
        assert [point.update for point in cell.curve] == [2, 4]
        assert cell.curve[-1].tokens == cell.tokens
        assert 0 < cell.curve[0].seconds < cell.curve[1].seconds <= cell.train_seconds


def study_rate(results, method):
    return results.plan["chosen"][method]["training.learning_rate"]


def test_the_best_rate_of_tuning_is_the_final_one(done):
    results = read_results(done[0].folder)
    for method in results.methods:
        trials = {cell.rate: cell.nll for cell in results.tuning if cell.method == method}
        assert len(trials) == 2
        assert study_rate(results, method) == min(trials, key=lambda rate: trials[rate])


def test_the_rows_and_the_nll_are_those_of_eval(done):
    study, _ = done
    cell = read_results(study.folder).final[0]
    report = json.loads((cell.folder / "eval.json").read_text())
    assert report["settings"]["split"] == "test"
    rows = [row for row in cell.rows.values() if row.task == "sums"]
    mean = sum(row.nll * row.tokens for row in rows) / sum(row.tokens for row in rows)
    perplexity = report["systems"]["after"]["tasks"]["sums"]["metrics"]["perplexity"]["value"]
    assert 2.718281828**mean == pytest.approx(perplexity, rel=1e-5)


def test_a_second_call_does_nothing(done, monkeypatch):
    study, _ = done
    before = {p: p.stat().st_mtime_ns for p in study.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr("rotmole.comparison.share.run_cell", None)
    assert work(study, fix_machine(study)).failed == {}
    after = {p: p.stat().st_mtime_ns for p in study.folder.rglob("*") if p.is_file()}
    assert {p: t for p, t in after.items() if p.suffix != ".lock"} == {
        p: t for p, t in before.items() if p.suffix != ".lock"
    }


@pytest.mark.slow
def test_killed_and_shared_studies_come_to_the_same_figures(done, study_yaml, tmp_path):
    """kill -9 at random moments, and two processes of which one is killed: no cell is lost."""
    jobs = [
        {"call": "study_cases:killed",
         "arguments": {"study": str(study_yaml), "output": str(tmp_path / "killed"),
                       "seed": 3, "deaths": 3}},
        {"call": "study_cases:shared",
         "arguments": {"study": str(study_yaml), "output": str(tmp_path / "shared")}},
    ]  # fmt: skip
    ends = warm.run(jobs, tmp_path / "said")
    assert [[rank.code for rank in ranks] for ranks in ends] == [[0], [0]], ends
    expected = figures(done[0].folder)
    assert len(expected) == 8
    for name in ("killed", "shared"):
        assert figures(tmp_path / name) == expected
        plans = [json.loads((f / PLAN).read_text()) for f in (tmp_path / name, done[0].folder)]
        assert plans[0] == plans[1]
    first, *others = (
        without_clock(folder, tmp_path / f"{number}.json")
        for number, folder in enumerate((done[0].folder, tmp_path / "killed", tmp_path / "shared"))
    )
    assert others == [first, first]


def without_clock(folder, to):
    """Return what study.json says of a study, without the figures that depend on the clock."""
    content = json.loads(write_judgement(judge(read_results(folder)), to).read_text())
    assert content.pop("clock")["seconds"]
    return content


@pytest.mark.slow
def test_one_method_under_two_names_is_equal_in_every_bit(study_yaml, tmp_path):
    """The second runs in a process, and from a base model, that have been used before."""
    methods = ["methods.again={adapter: {preset: moe_lora}}", "tune=null", "seeds=[5]"]
    study = load_study(study_yaml, methods, output=tmp_path / "out")
    assert work(study, fix_machine(study)).failed == {}
    found = {cell.method: cell for cell in read_results(study.folder).final}
    assert found["moe"].rows == found["again"].rows
    assert found["moe"].nll == found["again"].nll
    assert found["moe"].rows != found["lora"].rows


@pytest.mark.slow
def test_half_the_updates_are_found_and_told(study_yaml, tmp_path):
    """Real training: the judge finds a difference that was planted, and says what it comes of."""
    method = "adapter: {peft_type: LORA, r: 16}"
    changes = [
        f"methods={{whole: {{{method}}}, half: {{{method}, training: {{max_steps: 8}}}}}}",
        "baseline=whole", "base.training.max_steps=16", "base.training.eval_steps=8",
        "base.training.save_steps=8",
        "tune.grid={training.learning_rate: [1e-2]}", "metrics=[nll]", "seeds=[0, 1, 2, 3, 4, 5]",
    ]  # fmt: skip
    study = load_study(study_yaml, changes, output=tmp_path / "out")
    assert work(study, fix_machine(study)).failed == {}
    judged = judge(read_results(study.folder))
    (found,) = (d for d in judged.differences if not d.task and d.measure == "nll")
    assert (judged.claims, found.verdict) == (1, "worse")
    assert any(note.startswith("half was not trained as whole was") for note in judged.notes)


@pytest.mark.slow
def test_methods_start_with_the_same_factors_where_shapes_agree(study_yaml, tmp_path):
    changes = [
        "tune=null", "seeds=[5]", "equal=none", "base.training.learning_rate=0", "baseline=a",
        "methods={a: {adapter: {rotation: none}}, b: {adapter: {rotation: plane}}}",
    ]  # fmt: skip
    study = load_study(study_yaml, changes, output=tmp_path / "out")
    assert work(study, fix_machine(study)).failed == {}
    a, b = (
        load_file(study.folder / f"cells/final/{name}/seed-5/adapter/adapter_model.safetensors")
        for name in "ab"
    )
    common = [name for name in a if name.endswith(("expert_A", "router_weight"))]
    assert len(common) == 8
    assert all(bool((a[name] == b[name]).all()) for name in common)
    assert len({a[name].flatten()[0].item() for name in common}) == 8  # layers differ


def test_a_failure_does_not_stop_the_rest_and_is_repeated_by_the_next_call(
    study_yaml, tmp_path, monkeypatch
):
    study = load_study(study_yaml, ["tune=null", "seeds=[0]"], output=tmp_path / "out")
    machine = fix_machine(study)

    def broken(run, **kwargs):
        if "/moe/" in run.output_dir:
            raise RuntimeError("out of luck")
        return train(run, **kwargs)

    monkeypatch.setattr("rotmole.comparison.cells.train", broken)
    left = work(study, machine)
    (cell,) = left.failed
    assert (cell.method, left.failed[cell]) == ("moe", "out of luck")
    assert failure(study, cell)["kind"] == "RuntimeError"
    assert [c.method for c in read_results(study.folder).final] == ["lora"]
    assert read_results(study.folder).missing == (cell.name,)
    monkeypatch.undo()
    assert work(study, machine).failed == {}
    assert failure(study, cell) is None
    assert is_done(study, cell)


def test_a_metric_that_no_task_has_is_refused_before_training(study_yaml, tmp_path):
    study = load_study(study_yaml, ["metrics=[nll,chrf]"], output=tmp_path / "out")
    left = work(study, fix_machine(study))
    assert len(left.failed) == 4  # of tuning; without them there is no rate for the others
    for failed in left.failed.values():
        assert failed.startswith("metrics is 'chrf'; it must be one of nll, ")
    assert not [*study.folder.rglob("checkpoint-*")]


@pytest.mark.slow
def test_a_cell_that_diverges_while_tuning_is_not_chosen(study_yaml, tmp_path, monkeypatch):
    def diverges(run, **kwargs):
        if run.training["learning_rate"] == 2e-2:
            raise NonFiniteError("the loss of update 3 is nan")
        return train(run, **kwargs)

    monkeypatch.setattr("rotmole.comparison.cells.train", diverges)
    study = load_study(study_yaml, ["seeds=[0]"], output=tmp_path / "out")
    assert work(study, fix_machine(study)).failed == {}
    results = read_results(study.folder)
    worst = [cell.nll for cell in results.tuning if cell.rate == 2e-2]
    assert worst == [float("inf")] * 2
    assert {study_rate(results, name) for name in results.methods} == {1e-2}


def test_cells_of_other_settings_are_refused(done, study_yaml):
    study, _ = done
    other = load_study(study_yaml, ["training.max_steps=6"], output=study.folder)
    with pytest.raises(ConfigError) as caught:
        work(other, fix_machine(other))
    text = str(caught.value)
    assert "training.max_steps is 4 there and 6 in the study" in text
    assert "choose another --output" in text


def test_dtype_and_threads_are_fixed_once(done, study_yaml):
    folder = done[0].folder
    other = load_study(study_yaml, ["model.dtype=bfloat16", "threads=3"], output=folder)
    with pytest.raises(ConfigError) as caught:
        fix_machine(other)
    assert "dtype is bfloat16" in str(caught.value)
    assert "threads is 3" in str(caught.value)
    undecided = load_study(study_yaml, ["model.dtype=auto", "threads=null"], output=folder)
    assert fix_machine(undecided, jobs=2)["dtype"] == "float32"
    assert fix_machine(undecided, jobs=2)["threads"] == 1


@pytest.mark.slow
def test_more_seeds_keep_what_is_done(done, study_yaml, tmp_path):
    study, _ = done
    folder = shutil.copytree(study.folder, tmp_path / "more")
    more = load_study(study_yaml, ["seeds=[0,1,2]"], output=folder)
    started = time.time()
    assert work(more, fix_machine(more)).failed == {}
    fresh = [p for p in folder.rglob("cell.json") if p.stat().st_mtime > started]
    assert sorted(str(p.parent.relative_to(folder)) for p in fresh) == [
        "cells/final/lora/seed-2", "cells/final/moe/seed-2",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_metric_more_scores_finished_cells_again_without_training(
    done, study_yaml, tmp_path, monkeypatch
):
    study, _ = done
    folder = shutil.copytree(study.folder, tmp_path / "metric")
    more = load_study(study_yaml, ["metrics=[nll,greedy_match]"], output=folder)
    for path in (folder / "cells" / "final" / "lora").rglob("cell.json"):
        content = json.loads(path.read_text())
        del content["metrics"]  # as cells were before they said what they were scored by
        path.write_text(json.dumps(content))
    assert all(is_done(load_study(study_yaml, output=folder), c) for c in make_plan(more).cells)
    before = read_results(folder)
    monkeypatch.setattr("rotmole.comparison.cells.train", None)
    assert work(more, fix_machine(more)).failed == {}
    after = read_results(folder)
    assert after.tuning == before.tuning
    for old, new in zip(before.final, after.final, strict=True):
        assert {name: row.nll for name, row in new.rows.items()} == {
            name: row.nll for name, row in old.rows.items()
        }
        assert {*new.figures} == {"colours", "sums"}
        for task, values in new.figures.items():
            rows = [row for row in new.rows.values() if row.task == task]
            assert values["greedy_match"] == fmean(row.metrics["greedy_match"] for row in rows)
        assert old.updates == new.updates
    assert {s.measure for s in judge(after).scores} == {"nll", "own metric"}
    monkeypatch.setattr("rotmole.comparison.share.run_cell", None)
    assert work(more, fix_machine(more)).failed == {}


@pytest.mark.slow
def test_cells_of_other_rows_are_not_paired_and_scored_no_more(tmp_path):
    """Rows that change in the middle of a study."""
    path = write_study(tmp_path, tune=None, seeds=[0])
    study = load_study(path)
    machine = fix_machine(study)
    assert work(study, machine).failed == {}
    assert judge(read_results(study.folder)).difference("moe", "nll").estimate.n == 1
    shutil.rmtree(study.folder / "cells" / "final" / "moe")
    edit(tmp_path / "data" / "sums.train.jsonl")
    assert work(study, machine).failed == {}
    judged = judge(read_results(study.folder))
    assert judged.difference("moe", "nll").verdict == "not paired"
    assert any(
        note.startswith("moe, seed 0, is not paired with lora: data") for note in judged.notes
    )
    before = figures(study.folder)
    edit(tmp_path / "data" / "sums.test.jsonl")
    failed = work(load_study(path, ["metrics=[nll, greedy_match]"]), machine).failed
    assert len(failed) == 2
    assert all("the test rows of sums have changed since" in said for said in failed.values())
    assert figures(study.folder) == before


@pytest.mark.slow
def test_scored_rows_that_are_training_rows_are_counted_and_told(done, tmp_path):
    assert [cell.repeated for cell in read_results(done[0].folder).final] == [{}] * 4
    path = write_study(tmp_path, tune=None, seeds=[0])
    data = tmp_path / "data"
    test = (data / "sums.train.jsonl").read_text().splitlines(keepends=True)[:2]
    with (data / "sums.test.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(test)
    held_out = {"source": "jsonl", "files": {"test": str(data / "colours.train.jsonl")}}
    study = load_study(path, [f"held_out={{seen: {json.dumps(held_out)}}}"])
    assert work(study, fix_machine(study)).failed == {}
    (note,) = (n for n in judge(read_results(study.folder)).notes if n.startswith("Rows that were"))
    assert note.endswith("trained on as well: sums 2 of 8, seen 30 of 30.")


def test_tasks_without_rows_to_score_are_told_or_refused_before_training(tmp_path, monkeypatch):
    path = write_study(tmp_path, tune=None, seeds=[0])
    file = str(tmp_path / "data" / "sums.train.jsonl")
    files = f"base.data.tasks.sums.files={{train: {file}, validation: {file}}}"
    study = load_study(path, [files], output=tmp_path / "one")
    assert work(study, fix_machine(study)).failed == {}
    results = read_results(study.folder)
    assert {row.task for row in results.final[0].rows.values()} == {"colours"}
    assert "Tasks without rows to score, left out: sums." in judge(results).notes
    monkeypatch.setattr("rotmole.comparison.cells.train", None)
    held_out = f"held_out={{seen: {{source: jsonl, files: {{train: {file}}}}}}}"
    study = load_study(path, [held_out], output=tmp_path / "two")
    failed = list(work(study, fix_machine(study)).failed.values())
    assert [said[:34] for said in failed] == ["no task has rows in split 'test'; "] * 2


@pytest.mark.slow
def test_cells_of_another_base_or_other_held_out_rows_are_not_paired(tmp_path):
    """Weights of the base, or rows that are scored alone, that change in the middle of a study."""
    (tmp_path / "unseen").mkdir()
    unseen = tmp_path / "unseen" / "sums.jsonl"
    path = write_study(tmp_path, tune=None, seeds=[0])
    shutil.copy(tmp_path / "data" / "sums.test.jsonl", unseen)
    task = {"source": "jsonl", "files": {"test": str(unseen)}}
    study = load_study(path, [f"held_out.unseen={json.dumps(task)}"])
    machine = fix_machine(study)
    lora, moe = (study.folder / "cells" / "final" / name for name in ("lora", "moe"))
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    changed = {name: tensor + (name == "model.norm.weight") for name, tensor in tensors.items()}

    def reason() -> str:
        assert work(study, machine).failed == {}
        note = judge(read_results(study.folder)).notes[-1]
        return note.removeprefix("moe, seed 0, is not paired with lora: ")

    assert work(study, machine).failed == {}
    assert judge(read_results(study.folder)).difference("moe", "nll").estimate.n == 1
    shutil.rmtree(moe)
    edit(unseen)
    assert reason().startswith("held out rows is ")
    shutil.rmtree(lora)
    save_file(changed, weights, metadata={"format": "pt"})
    assert reason().startswith("base weights is ")
    more = load_study(path, [f"held_out.unseen={json.dumps(task)}", "metrics=[nll, greedy_match]"])
    ((cell, said),) = work(more, machine).failed.items()
    assert cell.method == "moe"
    assert "the weights of the base model have changed since" in said


def edit(rows: Path) -> None:
    rows.write_text(rows.read_text(encoding="utf-8").replace("plus", "and"), encoding="utf-8")


def test_a_cell_belongs_to_one_process(done):
    study, _ = done
    cell = make_plan(study).cells[0]
    with cell_lock(study, cell) as mine, cell_lock(study, cell) as again:
        assert mine
        assert not again
    with cell_lock(study, cell) as mine:
        assert mine


def test_one_cell_alone(study_yaml, tmp_path):
    study = load_study(study_yaml, ["tune=null"], output=tmp_path / "out")
    machine = fix_machine(study)
    work(study, machine, only="final/moe/seed-1")
    assert [str(p.parent.relative_to(study.folder)) for p in study.folder.rglob("cell.json")] == [
        "cells/final/moe/seed-1"
    ]
    with pytest.raises(ConfigError, match="there is no cell 'final/mo/seed-1'"):
        work(study, machine, only="final/mo/seed-1")


def test_no_study_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"no readable plan.json"):
        read_results(tmp_path)


def test_held_out_tasks_are_scored_and_not_trained_on(study_yaml, tmp_path):
    data = study_yaml.parent / "data"
    files = {"train": "sums.train.jsonl", "test": "sums.validation.jsonl"}
    unseen = {"files": {split: str(data / name) for split, name in files.items()}}
    changes = ["tune=null", "seeds=[0]", "training.max_steps=2"]
    held_out = f"held_out.unseen={json.dumps(unseen | {'source': 'jsonl'})}"
    study = load_study(study_yaml, [*changes, held_out], output=tmp_path / "out")
    assert work(study, fix_machine(study)).failed == {}
    results = read_results(tmp_path / "out")
    assert results.held_out == ("unseen",)
    for cell in results.final:
        assert {row.task for row in cell.rows.values()} == {"colours", "sums", "unseen"}
        run = yaml.safe_load((cell.folder / "run.yaml").read_text(encoding="utf-8"))
        assert list(run["data"]["tasks"]) == ["colours", "sums"]
    judged = judge(results)
    assert {s.task for s in judged.scores if s.measure == "nll"} == {"", "colours", "sums"}
    assert {s.task for s in judged.scores if s.measure == "held-out nll"} == {"", "unseen"}
    assert judged.score("moe", "held-out nll").value > 0
    other = load_study(study_yaml, changes, output=tmp_path / "out")
    cells = make_plan(other).cells
    with pytest.raises(ConfigError, match=r"held_out is .* in the study"):
        check_cells(other, cells, fix_machine(other))
