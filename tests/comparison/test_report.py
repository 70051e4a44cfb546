"""From a study folder to all it leaves, PEFT's method_comparison layout among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig

from judged_cases import FACTS
from rotmole.comparison.judgement import read_judgement
from rotmole.comparison.pages.method_comparison import FOLDER
from rotmole.comparison.plan import make_plan, write_plan
from rotmole.comparison.report import write_report
from rotmole.comparison.results import Results, read_results
from rotmole.comparison.study import load_study
from rotmole.config.load import resolved_yaml
from rotmole.errors import InputError
from rotmole.training.folder.manifest import manifest
from training_cases import run_file

# what PEFT's method_comparison/processing.py takes from each part of a result
RUN_INFO = {
    "experiment_name",
    "train_config",
    "peft_config",
    "total_time",
    "peft_branch",
    "created_at",
}
TRAIN_INFO = {
    "status", "accelerator_memory_reserved_avg", "accelerator_memory_max", "file_size",
    "train_time", "accelerator_memory_reserved_99th",
}  # fmt: skip
LAST = {"test accuracy", "train loss", "train samples", "train total tokens"}
PACKAGES = {
    f"{name}-version" for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
}


def write_cell(study: Path, method: str, seed: int, nll: float) -> str:
    """A finished final cell as `rotmole compare` leaves it, without training anything."""
    name = f"cells/final/{method}/seed-{seed}"
    folder = study / name
    (folder / "adapter").mkdir(parents=True)
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="tiny").save_pretrained(
        folder / "adapter"
    )
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 1000)
    run = run_file(study / "tiny", study, folder, max_steps=4, eval_steps=0.5, weight_decay=0.1)
    counts = {"trainable_parameters": 64, "all_parameters": 5000, "adapted_modules": 2}
    rows = {"sha256": "cd", "splits": {"train": {"film": {"rows": 30, "sha256": "ab"}}}}
    (folder / "manifest.json").write_text(manifest(run, rows, counts), encoding="utf-8")
    (folder / "run.yaml").write_text(resolved_yaml(run), encoding="utf-8")
    log = [
        {"step": 2, "eval_loss": nll + 1, "train_seconds": 1.0, "num_input_tokens_seen": 50},
        {"step": 4, "eval_loss": nll, "train_seconds": 2.0, "num_input_tokens_seen": 100},
        {"step": 4, "train_loss": 2.5, "peak_memory_bytes": 7000, "train_seconds": 2.0},
    ]
    write_lines(folder / "metrics.jsonl", log)
    answers = [
        {"task": "film", "group": "de", "id": str(i), "systems": {"after": {
            "loss": 2 * (nll + i), "tokens": 2,
            "metrics": {"exact_match": i % 2, "perplexity": None},
        }}}
        for i in range(4)
    ]  # fmt: skip
    write_lines(folder / "predictions.jsonl", answers)
    figures = {"film": {"metrics": {"exact_match": {"value": 0.5}, "macro_f1": {"value": None}}}}
    text = json.dumps({"systems": {"after": {"tasks": figures}}})
    (folder / "eval.json").write_text(text, encoding="utf-8")
    cell = {
        "method": method, "stage": "final", "seed": seed, "settings": {}, "rate": 1e-3,
        "parameters": 64, "gate_parameters": 0, "difference": 0.0, "equal": True, "updates": 4,
        "tokens": 100, "train_seconds": 2.0, "flops": 8e6, "nll": nll, "facts": FACTS,
    }  # fmt: skip
    (folder / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
    return name


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    cells = [write_cell(tmp_path, m, s, n + s / 10) for m, n in (("lora", 1.0), ("moe", 0.5))
             for s in (0, 1)]  # fmt: skip
    plan = {
        "baseline": "lora", "methods": {"lora": {}, "moe": {}}, "metrics": ["nll", "exact_match"],
        "seeds": [0, 1], "cells": [*cells, "cells/final/moe/seed-2"], "study": str(tmp_path),
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return tmp_path


def test_cells_are_read_from_their_folders(study):
    results: Results = read_results(study)
    cell = results.final[0]
    assert results.missing == ("cells/final/moe/seed-2",)
    assert cell.rows["film/3"].nll == 4.0
    assert cell.rows["film/3"].metrics == {"exact_match": 1}
    assert cell.figures == {"film": {"exact_match": 0.5}}
    assert [(p.update, p.seconds, p.tokens, p.flops, p.nll) for p in cell.curve] == [
        (2, 1.0, 50, 4e6, 2.0), (4, 2.0, 100, 8e6, 1.0),
    ]  # fmt: skip


def test_everything_is_written_and_says_nothing_of_places(study):
    judged, files = write_report(read_results(study), study, "Title")
    assert [path.name for path in files] == ["study.json", "study.html", "study.md", FOLDER]
    assert all(path.exists() for path in files)
    assert judged.difference("moe", "nll").estimate.value == pytest.approx(-0.5)
    assert judged.notes == ("1 cell is not finished: cells/final/moe/seed-2.",)
    for path in files[:3]:
        assert str(study) not in path.read_text(encoding="utf-8")


def test_peft_reads_settings_and_results(study):
    write_report(read_results(study), study, "Title")
    place = study / FOLDER / "experiments" / "lora" / "moe-seed-1"
    config = PeftConfig.from_pretrained(place)
    assert (config.peft_type, config.r) == ("LORA", 4)
    training = json.loads((place / "training_params.json").read_text(encoding="utf-8"))
    assert (training["max_steps"], training["eval_steps"], training["batch_size"]) == (4, 2, 4)
    assert training["optimizer_kwargs"] == {"lr": 1e-3, "weight_decay": 0.1}
    results = sorted((study / FOLDER / "results").iterdir())
    assert [path.name for path in results] == [
        f"lora--{name}.json" for name in ("lora-seed-0", "lora-seed-1", "moe-seed-0", "moe-seed-1")
    ]
    content = json.loads(results[3].read_text(encoding="utf-8"))
    assert content["run_info"].keys() >= RUN_INFO
    assert content["train_info"].keys() >= TRAIN_INFO
    assert content["train_info"]["status"] == "success"
    end = content["train_info"]["metrics"][-1]
    assert end.keys() >= LAST
    assert (end["test accuracy"], end["test nll"], end["train samples"]) == (0.5, 2.1, 30)
    assert content["train_info"]["file_size"] == 1000
    assert content["meta_info"]["package_info"].keys() >= PACKAGES
    assert content["run_info"]["train_config"] == training


@pytest.mark.slow
def test_a_study_that_was_trained_is_reported(done, tmp_path):
    study, _ = done
    results = read_results(study.folder)
    judged, _ = write_report(results, tmp_path, "Trained")
    assert {method.name for method in judged.methods} == set(study.file.methods)
    assert judged.facts["dtype"] == "float32"
    assert all(d.estimate is not None for d in judged.differences)
    for path in (tmp_path / FOLDER / "experiments").rglob("adapter_config.json"):
        assert PeftConfig.from_pretrained(path.parent).target_modules
    content = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    del content["clock"]
    text = json.dumps(content)
    assert str(study.folder) not in text
    assert "second" not in text  # no figure of the clock anywhere else


@pytest.mark.slow
def test_a_study_without_final_seeds_is_a_screen(done, tmp_path):
    whole, _ = done
    shutil.copytree(whole.folder / "cells" / "tuning", tmp_path / "screen" / "cells" / "tuning")
    first = tmp_path / "screen/cells/tuning/lora/learning_rate=0.01/seed-7/cell.json"
    first.write_text(json.dumps(json.loads(first.read_text("utf-8")) | {"nll": 0.5}), "utf-8")
    study = load_study(Path(whole.where), ["seeds=[]"], output=tmp_path / "screen")
    plan = make_plan(study)
    assert not plan.open
    assert {cell.stage for cell in plan.cells} == {"tuning"}
    write_plan(study, plan, {})
    judged, _ = write_report(read_results(study.folder), tmp_path / "screen", "Screen")
    assert "a screen by validation rows" in judged.headline
    assert judged.claims == 0
    best = {}
    for trial in judged.trials:
        best[trial.method] = min(trial.nll, best.get(trial.method, trial.nll))
    assert {name: judged.score(name, "nll").value for name in best} == best
    moe = judged.difference("moe", "nll")
    assert moe.estimate.value == pytest.approx(best["moe"] - best["lora"])
    assert (moe.verdict, moe.adjusted, moe.estimate.low) == ("", None, None)
    assert judged.score("lora", "nll").value == 0.5  # not that of the last rate
    assert {method.name: method.rate for method in judged.methods} == {
        name: settings["training.learning_rate"] for name, settings in plan.chosen.items()
    }
    assert read_judgement(tmp_path / "screen" / "study.json") == judged
    page = (tmp_path / "screen" / "study.html").read_text(encoding="utf-8")
    assert "Validation NLL against parameters" in page
    assert "test NLL" not in page


def test_a_cell_that_lost_its_adapter_is_named(study):
    path = study / "cells" / "final" / "moe" / "seed-1" / "adapter" / "adapter_config.json"
    path.unlink()
    with pytest.raises(InputError, match=r"seed-1.* has lost a file"):
        write_report(read_results(study), study, "Title")
    assert (study / "study.html").is_file()  # what does not need the adapter is there


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no readable plan\.json"):
        read_results(tmp_path)
