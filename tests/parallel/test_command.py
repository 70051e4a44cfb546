"""`rotmole train` in two processes: one result whatever the engine, one voice, one folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rotmole.config
import warm
from rotmole.training.callbacks.metrics import TIMING_SUFFIXES, read_metrics
from training_cases import settings, write_data, write_model

pytestmark = pytest.mark.slow

LAUNCH = Path(rotmole.config.__file__).parent / "launch"
COMMON = [
    "adapter.lora_dropout=0", "adapter.router_aux_loss_coef=1", "training.max_steps=6",
    "training.learning_rate=0.1", "training.optim=sgd", "training.max_grad_norm=0",
    "training.save_steps=3", "training.eval_steps=3", "training.warmup_steps=0",
    "training.lr_scheduler_type=constant",
]  # fmt: skip
HALVES = ["training.per_device_train_batch_size=2"]
QUARTERS = [
    "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2",
]  # fmt: skip
FSDP = ["training.fsdp=true"]
WAYS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "unequal parts": (1, ["training.per_device_train_batch_size=1",
                          "training.gradient_accumulation_steps=4"]),
    "ddp": (2, HALVES),
    "ddp without padding": (2, [*HALVES, "training.padding_free=true"]),
    "fsdp": (2, [*QUARTERS, *FSDP]),
    "fsdp sharded": (2, [*HALVES, *FSDP, "training.activation_checkpointing=true",
                         "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"]),
    "fsdp offloaded": (2, [*HALVES, *FSDP, "training.fsdp_config={cpu_offload: true}"]),
}  # fmt: skip
ENGINES: dict[str, tuple[str, int, list[str]]] = {
    "shards in one process": ("fsdp sharded", 1, []),
    "ddp in fsdp": ("ddp", 2, WAYS["fsdp"][1]),
}
"""A folder of one engine, and how another goes on from it."""


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    (root / "data").mkdir()
    content = settings(write_model(root / "model"), write_data(root / "data"), root / "run")
    (root / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return root


def job(case: Path, folder: str, processes: int, *words: str, call: str = "") -> Any:
    line = ["train", str(case / "run.yaml"), f"output_dir={case / folder}", *COMMON, *words]
    arguments: dict[str, Any] = {"words": line}
    if not call and processes > 1:
        call = "watched_command"
        arguments |= {"folder": str(case / folder), "file": str(case / f"{folder}.touched")}
    return {"call": f"warm:{call or 'command'}", "arguments": arguments, "processes": processes}


@pytest.fixture(scope="module")
def runs(case) -> dict[str, list[warm.Rank]]:
    """Every way once, and three ends: resumed, told to stop, not finite."""
    jobs = {name: job(case, name, processes, *words) for name, (processes, words) in WAYS.items()}
    longer = [*HALVES, "training.max_steps=9", "--resume", "auto"]
    jobs["other world"] = job(case, "ddp", 1, *longer)
    jobs["resumed"] = job(case, "ddp", 2, *longer)
    anyhow = ["training.max_steps=10", "--resume", "auto", "--allow-change"]
    jobs["other world allowed"] = job(case, "ddp", 1, *HALVES, *anyhow)
    jobs["fsdp resumed"] = job(case, "fsdp sharded", 2, *WAYS["fsdp sharded"][1], *longer[1:])
    for name, (source, processes, words) in ENGINES.items():
        onward = [*words, "training.max_steps=9", "--allow-change"]
        onward += ["--resume", str(case / source / "checkpoint-6")]
        jobs[f"{name}, refused"] = job(case, f"{name}, refused", processes, *onward)
        jobs[name] = job(case, name, processes, *onward, "--weights-only")
    jobs["straight"] = job(case, "straight", 1, "training.max_steps=9")
    jobs["told to stop"] = job(
        case, "told", 2, *HALVES, "training.max_steps=400", call="stopped_command"
    )
    jobs["cut"] = job(case, "cut", 2, *HALVES, call="cut_command")
    for name, more in {"ddp": [], "fsdp": FSDP}.items():
        jobs[f"{name} not finite"] = job(
            case, f"{name} nan", 2, *HALVES, *more, "training.learning_rate=1e30"
        )
    done = warm.run(list(jobs.values()), case / "streams")
    return dict(zip(jobs, done, strict=True))


def said(ranks: list[warm.Rank]) -> str:
    return "\n".join(rank.out + rank.err for rank in ranks)


def adapter(folder: Path, part: str = "checkpoint-6") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "adapter_model.safetensors")


def assert_close(first: Path, second: Path, part: str = "checkpoint-6") -> None:
    ours, theirs = adapter(first, part), adapter(second, part)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        difference = (value - theirs[name]).abs().max().item()
        assert difference < 1e-5 * value.abs().max().item(), (second.name, name, difference)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "one"])
def test_every_way_gives_one_result(case, runs, name):
    assert [rank.code for rank in runs[name]] == [0] * WAYS[name][0], said(runs[name])
    assert_close(case / "one", case / name)
    parts = [path.name for path in (case / name / "checkpoint-6").iterdir()]
    assert any("pytorch_model_fsdp" in part for part in parts) == ("fsdp" in name)  # it was sharded
    if name not in ("ddp", "fsdp sharded"):  # those two go on, below
        assert_close(case / "one", case / name, "adapter")


@pytest.mark.parametrize("name", [name for name in WAYS if name != "one"])
def test_every_way_logs_the_same_losses(case, runs, name):
    one, other = (read_metrics(case / folder / "metrics.jsonl") for folder in ("one", name))
    for ours, theirs in zip(one[:8], other[:8], strict=True):  # the last tells of time
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if not key.endswith(TIMING_SUFFIXES):
                assert theirs[key] == pytest.approx(value, rel=2e-5), (key, ours, theirs)
    assert {"loss", "eval_loss", "eval_sums_loss", "router_aux_loss"} <= {k for r in one for k in r}


def test_the_first_rank_alone_speaks_and_writes(case, runs):
    for name in ("ddp", "fsdp"):
        first, second = runs[name]
        assert re.search(r"^done +6 updates", first.out, re.MULTILINE)
        assert re.search(r"^validation +6/6 ", first.err, re.MULTILINE)
        assert second.out == ""
        assert second.err == ""
    kept = {path.name for path in (case / "one").iterdir()}
    assert {path.name for path in (case / "fsdp").iterdir()} == kept


OWN = re.compile(
    r"checkpoint-\d+/(\.?(rng_state_1\.pth|sums_1\.json)(\.\w+\.\w+\.tmp)?"
    r"|(pytorch_model_fsdp_0|optimizer_0)(/\.?__1_\d+\.distcp(\.tmp)?)?)"
)
"""A second rank's own: random state and sums, and shards in a folder that is made by any rank."""


@pytest.mark.parametrize("folder", [name for name in WAYS if WAYS[name][0] > 1])
def test_the_second_rank_writes_its_own_state_and_nothing_else(case, runs, folder):
    """By Python: of the folder's last run. By others too: whatever lies there with its stamp."""
    touched = json.loads((case / f"{folder}.touched").read_text(encoding="utf-8"))
    assert "sums_1.json" in " ".join(touched)  # it was watched
    stamped = [
        path.relative_to(case / folder).as_posix()
        for path in (case / folder).rglob("*")
        if path.stat().st_mode & 0o007 == 0o007 & ~warm.STAMP
    ]
    assert "checkpoint-6/rng_state_1.pth" in stamped
    names = [name.partition(" ")[2] for name in touched] + stamped
    assert not [name for name in names if not OWN.fullmatch(name)]
    shards = [name for name in stamped if name.endswith(".distcp")]
    assert bool(shards) == (folder == "fsdp sharded")


def test_a_sharded_run_leaves_an_ordinary_adapter(case, runs):
    ids = torch.arange(3, 15)[None]
    logits = []
    for name in ("straight", "fsdp sharded"):
        base = AutoModelForCausalLM.from_pretrained(case / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, case / name / "adapter").eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    shapes = {name: value.shape for name, value in adapter(case / "one").items()}
    saved = load_file(case / "fsdp sharded" / "checkpoint-3" / "adapter_model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == shapes


@pytest.mark.parametrize(("name", "folder"), [("resumed", "ddp"), ("fsdp resumed", "fsdp sharded")])
def test_a_resume_goes_on_as_one_process_would(case, runs, name, folder):
    assert [rank.code for rank in runs[name]] == [0, 0], said(runs[name])
    assert "going on from" in runs[name][0].err
    assert_close(case / "straight", case / folder, "checkpoint-9")


def test_another_number_of_processes_is_refused(runs):
    (only,) = runs["other world"]
    assert only.code == 2
    assert "processes is 1, the checkpoint has 2" in only.err
    assert "--allow-change" in only.err


def test_another_number_of_processes_that_is_allowed_is_told(case, runs):
    (only,) = runs["other world allowed"]
    assert only.code == 0, only.err
    assert "processes is 1, the checkpoint has 2" in only.err
    papers = json.loads((case / "ddp" / "manifest.json").read_text(encoding="utf-8"))
    assert "processes is 1, the checkpoint has 2" in "; ".join(papers["resumes"][-1]["changes"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "shards in one process",
            "was written by FSDP with shards, which one process or DDP cannot",
        ),
        ("ddp in fsdp", "was written by one process or DDP, which FSDP with whole states cannot"),
    ],
)
def test_another_engine_takes_the_weights_and_refuses_the_rest(case, runs, name, told):
    """SGD without momentum has no state, so that the weights alone give the straight run."""
    for rank in runs[f"{name}, refused"]:
        assert rank.code == 2, rank.err
        assert told in rank.err
        assert "or add --weights-only" in rank.err
        assert "Traceback" not in rank.err
    assert not (case / f"{name}, refused" / "run.yaml").exists()
    assert {rank.code for rank in runs[name]} == {0}, said(runs[name])
    assert_close(case / "straight", case / name, "checkpoint-9")


def test_a_signal_to_one_rank_stops_all_after_saving(case, runs):
    assert [rank.code for rank in runs["told to stop"]] == [143, 143], said(runs["told to stop"])
    (checkpoint,) = (case / "told").glob("checkpoint-*")
    assert (checkpoint / "COMPLETE.json").is_file()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert "--resume auto" in runs["told to stop"][0].out


def test_a_signal_to_one_rank_cuts_the_validation_of_all_short(case, runs):
    assert [rank.code for rank in runs["cut"]] == [143, 143], said(runs["cut"])
    (checkpoint,) = (case / "cut").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    assert not any("eval_loss" in row for row in read_metrics(case / "cut" / "metrics.jsonl"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_stops_all(case, runs, engine):
    assert [rank.code for rank in runs[f"{engine} not finite"]] == [3, 3]
    failure = json.loads((case / f"{engine} nan" / "failure.json").read_text(encoding="utf-8"))
    assert len(failure["rows"]) == 4  # of both ranks


def launched(words: list[str], case: Path, folder: str, **more: str) -> None:
    line = ["-m", "rotmole_cli", "train", str(case / "run.yaml"), *COMMON, *HALVES]
    done = subprocess.run(
        [sys.executable, "-m", *words, *line, f"output_dir={case / folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^done +6 updates", done.stdout, re.MULTILINE)) == 1
    assert re.search(r"^updates +6 of 4 rows", done.stdout, re.MULTILINE)
    assert_close(case / "one", case / folder)


@pytest.mark.heavy  # the ranks above are forked from a warm process instead
def test_torchrun_starts_it(case, runs):
    launched(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], case, "torchrun")


@pytest.mark.heavy  # to torchrun, above, it adds how the shipped files are read
@pytest.mark.parametrize("file", ["ddp", "fsdp2"])
def test_accelerate_starts_it_from_the_shipped_files(case, runs, file):
    config = ["--config_file", str(LAUNCH / f"{file}.yaml"), "--num_processes", "2"]
    port = ["--main_process_port", str(warm.free_port())]
    words = ["accelerate.commands.launch", *config, *port]
    launched(words, case, f"accelerate {file}", ACCELERATE_USE_CPU="true")
    names = {path.name for path in (case / f"accelerate {file}" / "checkpoint-6").iterdir()}
    assert ("pytorch_model_fsdp.bin" in names) == (file == "fsdp2")  # it was sharded, or was not
