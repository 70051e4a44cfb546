"""rotmole train as a user runs it: what it says, exit codes, signals, equal ways to one result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rotmole.inspection.inspection import Inspection
from rotmole.inspection.pages.report import headline
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.checkpoints.find import find_resume
from rotmole.training.folder.lock import run_lock
from rotmole_cli import main
from training_cases import settings, write_data, write_model


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory) -> Path:
    """A run file on disk, with its model and rows."""
    root = tmp_path_factory.mktemp("train")
    model, data = write_model(root / "model"), root / "data"
    data.mkdir()
    content = settings(model, write_data(data), root / "run")
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(first: Path, second: Path) -> None:
    found = adapter(second)
    for name, value in adapter(first).items():
        difference = (value - found[name]).abs().max().item()
        assert difference < 1e-5 * value.abs().max().item(), (second.name, name, difference)


def test_it_says_what_it_trains_and_what_came_out(run_yaml, tmp_path, capsys):
    words = [str(run_yaml), f"output_dir={tmp_path / 'run'}", "training.max_steps=5"]
    assert main(["train", *words, "evaluation.report_tokens=100"]) == 0
    screen = capsys.readouterr()
    found = Inspection.read(tmp_path / "run" / "inspect.json")
    assert found.source.tokens.keys() == {"colours", "sums"}
    assert 50 <= found.source.tokens["sums"] < 70
    assert [step for step, _ in found.source.curves["colours"]] == [5]
    assert f"report           {tmp_path / 'run' / 'report.html'}" in screen.out
    assert f"verdict          {headline(found)}" in screen.out
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "q_proj x 2, v_proj x 2" in screen.out
    assert "gates included" in screen.out
    assert "colours 30, sums 30 rows" in screen.out
    assert "updates          5 of 4 rows" in screen.out
    assert "colours        " in screen.out
    assert "update        5/5" in screen.err
    assert f"rotmole eval {tmp_path / 'run'}" in screen.out


def test_a_report_that_fails_leaves_the_run_whole(run_yaml, tmp_path, capsys, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no room")

    monkeypatch.setattr("rotmole.inspection.of_run.inspect_adapter", fails)
    folder = tmp_path / "run"
    words = [f"output_dir={folder}", "training.max_steps=5", "evaluation.report_tokens=100"]
    assert main(["train", str(run_yaml), *words]) == 0
    screen = capsys.readouterr()
    assert "there is no report, because no room (RuntimeError); rotmole inspect" in screen.err
    assert "report  " not in screen.out
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / ".unfinished").exists()


def test_it_runs_again_into_its_own_folder(run_yaml, tmp_path):
    words = ["train", str(run_yaml), f"output_dir={tmp_path / 'run'}", "training.max_steps=5"]
    assert main(words) == 0
    first = adapter(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("of the first run", encoding="utf-8")
    assert main(words) == 0
    assert not (tmp_path / "run" / "report.html").exists()  # report_tokens is 0
    second = adapter(tmp_path / "run")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_ways_to_one_update_agree(run_yaml, tmp_path):
    """Batches of 4, 2 x 2 and 1 x 4, with checkpointing on: one curve, balance loss included.

    Rows of equal length, because the balance loss weighs sequences by their tokens within a
    micro-batch; 14 rows, so that an epoch ends with a short update of equal micro-batches.
    """
    rows = [{"prompt": "red 1 then ", "completion": c} for c in ("blue", "pink")] * 7
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = f"{{equal: {{source: jsonl, files: {{train: {file}}}}}}}"
    common = [
        f"data.tasks={task}", "training.max_steps=-1", "training.num_train_epochs=1",
        "adapter.lora_dropout=0", "training.save_steps=1.0", "training.eval_steps=null",
        "adapter.router_aux_loss_coef=5", "training.optim=sgd", "training.learning_rate=0.1",
        "training.max_grad_norm=0",  # AdamW blows rounding up where a gradient is nearly 0
    ]  # fmt: skip
    size, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
    ways = {
        "4 x 1": [],
        "2 x 2": [f"training.{size}=2", f"training.{accumulation}=2"],
        "1 x 4": [f"training.{size}=1", f"training.{accumulation}=4"],
        "checkpointed": ["training.activation_checkpointing=true"],
    }  # fmt: skip
    for name, words in ways.items():
        folder = f"output_dir={tmp_path / name}"
        assert main(["train", str(run_yaml), folder, *common, *words]) == 0
    for name in ways:
        assert_close(tmp_path / "4 x 1", tmp_path / name)


def test_bad_settings_are_all_told_before_anything_loads(run_yaml, tmp_path, capsys):
    words = [f"output_dir={tmp_path / 'run'}", "training.max_stepz=5", "adapter.top_k=9"]
    assert main(["train", str(run_yaml), *words]) == 2
    said = capsys.readouterr().err
    assert "max_steps" in said
    assert "top_k" in said
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_exits_with_3(run_yaml, tmp_path, capsys):
    words = [f"output_dir={tmp_path / 'run'}", "training.learning_rate=1e30"]
    assert main(["train", str(run_yaml), *words, "training.warmup_steps=0"]) == 3
    assert "not finite" in (said := capsys.readouterr().err) or "loss of update" in said
    assert (tmp_path / "run" / "failure.json").is_file()


@pytest.mark.heavy  # tests/training sends SIGINT, and tests/parallel SIGTERM, to warm processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_before_the_exit(run_yaml, tmp_path, number, code):
    folder = tmp_path / "run"
    words = ["train", str(run_yaml), f"output_dir={folder}", "training.max_steps=5000"]
    words += ["training.save_steps=5000", "training.eval_steps=5000"]
    script = "import sys; from rotmole_cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not read_metrics(folder / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert "--resume auto" in said
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < 5000
    assert not (folder / "adapter").exists()
    assert find_resume(folder, "auto") == checkpoint
    if number == signal.SIGINT:
        last = [f"training.max_steps={step + 2}", "training.save_steps=5000"]
        assert main([*words, *last, "training.eval_steps=5000", "--resume", "auto"]) == 0
        steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        assert steps == list(range(1, step + 3))


def test_changes_are_shown_and_allowed_or_not(run_yaml, tmp_path, capsys):
    words = ["train", str(run_yaml), f"output_dir={tmp_path / 'run'}"]
    assert main([*words, "training.max_steps=5"]) == 0
    before = (tmp_path / "run" / "run.yaml").read_bytes()
    longer = [*words, "training.max_steps=6", "--resume", "auto"]
    for change, allow, told in (
        ("adapter.r=6", ["--allow-change"], "adapter.r is 6, the checkpoint has 4"),
        ("adapter.top_k=3", [], "adapter.top_k is 3, the checkpoint has"),
    ):
        assert main([*longer, change, *allow]) == 2
        assert told in capsys.readouterr().err
        assert (tmp_path / "run" / "run.yaml").read_bytes() == before
    assert main([*longer, "adapter.top_k=3", "--allow-change"]) == 0
    told = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["resumes"]
    assert [entry["from"] for entry in told] == ["checkpoint-5"]
    assert any("adapter.top_k is 3" in change for change in told[0]["changes"])


def test_how_to_resume_needs_a_resume(run_yaml, capsys):
    for flag in ("--weights-only", "--allow-change"):
        assert main(["train", str(run_yaml), flag]) == 2
        assert f"{flag} says how to go on from a checkpoint" in capsys.readouterr().err


def test_a_second_run_into_one_folder_is_refused(run_yaml, tmp_path, capsys):
    words = ["train", str(run_yaml), f"output_dir={tmp_path / 'run'}"]
    with run_lock(tmp_path / "run"):
        assert main(words) == 2
    said = capsys.readouterr().err
    assert f"in use by another run (process {os.getpid()} on " in said
    assert "loading" not in said


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(run_yaml, tmp_path):
    """15 batches in updates of 4: the last update of the epoch has 3 micro-batches."""
    common = [
        "training.max_steps=5", "training.gradient_accumulation_steps=4", "training.save_steps=5",
        "training.eval_steps=5", "adapter.router_aux_loss_coef=5", "adapter.lora_dropout=0",
        "training.optim=sgd", "training.learning_rate=0.1", "training.max_grad_norm=0",
    ]  # fmt: skip
    compiled = ["training.torch_compile=true", "training.torch_compile_backend=eager"]
    for name, words in (("plain", []), ("compiled", compiled)):
        folder = f"output_dir={tmp_path / name}"
        assert main(["train", str(run_yaml), folder, *common, *words]) == 0
    assert_close(tmp_path / "plain", tmp_path / "compiled")
