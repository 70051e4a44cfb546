"""rotmole compare as a user runs it: what it shows, what it does, how it ends."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rotmole.cli.compare.table import look, progress_table, summary
from rotmole.comparison.results import read_results
from rotmole.comparison.share import fix_machine
from rotmole.comparison.study import load_study
from rotmole_cli import main
from study_cases import write_study


@pytest.fixture(scope="module")
def study_yaml(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("compare"), tune=None, seeds=[0, 1])


@pytest.mark.slow
def test_a_study_from_end_to_end(study_yaml, tmp_path, capfd):
    """Two processes; what fails is named with the command that repeats it, and goes on."""
    words = ["compare", str(study_yaml), "--output", str(tmp_path / "out"), "--jobs", "2"]
    assert main([*words, "methods.moe.adapter={peft_type: HRA}"]) == 0
    shown = capfd.readouterr()
    for line in (
        "lora    as written  2  3,584       0      +0.0 %      baseline",
        "moe     r = 28         3,584       0      +0.0 %",
        "final       4 cells: seeds 0, 1, scored on test rows",
        "float32 on cpu, 1 threads",
        "rates not tuned, two seeds: shows the tool, decides nothing",
    ):
        assert line in shown.out, shown.out
    assert shown.err.count("validation loss") == 4
    results = read_results(tmp_path / "out")
    assert len(results.final) == 4
    pids = {path.name for path in (tmp_path / "out" / "logs").iterdir()}
    assert len(pids) == 2
    assert main([*words, "methods.moe.adapter={peft_type: HRA}"]) == 0
    again = capfd.readouterr()
    assert "validation loss" not in again.err
    assert shown.out.splitlines()[-4:] == again.out.splitlines()[-4:]


def test_dry_run_writes_nothing(study_yaml, capsys):
    before = sorted(study_yaml.parent.rglob("*"))
    assert main(["compare", str(study_yaml), "--dry-run", "seeds=[4, 5, 6]"]) == 0
    assert "final       6 cells: seeds 4, 5, 6" in capsys.readouterr().out
    assert sorted(study_yaml.parent.rglob("*")) == before


@pytest.mark.slow
def test_one_command_for_each_cell(study_yaml, tmp_path, capfd):
    """One of the methods has operations that cannot be counted."""
    words = ["compare", str(study_yaml), "seeds=[3]", "--output", str(tmp_path / "a b"),
             "methods.moe.adapter={peft_type: LOHA}"]  # fmt: skip
    assert main([*words, "--print-cells"]) == 0
    commands = capfd.readouterr().out.splitlines()
    assert len(commands) == 2
    for command in commands:
        name, *given = shlex.split(command)
        assert name == "rotmole"
        assert main(given) == 0
    assert "final/moe/seed-3: finished" in capfd.readouterr().out
    results = read_results(tmp_path / "a b")
    assert [cell.flops is None for cell in results.final] == [False, True]
    assert main([*words, "--print-cells"]) == 0
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_command(study_yaml, tmp_path, capfd):
    rows = study_yaml.parent / "data" / "sums.test.jsonl"
    whole = rows.read_text()
    words = ["compare", str(study_yaml), "seeds=[0]", "--output", str(tmp_path / "out")]
    rows.write_text(whole + '{"prompt": "1 plus"}\n')
    try:
        assert main(words) == 1
    finally:
        rows.write_text(whole)
    said = capfd.readouterr().err
    assert "failed: final/lora/seed-0: " in said
    repeat = next(line for line in said.splitlines() if "repeat it with: " in line)
    assert main(shlex.split(repeat.partition(": ")[2])[1:]) == 0
    assert "final/lora/seed-0: finished" in capfd.readouterr().out
    assert main(words) == 0


def test_mistakes_end_with_code_2(study_yaml, tmp_path, capsys):
    assert main(["compare", str(study_yaml), "--output", str(tmp_path), "baseline=x"]) == 2
    assert "baseline is 'x'; it must be one of lora, moe" in capsys.readouterr().err
    assert main(["compare", str(study_yaml), "--output", str(tmp_path), "--cell", "no"]) == 2
    assert "there is no cell 'no'" in capsys.readouterr().err


def test_check_reads_a_study(study_yaml, capsys):
    before = sorted(study_yaml.parent.rglob("*"))
    assert main(["check", str(study_yaml)]) == 0
    out = capsys.readouterr().out
    for words in (
        "moe     r = 3 or 4  2  3,648       512    +1.8 %",
        "sums    test", "example     colours", "price       about",
        f"no mistakes found in {study_yaml}",
    ):  # fmt: skip
        assert words in out, out
    header = next(line for line in out.splitlines() if line.startswith("method  cells"))
    assert header.split() == ["method", "cells", "updates", "tokens", "s/update", "a", "cell",
                              "all", "cells", "memory"]  # fmt: skip
    (line,) = (line for line in out.splitlines() if line.startswith("lora    2"))
    assert line.split()[2] == "4"  # updates
    assert float(line.split()[4]) > 0
    assert max(map(len, out.splitlines())) <= 90 + len(str(study_yaml))
    assert sorted(study_yaml.parent.rglob("*")) == before
    assert main(["check", str(study_yaml), "seeds=[]", "baselin=1"]) == 2
    assert "did you mean 'baseline'?" in capsys.readouterr().err
    assert main(["check", str(study_yaml), "metrics=[nll,chrf]"]) == 2
    assert "metrics is 'chrf'; it must be one of nll, greedy_match, " in capsys.readouterr().err


def test_check_prices_a_model_without_weights_and_a_method_that_cannot_be_traced(
    study_yaml, tmp_path, capsys
):
    model = shutil.copytree(study_yaml.parent / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    words = [f"model.name={model}", "methods.moe={adapter: {peft_type: LOHA}}"]
    assert main(["check", str(study_yaml), *words]) == 0
    shown = capsys.readouterr()
    assert "estimating an update of lora" in shown.err
    assert "no weights here" in shown.out
    lines = {line.split()[0]: line.split() for line in shown.out.splitlines() if line.strip()}
    assert float(lines["lora"][4]) > 0
    assert lines["moe"][-4:] == ["-", "-", "-", "-"]
    assert "moe: the operations depend on values" in shown.out
    assert "for 2 cells in one process" in shown.out


def test_the_live_table_fits_80_columns(study_yaml, tmp_path):
    from rich.console import Console

    study = load_study(study_yaml, output=tmp_path / "out")
    fix_machine(study)
    progress = look(study, 1, time.time())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(progress_table(study, progress, time.monotonic()))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "0/2" in text
    assert summary(progress, time.monotonic()) == "0 done, 0 running, 4 left, 0 s so far"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "to_all"),
    [
        (signal.SIGINT, True),  # as a terminal sends it
        (signal.SIGINT, False),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.heavy),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(study_yaml, tmp_path, stop, to_all):
    output = tmp_path / "out"
    words = [sys.executable, "-m", "rotmole_cli", "compare", str(study_yaml), "seeds=[0]",
             "--output", str(output), "training.max_steps=100000", "training.save_steps=50000",
             "training.eval_steps=50000"]  # fmt: skip
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = output / "cells/final/lora/seed-0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, stop) if to_all else process.send_signal(stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, err
    if stop == signal.SIGINT:
        assert "go on with: rotmole compare" in out
    (checkpoint,) = log.parent.glob("checkpoint-*")
    assert json.loads((checkpoint / "COMPLETE.json").read_text())
    assert yaml.safe_load((output / "study.yaml").read_text())["baseline"] == "lora"
