"""Going on from a checkpoint: equal to the last bit, wherever it was cut, and what it may lack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from rotmole.config.load import load_run
from rotmole.errors import InputError, NonFiniteError
from rotmole.training.callbacks.metrics import TIMING_SUFFIXES, read_metrics
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.checkpoints.seal import faults, read_seal, seal, step_of
from rotmole.training.run import TrainResult, train
from training_cases import run_file, settings

UPDATES, EPOCH = 20, 15
LAYOUT = {
    "max_steps": UPDATES, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "logging_steps": 4, "logging_first_step": False, "save_steps": 1, "eval_steps": 1,
    "save_total_limit": 30,
}  # fmt: skip


def comparable(run_dir: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMING_SUFFIXES)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_only_weights_that_are_kept_can_be_the_best(model_folder, data_folder, tmp_path):
    """The highest loss counts as the best here, so that is the first, which nobody saves."""
    more = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "max_steps": 8}
    layout = LAYOUT | more | {"save_steps": 4, "eval_steps": 2}
    result = train(run_file(model_folder, data_folder, tmp_path / "run", **layout), progress=False)
    assert Path(result.best_checkpoint).name == "checkpoint-4"
    rows = {r["step"]: r for r in comparable(tmp_path / "run") if "eval_loss" in r}
    assert rows[2]["eval_loss"] > rows[4]["eval_loss"]
    assert result.metrics["eval_step"] == 4
    assert result.metrics["eval_loss"] == rows[4]["eval_loss"]


@pytest.fixture(scope="module")
def straight(model_folder, data_folder, tmp_path_factory) -> TrainResult:
    """Two epochs cut short; a checkpoint after every update, a log line after every fourth."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    return train(run_file(model_folder, data_folder, output, **LAYOUT), progress=False)


@pytest.fixture
def cut(straight, tmp_path) -> Callable[..., Path]:
    """A function that makes the folder of a run that died after an update, elsewhere."""

    def make(step: int, keep: int = UPDATES) -> Path:
        folder = tmp_path / "cut"
        shutil.copytree(straight.run_dir, folder)
        shutil.rmtree(folder / "adapter")
        for path in checkpoints(folder):
            if not step - keep < step_of(path) <= step:
                shutil.rmtree(path)
        return folder

    return make


@pytest.fixture
def again(model_folder, data_folder) -> Callable[..., TrainResult]:
    """A function that goes on in a folder."""

    def resume(folder: Path, *overrides: str, layout: dict | None = None, **options) -> TrainResult:
        run = run_file(model_folder, data_folder, folder, *overrides, **(LAYOUT | (layout or {})))
        return train(run, progress=False, **({"resume": "auto"} | options))

    return resume


def assert_equal(first: Path, second: Path) -> None:
    """Weights of two checkpoints, and every tensor and number of the optimizers."""
    saved = [load_file(path / "adapter_model.safetensors") for path in (first, second)]
    for name, value in saved[0].items():
        assert torch.equal(value, saved[1][name]), name
    states = [torch.load(p / "optimizer.pt", weights_only=True) for p in (first, second)]
    assert saved[0].keys() == saved[1].keys()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, state in states[0]["state"].items():
        assert state.keys() == states[1]["state"][key].keys()
        for name, value in state.items():
            other = states[1]["state"][key][name]
            same = torch.equal(value, other) if torch.is_tensor(value) else value == other
            assert same, (key, name)


@pytest.mark.parametrize("step", [1, EPOCH - 1, EPOCH, EPOCH + 1, UPDATES - 1])
def test_a_resumed_run_is_the_straight_run(straight, cut, again, step):
    """Start, inside and end of an epoch; between log lines; every line, weight and state."""
    folder = cut(step)
    resumed = again(folder)
    assert comparable(folder) == comparable(straight.run_dir)
    assert_equal(folder / f"checkpoint-{UPDATES}", straight.run_dir / f"checkpoint-{UPDATES}")
    best = Path(resumed.best_checkpoint)
    assert best == folder / Path(straight.best_checkpoint).name
    ours, theirs = [
        load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, straight.run_dir)
    ]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["resumes"]
    assert told == [{"from": f"checkpoint-{step}", "changes": []}]


HIDDEN: dict[str, dict[str, dict]] = {
    "bias": {"adapter": {"top_k": 2, "router_bias_rate": 0.05}},
    "jitter": {"adapter": {"router_jitter": 0.2, "lora_dropout": 0.0}},
    "riemannian_adamw": {"optimizer": {"name": "riemannian_adamw"}},
    "riemannian_sgd": {
        "optimizer": {"name": "riemannian_sgd", "riemannian_delta": 0.1},
        "training": {"learning_rate": 0.1},
    },
    "rates by load": {
        "adapter": {"top_k": 1, "norm_topk_prob": False},
        "optimizer": {"expert_lr_by_load": "sqrt"},
    },
    "by length": {"training": {"train_sampling_strategy": "group_by_length"}},
    "packed": {"training": {"packing": True, "per_device_train_batch_size": 1}},
}
"""Where state may hide -> section -> settings."""

SHORT = {
    "max_steps": 5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3,
    "logging_steps": 2, "logging_first_step": False, "save_steps": 2, "eval_steps": 2,
}  # fmt: skip
"""60 rows: an epoch has updates of 3, 3 and 2 micro-batches, the last one of them of 4 rows."""


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.slow
def test_no_state_hides_from_a_resume(model_folder, data_folder, tmp_path, name):
    """Cut before a short update, or in the epoch after it; every buffer is compared too."""
    content = settings(model_folder, data_folder, tmp_path / "straight", **SHORT)
    for section, more in HIDDEN[name].items():
        content[section] = content.get(section, {}) | more

    def run(folder: Path, **options) -> TrainResult:
        text = yaml.safe_dump(content | {"output_dir": str(folder)})
        return train(load_run(None, text=text), progress=False, **options)

    whole = run(tmp_path / "straight")
    ours = whole.built.model.state_dict()
    last = whole.run_dir / "checkpoint-5"
    if name == "bias":
        biases = [value for key, value in ours.items() if key.endswith("router_bias")]
        assert len(biases) == 4
        assert all(value.any() for value in biases)
    if name == "rates by load":
        saved = torch.load(last / "optimizer.pt", weights_only=True)["expert_shares"]
        assert len(saved) == 4
        assert all(len(set(share_E.tolist())) > 1 for share_E in saved.values())
    for step in (2, 4) if name == "by length" else (2,):
        folder = tmp_path / f"cut-{step}"
        shutil.copytree(whole.run_dir, folder)
        shutil.rmtree(folder / "adapter")
        for path in checkpoints(folder):
            if step_of(path) > step:
                shutil.rmtree(path)
        theirs = run(folder, resume="auto").built.model.state_dict()
        assert comparable(folder) == comparable(whole.run_dir)
        assert_equal(last, folder / "checkpoint-5")
        assert ours.keys() == theirs.keys()
        assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


@pytest.mark.slow
def test_the_balance_loss_between_log_lines_is_carried(straight, cut, again):
    """The line after a cut is a mean over updates before and after it."""
    folder = cut(6)
    again(folder)
    lines = [[r for r in read_metrics(f / "metrics.jsonl") if r.get("step") == 8 and "loss" in r]
             for f in (folder, straight.run_dir)]  # fmt: skip
    assert lines[0][0]["router_aux_loss"] == lines[1][0]["router_aux_loss"]
    assert lines[0][0]["loss"] == lines[1][0]["loss"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.tasks.colours.files.validation={other}", "validation rows of colours is '2 rows, "),
        ("data.tasks.colours.completion='a {completion}'", "validation rows of colours is '6 "),
        ("evaluation.validation_limit=3", "validation rows of sums is '3 rows, sha256 "),
        ("training.metric_for_best_model=colours_loss", "metric_for_best_model is 'colours_loss'"),
        ("training.greater_is_better=true", "training.greater_is_better is True"),
        ("adapter.top_k=3", "adapter.top_k is 3, the checkpoint has 2"),
    ],
)  # fmt: skip
def test_a_best_that_was_chosen_by_other_losses_is_forgotten(
    straight, cut, again, caplog, tmp_path, override, told
):
    """Its loss is on other rows or of another computation, so it may not beat this run's."""
    step = 17
    folder, rows = cut(step), [{"prompt": f"{c} 1 then ", "completion": "pink"} for c in "ab"]
    (tmp_path / "other").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = folder / f"checkpoint-{step}" / "trainer_state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    content |= {"best_metric": -1.0, "best_global_step": 3}  # nothing beats it
    state.write_text(json.dumps(content), encoding="utf-8")
    seal(state.parent, {"facts": read_seal(state.parent)["facts"]})
    change = override.replace("{other}", str(tmp_path / "other"))
    resumed = again(folder, change, allow_change=True)
    assert told in caplog.text
    assert f"{folder / 'checkpoint-3'}, the best so far, was chosen by losses that" in caplog.text
    lines = [r for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r]
    assert [r["step"] for r in lines][-5:] == [17, 17, 18, 19, 20]
    name = "eval_colours_loss" if "metric_for_best" in change else "eval_loss"
    pick = max if "greater" in change else min
    best = pick(lines[-4:], key=lambda row: row[name])
    assert Path(resumed.best_checkpoint) == folder / f"checkpoint-{best['step']}"
    assert resumed.metrics["eval_loss"] == best["eval_loss"]
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"| weights of update | {best['step']} of 20 |" in card


def test_what_only_training_feels_keeps_the_best(straight, cut, again, caplog):
    folder = cut(17)
    again(folder, "adapter.router_aux_loss_coef=0.2", "adapter.lora_dropout=0", allow_change=True)
    assert "the best so far" not in caplog.text
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_lost_state_is_refused_unless_weights_are_enough(cut, again, straight, name):
    folder = cut(6, keep=1)
    (folder / "checkpoint-6" / name).unlink()
    with pytest.raises(InputError, match=f"checkpoint-6: {name} is missing, or add"):
        again(folder)
    with pytest.raises(InputError, match=name):
        again(folder, resume=str(folder / "checkpoint-6"))
    layout = {"max_steps": 8, "logging_steps": 1}
    resumed = again(folder, weights_only=True, layout=layout)
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "learning_rate" in r]
    assert [r["step"] for r in rows if r["step"] > 6] == [7, 8]
    assert resumed.steps == 8


def test_weights_only_keeps_the_schedule_and_forgets_the_moments(cut, again, straight):
    folder = cut(6, keep=1)
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    again(folder, weights_only=True, layout={"logging_steps": 1})
    states = [
        torch.load(f / "checkpoint-20" / "optimizer.pt", weights_only=True)
        for f in (folder, straight.run_dir)
    ]
    assert [state["state"][0]["step"].item() for state in states] == [14, 20]
    rates = [
        torch.load(f / "checkpoint-20" / "scheduler.pt", weights_only=True)["_last_lr"]
        for f in (folder, straight.run_dir)
    ]
    assert rates[0] == rates[1]


RATES = {
    "learning_rate": 5e-3, "weight_decay": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.9,
    "adam_epsilon": 1e-6, "lr_scheduler_type": "cosine", "warmup_steps": 19, "logging_steps": 1,
}  # fmt: skip


def test_rates_that_were_allowed_to_change_are_those_of_the_new_run(cut, again, straight, tmp_path):
    """With a fresh optimizer they are the run's own from the start: the same must come out."""
    told = {}
    for weights_only in (False, True):
        folder = cut(17, keep=1)
        layout = RATES | {"save_total_limit": 30}
        again(
            folder, "optimizer.rotation_gate_lr=0.7", layout=layout, allow_change=True,
            weights_only=weights_only,
        )  # fmt: skip
        logged = {r["step"]: r["learning_rate"] for r in read_metrics(folder / "metrics.jsonl")
                  if "learning_rate" in r}  # fmt: skip
        last = torch.load(folder / "checkpoint-20" / "optimizer.pt", weights_only=True)
        told[weights_only] = [logged[step] for step in (18, 19, 20)], last["param_groups"]
        shutil.rmtree(folder)
    assert told[False] == told[True]
    old = torch.load(straight.run_dir / "checkpoint-20" / "optimizer.pt", weights_only=True)
    assert len(old["param_groups"]) == len(told[False][1])
    for group, before in zip(told[False][1], old["param_groups"], strict=True):
        assert group["betas"] == (0.5, 0.9) != before["betas"]
        assert group["initial_lr"] != before["initial_lr"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_learning_rate_of_nought_changes_no_weight(cut, again, schedule):
    folder = cut(17, keep=1)
    rates = {"learning_rate": 0.0, "lr_scheduler_type": schedule, "max_steps": 19}
    again(folder, layout=rates, allow_change=True)
    before, after = [
        load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (17, 19)
    ]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.slow
def test_a_longer_run_follows_its_own_schedule_at_once(cut, again):
    """The first update too: linear from 0.02, at update 18 of 40 after 2 of warm-up."""
    folder = cut(17, keep=1)
    again(folder, layout={"max_steps": 40, "logging_steps": 1})
    rate = torch.load(folder / "checkpoint-18" / "optimizer.pt", weights_only=True)
    logged = [r["learning_rate"] for r in read_metrics(folder / "metrics.jsonl")
              if r["step"] == 18 and "learning_rate" in r]  # fmt: skip
    assert rate["param_groups"][0]["initial_lr"] == 2e-2
    assert logged == [2e-2 * (40 - 17) / (40 - 2)]


@pytest.mark.parametrize(
    "override",
    [
        "adapter.selection=threshold",
        "adapter.share_A=true",
        "adapter.rotation=plane",
        "adapter.r=6",
    ],
)
def test_tensors_of_other_shapes_leave_the_folder_as_it_was(cut, again, override):
    folder = cut(6, keep=1)
    papers = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(InputError, match="with tensors of other shapes"):
        again(folder, override, allow_change=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == papers


@pytest.mark.parametrize("fault", ["damaged", "of another engine"])
def test_a_best_that_cannot_be_read_is_forgotten_and_said(cut, again, straight, caplog, fault):
    best_at = {
        step_of(path): json.loads((path / "trainer_state.json").read_text())["best_global_step"]
        for path in checkpoints(straight.run_dir)
    }
    step = next(step for step, best in best_at.items() if best != step)
    folder = cut(step)
    best = folder / f"checkpoint-{best_at[step]}"
    if fault == "damaged":
        (best / "adapter_model.safetensors").write_bytes(b"")
    else:
        (best / "pytorch_model_fsdp.bin").write_bytes(b"as FSDP leaves it")
        seal(best, {"facts": read_seal(best)["facts"]})
    resumed = again(folder, layout={"max_steps": step + 1})
    assert f"{best}, the best so far, is gone, damaged" in caplog.text
    assert Path(resumed.best_checkpoint).name == f"checkpoint-{step + 1}"


def test_a_best_that_is_damaged_at_the_end_costs_no_result(straight, cut, again, caplog):
    folder = cut(18)

    class Rot(TrainerCallback):
        """Strikes when training says that it is done, before the best is loaded."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "train_loss" in logs:
                path = Path(state.best_model_checkpoint, "adapter_model.safetensors")
                path.write_bytes(path.read_bytes()[:-1])

    resumed = again(folder, callbacks=[Rot()])
    assert "the last weights are the result" in caplog.text
    assert resumed.best_checkpoint is None
    ours = load_file(folder / "adapter" / "adapter_model.safetensors")
    last = load_file(straight.run_dir / "checkpoint-20" / "adapter_model.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in ours.items())


@pytest.mark.slow
def test_a_poisoned_layer_is_named_with_its_rows(model_folder, data_folder, tmp_path):
    """Exit 3 before the update; the checkpoint before it is whole and training goes on from it."""

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                layer = model.get_base_model().model.layers[1].mlp
                layer.register_forward_hook(lambda module, args, output: output * float("nan"))

    run = run_file(model_folder, data_folder, tmp_path / "run", **LAYOUT)
    with pytest.raises(NonFiniteError, match=r"first seen in .*layers\.1\.mlp") as caught:
        train(run, progress=False, callbacks=[Poison()])
    assert caught.value.exit_code == 3
    failure = json.loads((tmp_path / "run" / "failure.json").read_text(encoding="utf-8"))
    assert (failure["update"], failure["kind"], failure["value"]) == (3, "loss", "nan")
    assert failure["layer"].endswith("layers.1.mlp")
    assert failure["micro_batch"] == 0
    assert len(failure["rows"]) == 4
    newest = checkpoints(tmp_path / "run")[-1]
    assert (newest.name, faults(newest)) == ("checkpoint-2", [])
    resumed = train(run, progress=False, resume="auto")
    assert resumed.steps == UPDATES
    assert not (tmp_path / "run" / "failure.json").exists()
