"""The demo, whole, on a tiny model: a process for each adapter, one table, one file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rotmole.cli.demo import worker
from rotmole.cli.demo.command import LORA, MIXTURE, OURS, clear_output, demo, make_jobs
from rotmole.errors import InputError, RotMoleError
from rotmole.training.folder.lock import run_lock
from training_cases import write_model


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """A tiny model and few rows in place of the demo's own."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    tasks = [
        f"data.tasks.{kind}={{source: locale, kind: {kind}, languages: [de, fr], "
        "limit: {train: 6, validation: 1, test: 2}, metrics: [exact_match]}"
        for kind in ("units", "currency", "dates", "lists")
    ]
    return [f"model.name={folder}", "model.dtype=float32", "evaluation.max_new_tokens=4", *tasks]


@pytest.fixture(scope="module")
def output(overrides, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.mark.heavy  # .ci/run runs the demo itself
def test_the_demo_tells_all_it_promises(overrides, output, capfd):
    assert demo(output, 3, 1, overrides) == 0
    screen = capfd.readouterr()
    lines = screen.out.splitlines()
    estimate = next(i for i, line in enumerate(lines) if line.startswith("estimate"))
    header = next(i for i, line in enumerate(lines) if line.startswith("task "))
    assert estimate < header
    for name in ("before", "before, 3 examples", LORA, MIXTURE, OURS):
        assert name in lines[header]
    cells = [line.split()[:2] for line in lines[header + 1 :]]
    for task in ("units", "currency", "dates", "lists"):
        for language in ("de", "fr"):
            assert [task, language] in cells
    assert "trainable parameters" in screen.out
    assert "One seed decides nothing" in screen.out
    page = output / "rotmole" / "report.html"
    assert page.is_file()
    assert lines[-1] == f"  report: {page}"
    assert re.match(rf"{OURS}: (\d+ things? to mend: |Nothing to mend: )", lines[-2])
    assert re.search(rf"update chose: {MIXTURE} \d+ of 32, {OURS} \d+ of 32 ", screen.out)
    assert "collapsed" not in screen.err
    assert f"{OURS}: training 3/3" in screen.err
    content = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert set(content["exact_match"]) == {"before", "before, 3 examples", LORA, MIXTURE, OURS}
    for name in (LORA, MIXTURE, OURS):
        assert (
            content["rise"][name] == content["exact_match"][name] - content["exact_match"]["before"]
        )
    assert content["report"]["systems"][OURS]["tasks"]["units"]["groups"].keys() == {"de", "fr"}


def test_the_sides_differ_in_the_adapter_and_its_rate_alone(overrides, tmp_path):
    lora, mixture, ours = (job.run for job in make_jobs(tmp_path, 3, 1, overrides))
    assert mixture.adapter == ours.adapter | {"rotation": "none", "r": 8, "lora_alpha": 16}
    assert lora.adapter["peft_type"] == "LORA"
    assert lora.adapter["target_modules"] == ours.adapter["target_modules"]
    assert {run.adapter["lora_alpha"] / run.adapter["r"] for run in (lora, mixture, ours)} == {2}
    differ = {"output_dir", "adapter", "training", "evaluation"}
    assert ours.model_dump(exclude=differ) == mixture.model_dump(exclude=differ)
    assert ours.model_dump(exclude=differ) == lora.model_dump(exclude=differ)
    assert ours.training == mixture.training == lora.training | {"learning_rate": 4e-3}
    assert ours.evaluation == lora.evaluation.model_copy(update={"report_tokens": 1000})


def test_a_run_that_no_demo_made_is_not_removed(overrides, tmp_path):
    jobs = make_jobs(tmp_path, 3, 1, overrides)
    folder = tmp_path / MIXTURE.lower()
    folder.mkdir()
    (folder / "manifest.json").touch()
    with pytest.raises(InputError, match="contains a run that no demo made"):
        clear_output(tmp_path, jobs)
    (tmp_path / "demo.json").touch()
    with run_lock(folder), pytest.raises(InputError, match="in use by another run"):
        clear_output(tmp_path, jobs)
    assert (folder / "manifest.json").exists()
    clear_output(tmp_path, jobs)
    assert not folder.exists()
    (tmp_path / "demo.json").unlink()  # a demo that died before its end leaves its mark alone
    folder.mkdir()
    (folder / "manifest.json").touch()
    clear_output(tmp_path, jobs)
    assert not folder.exists()


def test_the_shipped_settings_are_the_ones_described(tmp_path):
    run = make_jobs(tmp_path, None, 0)[-1].run
    cells = sum(len(task.languages) for task in run.data.tasks.values())
    rows = sum(len(task.languages) * task.limit["train"] for task in run.data.tasks.values())
    assert cells == 12
    assert rows == run.training["max_steps"] * run.training["per_device_train_batch_size"]


@pytest.mark.heavy
def test_a_report_that_fails_is_said(monkeypatch):
    def fails(result, progress):
        raise OSError("the disk is full")

    monkeypatch.setattr(worker, "report_of_run", fails)
    page, words = worker._report(None, None, None)
    assert page is None
    assert words == "there is no report, because the disk is full (OSError)"


def test_a_failing_side_ends_the_demo_with_its_sentence(overrides, tmp_path):
    with pytest.raises(RotMoleError, match="no_such_module") as caught:
        demo(tmp_path, 3, 0, [*overrides, "adapter.target_modules=[no_such_module]"])
    assert caught.value.exit_code == 2
