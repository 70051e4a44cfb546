"""Published settings: right at their models' widths, and run whole on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from docs_scripts import load_script
from rotmole.comparison.report import write_report
from rotmole.comparison.results import read_results
from rotmole.comparison.share import fix_machine, work
from rotmole.comparison.study import load_study
from rotmole_cli import main
from tiny_folders import write_model, write_rows

pytestmark = pytest.mark.slow

PUBLISHED = Path(__file__).parents[2] / "experiments" / "published"
STUDIES = ("riemannian", "small_experts")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each set, in its own form."""
    root = tmp_path_factory.mktemp("data")
    row: dict[str, Any] = {"choices": ["good", "bad"]}
    for name in ("commonsense_qa", "openbookqa", "social_i_qa"):
        for split, count in (("train", 60), ("validation", 4), ("test", 4)):
            more = {"context": "the film is good."} if name == "social_i_qa" else {}
            rows = [
                {"id": f"{split}-{n}", "question": f"what is {n}?", **more, **row, "answer": n % 2}
                for n in range(count)
            ]
            write_rows(root / name / f"{split}.jsonl", rows)
    return root


def check(name: str, folder: Path, data: Path) -> int:
    return main(
        ["check", str(PUBLISHED / f"{name}.yaml"), f"model.name={folder}", f"data.root={data}"]
    )


@pytest.mark.parametrize("name", STUDIES)
def test_check_finds_no_mistake_at_the_models_widths(name, data, tmp_path, capsys):
    """One layer in place of all: as wide, and much less work."""
    widths = load_script(PUBLISHED / "widths.py")
    folder = widths.write_folders(tmp_path, widths.small_tokenizer())[name]
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    file.write_text(json.dumps(config))
    assert not list(folder.glob("*.safetensors"))
    assert check(name, folder, data) == 0
    shown = capsys.readouterr().out
    assert "no weights here" in shown
    assert "no mistakes found" in shown


@pytest.mark.heavy
@pytest.mark.parametrize("name", STUDIES)
def test_check_finds_no_mistake_in_the_whole_model(name, data, tmp_path):
    widths = load_script(PUBLISHED / "widths.py")
    assert check(name, widths.write_folders(tmp_path, widths.small_tokenizer())[name], data) == 0


@pytest.mark.parametrize("name", STUDIES)
def test_the_study_runs_whole_on_a_tiny_model(name, data, tmp_path):
    settings = [
        f"model.name={write_model(tmp_path / 'model')}", "model.dtype=float32", "threads=1",
        f"data.root={data}", "training.max_steps=2", "training.eval_steps=1",
        "training.save_steps=2", "training.logging_steps=1", "training.warmup_steps=0",
        "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2",
        "tune=null", "seeds=[0]",
    ]  # fmt: skip
    if name == "riemannian":
        settings.append("training.lr_scheduler_kwargs.num_decay_steps=2")
    study = load_study(PUBLISHED / f"{name}.yaml", settings, output=tmp_path / "out")
    assert work(study, fix_machine(study)).failed == {}
    judged, _ = write_report(read_results(study.folder), study.folder, name)
    assert [method.name for method in judged.methods] == list(study.file.methods)
    assert len(judged.measures) == 2
