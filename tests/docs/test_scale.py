"""The computed tables are what their script writes; the job script runs what it promises."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

import rotmole.config
from docs_scripts import script
from rotmole_cli.commands import app

ROOT = Path(__file__).parents[2]
JOB = Path(rotmole.config.__file__).parent / "launch" / "slurm.sh"
SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    return script("model_sizes")


def committed(page: str, name: str) -> str:
    return page.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->", maxsplit=1)[0]


@pytest.mark.slow
def test_the_table_of_sizes_is_what_the_script_computes(sizes: ModuleType) -> None:
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert committed(page, "sizes") == sizes.size_table(), "run `make pages`"


@pytest.mark.heavy
def test_the_table_of_memory_is_what_the_script_computes(sizes: ModuleType) -> None:
    """One line is computed here, as a line takes twenty seconds; all have the script's form."""
    lines = committed(SCALE, "memory").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert sizes.memory_table(rows) == "\n".join(lines), "run `make pages`"
    assert [row[:2] for row in rows] == [[m, t] for m in sizes.LARGE for t in sizes.TARGETS]
    assert sizes.memory_row(*rows[0][:2]) == rows[0], "run `make pages`"
    for row in rows:
        w, state, few, many, ddp, ddp_many, fsdp, four_bits = map(float, row[2:])
        assert ddp == pytest.approx(w + state + few, abs=0.16)
        assert ddp_many == pytest.approx(w + state + many, abs=0.16)
        assert four_bits < ddp < ddp_many < 80
        assert fsdp > (w + state) / sizes.GPUS + few - 0.2


def job_in(folder: Path, exit_code: int) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the job script with stand-ins for srun, scontrol and rotmole; return what they noted."""
    notes = folder / "notes"
    stand_ins = {
        "srun": 'echo "srun $1" >> $NOTES; shift; export SLURM_PROCID=3 SLURM_LOCALID=1; "$@"',
        "scontrol": 'echo "scontrol $*" >> $NOTES; [ "$1" != show ] || printf "n1\\nn2\\n"',
        "rotmole": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >> $NOTES; '
        f'echo "rotmole $*" >> $NOTES; exit {exit_code}',
    }
    for name, text in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "16",
        "PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes),
    }  # fmt: skip
    done = subprocess.run(["bash", JOB], env=slurm, text=True, capture_output=True, check=False)
    return done, notes.read_text(encoding="utf-8")


def test_the_job_runs_one_process_a_task_and_is_requeued_only_after_a_signal(
    tmp_path: Path,
) -> None:
    done, notes = job_in(tmp_path, 143)
    assert (done.returncode, done.stderr) == (143, "")
    assert notes.splitlines() == [
        "scontrol show hostnames n[1-2]",
        "srun --kill-on-bad-exit=1",
        "3 1 16 n1 22345",
        "rotmole train run.yaml --resume auto training.fsdp=true",
        "scontrol requeue 12345",
    ]
    for code in (0, 2):
        folder = tmp_path / str(code)
        folder.mkdir()
        done, notes = job_in(folder, code)
        assert done.returncode == code
        assert "requeue" not in notes


def command_lines() -> list[str]:
    """Every rotmole command of scale.md and of the job script, without its launcher."""
    blocks = re.findall(r"^ {4}(.*)$", SCALE, re.MULTILINE)
    lines = blocks + JOB.read_text(encoding="utf-8").splitlines()
    found = [re.search(r"(?:^run rotmole|^rotmole|-m rotmole_cli) (.*)", line) for line in lines]
    return [match[1] for match in found if match]


def test_every_command_of_scale_md_and_of_the_job_is_one_that_rotmole_knows() -> None:
    lines = command_lines()
    assert len(lines) >= 9
    for line in lines:
        name, *arguments = shlex.split(line)
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined] # a group
        command.make_context(name, arguments)


def test_the_slurm_settings_agree_with_the_page() -> None:
    settings = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", JOB.read_text("utf-8"), re.M))
    assert settings["ntasks-per-node"] == settings["gpus-per-node"] == "8"
    assert settings["nodes"] == "2"
    assert settings["signal"] == "TERM@120"
    assert "#SBATCH --requeue" in JOB.read_text("utf-8")
