"""A run from its file to its folder: what it learns, what it leaves, and that it repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from rotmole.config.load import load_run
from rotmole.errors import InputError, NonFiniteError
from rotmole.evaluation.target import find_target
from rotmole.training.callbacks.metrics import TIMING_SUFFIXES, read_metrics
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.folder.layout import UNFINISHED, is_finished
from rotmole.training.run import TrainResult, train
from training_cases import run_file


class PowerCut(TrainerCallback):
    """Ends the run before an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.update:
            raise RuntimeError("power cut")


def comparable(run_dir: Path) -> list[dict]:
    """The metric lines without what two runs of one command may differ in."""
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMING_SUFFIXES)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in result.built.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def straight(model_folder, data_folder, tmp_path_factory) -> TrainResult:
    """One uninterrupted run of 20 updates."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    return train(run_file(model_folder, data_folder, output), progress=False)


def test_the_loss_falls(straight):
    losses = [
        row["loss"] for row in read_metrics(straight.run_dir / "metrics.jsonl") if "loss" in row
    ]
    assert len(losses) == 20
    assert sum(losses[-5:]) / 5 < min(losses[:5]) - 0.3


def test_a_run_leaves_its_papers(straight):
    folder = straight.run_dir
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["seed"] == 3
    assert manifest["data"]["splits"]["train"]["sums"]["rows"] == 30
    assert {"rotmole", "torch", "peft", "transformers"} <= set(manifest["versions"])
    assert manifest["adapter"]["trainable_parameters"] == straight.trainable_parameters
    again, run = load_run(folder / "run.yaml"), straight.built.run
    assert again.data.root == str(Path.cwd())  # absolute, so that the folder can be moved
    assert again.model_copy(update={"data": run.data}) == run
    assert again.data.tasks == run.data.tasks
    assert (folder / "loss.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (5, 10, 15, 20)
    }
    assert not list(folder.glob(".*"))


def test_the_manifest_holds_no_environment(straight, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "do-not-write-this")
    from rotmole.training.folder.manifest import manifest

    text = manifest(straight.built.run, {}, {})
    assert "do-not-write-this" not in text
    assert "SOME_TOKEN" not in text


def test_validation_loss_is_told_by_task(straight):
    rows = [r for r in read_metrics(straight.run_dir / "metrics.jsonl") if "eval_loss" in r]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row in rows:  # six rows of each task
        mean = (row["eval_colours_loss"] + row["eval_sums_loss"]) / 2
        assert row["eval_loss"] == pytest.approx(mean)


def test_balance_speed_and_memory_are_logged(straight):
    rows = read_metrics(straight.run_dir / "metrics.jsonl")
    first = next(row for row in rows if "loss" in row)
    assert 0.9 < first["router_aux_loss"] < 3
    assert first["train_tokens_per_second"] > 0
    assert straight.metrics["peak_memory_bytes"] > 1e7


def test_the_best_checkpoint_is_the_result(straight):
    rows = [r for r in read_metrics(straight.run_dir / "metrics.jsonl") if "eval_loss" in r]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert Path(straight.best_checkpoint).name == f"checkpoint-{best['step']}"
    assert straight.metrics["eval_loss"] == best["eval_loss"]


def test_the_adapter_loads_with_equal_logits(straight, model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, straight.adapter_dir).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, straight.built.model.eval()(ids).logits)


def test_the_card_is_what_the_hub_reads_and_its_code_runs(straight, model_folder, data_folder):
    text = (straight.adapter_dir / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert "rotmole" in card.data.tags
    assert card.data.license is None
    assert card.data.base_model is None  # a folder of this machine
    for path in (model_folder, data_folder, straight.run_dir, Path.home()):
        assert str(path) not in text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import rotmole\n")
    code = code.replace('"path/to/this/folder"', repr(str(straight.adapter_dir)))
    code = code.replace(f'"{model_folder.name}"', repr(str(model_folder)))
    namespace: dict = {}
    exec(code, namespace)
    assert type(namespace["model"]).__name__ == "PeftModelForCausalLM"
    step = straight.metrics["eval_step"]
    assert (
        f"| validation loss | {straight.metrics['eval_loss']:.4f} at update {step} |" in card.text
    )
    assert f"| weights of update | {step} of 20 |" in card.text


def test_everybody_may_read_what_a_run_leaves(straight):
    """safetensors writes files that only their owner may read."""
    probe = straight.run_dir.with_name("probe")
    probe.touch()
    files = [path for path in straight.run_dir.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"adapter_model.safetensors", "manifest.json"}
    assert {path.stat().st_mode for path in files} == {probe.stat().st_mode}


def test_the_same_command_twice_gives_equal_metrics(straight, model_folder, data_folder, tmp_path):
    again = train(run_file(model_folder, data_folder, tmp_path / "again"), progress=False)
    assert comparable(again.run_dir) == comparable(straight.run_dir)
    for name, value in weights(again).items():
        assert torch.equal(value, weights(straight)[name]), name


@pytest.mark.parametrize("step", [5, 15])  # inside epoch 0 and at its end
def test_resume_equals_the_straight_run(straight, model_folder, data_folder, tmp_path, step):
    run = run_file(model_folder, data_folder, tmp_path / "cut")
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, progress=False, callbacks=[PowerCut(step + 3)])
    resumed = train(run, resume="auto", progress=False)
    assert comparable(resumed.run_dir)[:-1] == comparable(straight.run_dir)[:-1]
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(straight)[name]), name


def test_an_unfinished_run_is_not_overwritten(model_folder, data_folder, tmp_path):
    run = run_file(model_folder, data_folder, tmp_path / "cut", max_steps=6)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, progress=False, callbacks=[PowerCut(6)])
    with pytest.raises(InputError, match="--resume auto"):
        train(run, progress=False)
    assert (tmp_path / "cut" / "checkpoint-5").is_dir()


@pytest.mark.slow
def test_a_finished_run_that_goes_on_is_unfinished_until_it_ends(
    model_folder, data_folder, tmp_path
):
    def run(steps, resume=None, **more):
        given = run_file(
            model_folder, data_folder, tmp_path, max_steps=steps, save_steps=2, eval_steps=2
        )
        return train(given, progress=False, resume=resume, **more)

    run(2)
    assert not (tmp_path / UNFINISHED).exists()
    with pytest.raises(ZeroDivisionError):
        run(6, "auto", callbacks=[Dies(5)])
    with pytest.raises(InputError, match="an unfinished run with checkpoint checkpoint-4"):
        run(6)
    with pytest.warns(UserWarning, match="was continued but did not finish"):
        find_target(tmp_path)
    run(6, "auto")
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.slow
def test_a_finished_run_survives_a_successor_that_dies(model_folder, data_folder, tmp_path, caplog):
    def run(**more):
        given = run_file(
            model_folder, data_folder, tmp_path, max_steps=3, save_steps=9, eval_steps=9
        )
        return train(given, progress=False, **more)

    first = weights(run())
    for how in ("exception", "interrupt"):
        stop = Dies(2) if how == "exception" else PowerCut(1)
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            run(callbacks=[stop])
        assert f"is kept in {tmp_path / 'previous'} until this one is complete" in caplog.text
        target = find_target(tmp_path / "previous")
        with pytest.raises(InputError, match=f"before it is {tmp_path / 'previous'}"):
            find_target(tmp_path)
        saved = load_file(target.adapter / "adapter_model.safetensors")
        assert len(saved) == len(first)
    run()
    assert is_finished(tmp_path)
    assert not (tmp_path / "previous").exists()


class Dies(TrainerCallback):
    """Raises at the start of an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise ZeroDivisionError


def test_a_loss_that_is_not_finite_stops_the_run(model_folder, data_folder, tmp_path):
    with pytest.warns(UserWarning, match="learning_rate is 1e"):
        run = run_file(
            model_folder, data_folder, tmp_path / "nan", learning_rate=1e30, warmup_steps=0,
            eval_steps=1, save_steps=1,
        )  # fmt: skip
    with pytest.raises(NonFiniteError, match="of update 2 is not finite") as caught:
        train(run, progress=False)
    assert caught.value.exit_code == 3
    failure = json.loads((tmp_path / "nan" / "failure.json").read_text(encoding="utf-8"))
    assert failure["update"] > 1
    assert {row["task"] for row in failure["rows"]} <= {"colours", "sums"}
    assert len(failure["rows"]) == 4
    assert not (tmp_path / "nan" / "adapter").exists()
    assert (tmp_path / "nan" / f"checkpoint-{failure['update'] - 1}").is_dir()


def test_resuming_a_finished_run_changes_nothing(model_folder, data_folder, tmp_path):
    run = run_file(model_folder, data_folder, tmp_path / "run", max_steps=5)
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    first = train(run, progress=False)
    before = weights.read_bytes()
    again = train(run, progress=False, resume="auto")
    assert (again.steps, again.interrupted) == (first.steps, None) == (5, None)
    assert weights.read_bytes() == before


def test_checkpoints_of_another_run_are_not_pruned(straight, model_folder, data_folder, tmp_path):
    there = checkpoints(straight.run_dir)
    given = run_file(model_folder, data_folder, tmp_path, max_steps=15, save_total_limit=1)
    train(given, progress=False, resume=str(straight.run_dir / "checkpoint-15"))
    assert (tmp_path / "adapter").is_dir()
    assert checkpoints(straight.run_dir) == there


def test_files_of_others_are_not_replaced(model_folder, data_folder, tmp_path):
    precious = tmp_path / "run" / "adapter" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="no run of rotmole wrote"):
        train(run_file(model_folder, data_folder, tmp_path / "run"), progress=False)
    assert precious.read_text(encoding="utf-8") == "mine"


def test_a_home_folder_is_expanded_once(model_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = run_file(model_folder, data_folder, Path("~/run"))
    assert run.output_dir == str(tmp_path / "run")


def test_going_on_with_another_adapter_is_refused_before_anything_is_written(
    model_folder, data_folder, tmp_path
):
    run = run_file(model_folder, data_folder, tmp_path / "cut", max_steps=6)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, progress=False, callbacks=[PowerCut(6)])
    written = (tmp_path / "cut" / "run.yaml").read_bytes()
    other = run_file(model_folder, data_folder, tmp_path / "cut", "adapter.r=6", max_steps=6)
    with pytest.raises(InputError, match="r is 6, the checkpoint has 4"):
        train(other, progress=False, resume="auto")
    assert (tmp_path / "cut" / "run.yaml").read_bytes() == written
