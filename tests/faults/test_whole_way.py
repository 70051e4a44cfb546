"""From start to end through the command line: offline, odd paths, no pickle, no memory, no code."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rotmole.training.callbacks.metrics import TIMING_SUFFIXES, read_metrics

Command = Callable[..., Any]

WATCH = """
import os, sys, torch
seen = open({log!r}, "a", buffering=1)
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        seen.write(f"network {{arguments}}\\n")
    if event == "pickle.find_class":
        seen.write(f"pickle {{arguments}}\\n")
sys.addaudithook(audit)
load = torch.load
def noted(file, *args, **kwargs):
    seen.write(f"torch.load {{file}} weights_only={{kwargs.get('weights_only')}}\\n")
    return load(file, *args, **kwargs)
torch.load = noted
"""


def with_validation(settings: dict, folder: Path) -> dict:
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8")
    (folder / "more.jsonl").write_text(rows, encoding="utf-8")
    settings["data"]["tasks"]["sums"]["files"]["validation"] = "more.jsonl"
    settings["training"] |= {"save_steps": 1, "eval_steps": 1, "logging_steps": 1}
    settings["evaluation"] = {"limit": 2, "max_new_tokens": 2}
    return settings


@pytest.mark.slow
def test_offline_from_start_to_end_and_nothing_is_unpickled_but_the_trainers_own_state(
    command: Command, settings: dict, tmp_path: Path
) -> None:
    """Train, resume, eval, generate, doctor with HF_HUB_OFFLINE=1, in a process each."""
    log, out = tmp_path / "seen.txt", Path(settings["output_dir"])
    options = {"before": WATCH.format(log=str(log)), "HF_HUB_OFFLINE": "1"}
    given = with_validation(settings, tmp_path)
    assert command("train", given, **options).code == 0
    assert command("eval", None, out, **options).code == 0
    assert command("generate", None, out, "1 plus", "--max-new-tokens", 2, **options).code == 0
    assert command("doctor", None, out / "adapter", **options).code == 0
    assert not [line for line in log.read_text().splitlines() if "network" in line]
    assert not [line for line in log.read_text().splitlines() if line.startswith("pickle")]
    shutil.rmtree(out / "adapter")  # an unfinished run
    shutil.rmtree(out / "checkpoint-2")
    log.write_text("")
    said = command("train", given, "--resume", "auto", **options)
    assert said.code == 0, said.error
    lines = log.read_text().splitlines()
    loaded = [line.split() for line in lines if line.startswith("torch.load")]
    assert loaded
    assert all(Path(path).is_relative_to(out / "checkpoint-1") for _, path, _ in loaded)
    assert all(flag in ("weights_only=True", "weights_only=None") for _, _, flag in loaded), loaded
    assert not [line for line in lines if "network" in line]
    written = [path for path in out.rglob("*") if path.suffix in (".bin", ".pkl", ".pickle")]
    assert {path.name for path in written} <= {"training_args.bin"}


@pytest.mark.slow
def test_a_cut_run_goes_on_to_the_straight_runs_losses_and_weights(
    command: Command, settings: dict, tmp_path: Path
) -> None:
    """Cut after the first update, at the end of an epoch (4 updates) and inside the next one."""
    out = Path(settings["output_dir"])
    given = with_validation(settings, tmp_path)
    given["adapter"] |= {"num_experts": 3, "lora_dropout": 0.1, "router_aux_loss_coef": 0.1}
    given["training"] |= {
        "max_steps": 7, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "save_total_limit": 9,
    }  # fmt: skip
    assert command("train", given).code == 0
    rows, weights = metrics(out), load_file(out / "adapter" / "adapter_model.safetensors")
    assert {"loss", "eval_loss", "router_aux_loss", "train_loss"} <= {
        key for r in rows for key in r
    }
    for step, path in ((1, "auto"), (4, out / "checkpoint-4"), (6, "auto")):
        assert (out / "checkpoint-7").is_dir()
        shutil.rmtree(out / "adapter")
        for later in range(step + 1, 8):
            shutil.rmtree(out / f"checkpoint-{later}")
        said = command("train", given, "--resume", path)
        assert said.code == 0, said.error
        assert f"going on from {out / f'checkpoint-{step}'}" in said.error
        assert metrics(out) == rows
        found = load_file(out / "adapter" / "adapter_model.safetensors")
        assert found.keys() == weights.keys()
        assert not [name for name, value in weights.items() if not value.equal(found[name])]


@pytest.mark.slow
def test_rows_20_21_and_25_by_the_command(command: Command, settings: dict, tmp_path: Path) -> None:
    """The newest two damaged, the last one's optimizer gone, then another rank and top_k."""
    out = Path(settings["output_dir"])
    given = with_validation(settings, tmp_path)
    given["training"] |= {"max_steps": 4, "save_total_limit": 9}
    assert command("train", given).code == 0
    rows, files = metrics(out), ["adapter_model.safetensors", "optimizer.pt"]
    shutil.rmtree(out / "adapter")
    newest, next_one = (out / "checkpoint-4" / files[0], out / "checkpoint-3" / files[1])
    newest.write_bytes(b"")
    next_one.write_bytes(next_one.read_bytes()[:-9])
    said = command("train", given, "--resume", "auto")
    assert said.code == 0, said.error
    for path in (newest, next_one):
        assert f"skipped {path.parent}: {path.name} has" in said.error
    assert f"going on from {out / 'checkpoint-2'}" in said.error
    assert metrics(out) == rows

    for path in out.glob("checkpoint-[123]"):
        shutil.rmtree(path)
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    given["training"]["max_steps"] = 5
    said = command("train", given, "--resume", "auto")
    assert said.code == 2
    assert "optimizer.pt is missing, or add --weights-only" in said.error
    said = command("train", given, "--resume", "auto", "--weights-only")
    assert said.code == 0, said.error
    assert [row["step"] for row in metrics(out) if "loss" in row] == [1, 2, 3, 4, 5]

    papers = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for setting, flags, told in (
        ("adapter.r=2", ["--allow-change"], "adapter.r is 2, the checkpoint has 4"),
        ("adapter.top_k=1", [], "adapter.top_k is 1, the checkpoint has"),
    ):
        said = command("train", given, setting, "--resume", "auto", *flags)
        assert said.code == 2
        assert told in said.error
        assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == papers
    longer = ["training.max_steps=6", "adapter.top_k=1", "--resume", "auto", "--allow-change"]
    said = command("train", given, *longer)
    assert said.code == 0, said.error
    assert "going on with a change: adapter.top_k is 1" in said.error


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every row, without what tells of time and memory."""
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMING_SUFFIXES)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("name", ["ünïcödé 模型", "with space", "наборы'\"$(x)"])
@pytest.mark.slow
def test_paths_in_any_script(command: Command, settings: dict, tmp_path: Path, name: str) -> None:
    odd = tmp_path / name
    shutil.copytree(settings["model"]["name"], odd / "base")
    shutil.copy(tmp_path / "rows.jsonl", odd / f"{name}.jsonl")
    settings["model"]["name"] = str(odd / "base")
    settings["output_dir"] = str(odd / "run")
    settings["data"]["root"] = str(odd)
    settings["data"]["tasks"] = {
        name: {"source": "jsonl", "files": {"train": f"{name}.jsonl"}},
    }
    said = command("train", settings)
    assert said.code == 0, said.error
    assert load_file(odd / "run/adapter/adapter_model.safetensors")
    said = command("generate", None, odd / "run", "1 plus", "--max-new-tokens", 2)
    assert said.code == 0, said.error


@pytest.mark.heavy
def test_a_terminal_that_cannot_show_a_letter(
    command: Command, settings: dict, tmp_path: Path
) -> None:
    """Truly cold: the encoding of the streams is fixed when Python starts."""
    settings["output_dir"] = str(tmp_path / "模型")
    said = command("train", settings, cold=True, PYTHONIOENCODING="ascii")
    assert said.code == 0, said.error
    assert "\\u6a21" in said.output


SMALL = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
"""


def test_out_of_memory_is_one_sentence_with_advice(
    command: Command, settings: dict, tmp_path: Path
) -> None:
    """The real allocator refuses: the process may grow by 400 MB, the batch needs more."""
    row = json.dumps({"prompt": "x " * 1800, "completion": " 2"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 32)
    settings["training"] |= {"per_device_train_batch_size": 32, "max_length": 4000}
    settings["model"]["attn_implementation"] = "eager"
    said = command("train", settings, before=SMALL.format(room=400_000_000))
    assert said.code == 1, said.error
    for words in ("out of memory", "per_device_train_batch_size", "max_length", "quantization"):
        assert words in said.error, said.error
    assert not (Path(settings["output_dir"]) / "adapter").exists()


REMOTE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_of_a_model_runs_by_the_flag_alone(
    command: Command, settings: dict, base: Path, tmp_path: Path
) -> None:
    odd, mark = tmp_path / "odd", tmp_path / "it ran"
    shutil.copytree(base, odd)
    (odd / "odd.py").write_text(REMOTE.format(mark=str(mark)))
    config = json.loads((odd / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddModel"]}
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    (odd / "config.json").write_text(json.dumps(config))
    settings["model"]["name"] = str(odd)
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    for verb in ("check", "train"):
        said = command(verb, settings, **env)
        assert said.code == 2
        assert "--trust-remote-code" in said.error
    settings["model"]["trust_remote_code"] = True
    assert command("check", settings, **env).code == 2  # a run file has no such setting
    del settings["model"]["trust_remote_code"]
    said = command("train", settings, "training.trust_remote_code=true", **env)
    assert said.code == 2
    assert not mark.exists()
    before = (
        f"import transformers.dynamic_module_utils as d\nd.HF_MODULES_CACHE = {str(tmp_path)!r}"
    )
    said = command("train", settings, "--trust-remote-code", before=before, **env)
    assert said.code == 0, said.error
    assert mark.exists()


def test_debug_shows_the_traceback_and_nothing_else_does(command: Command, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    said = command("generate", None, adapter, "x")
    assert said.code == 2
    assert said.error.count("\n") == 1
    said = command("generate", None, adapter, "x", "--debug", traceback=True)
    assert said.code == 2
    assert "Traceback" in said.error


@pytest.mark.heavy
def test_row_15_truly_cold(command: Command, settings: dict) -> None:
    settings["adapter"]["num_expert"] = 3
    said = command("check", settings, cold=True)
    assert said.code == 2
    assert "did you mean 'num_experts'" in said.error


@pytest.mark.heavy
def test_rows_1_and_4_truly_cold(command: Command, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    said = command("generate", None, adapter, "x", cold=True)
    assert said.code == 2
    assert "its header promises" in said.error
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": -4}))
    said = command("generate", None, adapter, "x", cold=True)
    assert said.code == 2
    assert "r is -4" in said.error


@pytest.mark.heavy
def test_rows_18_and_23_truly_cold(command: Command, settings: dict, tmp_path: Path) -> None:
    settings["training"] |= {"learning_rate": 1e30, "max_steps": 8, "warmup_steps": 0}
    said = command("train", settings, cold=True)
    assert said.code == 3
    assert "not finite" in said.error
    assert (Path(settings["output_dir"]) / "failure.json").is_file()
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("{nonsense\n")
    settings["output_dir"] = str(tmp_path / "other")
    said = command("train", settings, cold=True)
    assert said.code == 2
    assert "rows.jsonl: row 9 is not JSON" in said.error


@contextmanager
def ignored() -> Iterator[None]:
    """PEFT itself warns of names that are part of its prefix, such as the empty one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_row_12_names_that_lead_elsewhere(command: Command, settings: dict, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    import rotmole
    import tiny

    config = rotmole.RotMoleConfig(r=4, target_modules=["q_proj"])
    for name in ("/abs", "../x", "a/b", "", ".", "..", "a\\b", "a.b", "x\0", " a", "C:", "é" * 200):
        with pytest.raises(rotmole.AdapterError, match="one folder name"), ignored():
            get_peft_model(tiny.llama(), config, name)
    model = get_peft_model(tiny.llama(), config, "schön 1")
    with pytest.raises(rotmole.AdapterError, match="one folder name"):
        model.add_adapter("../x", config)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/schön 1/adapter_model.safetensors").is_file()
    for name in ("/abs", "../x", "a/b", ""):
        with pytest.raises(rotmole.AdapterError, match="one folder name"), ignored():
            PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved/schön 1", adapter_name=name)
        with pytest.raises(rotmole.AdapterError, match="one folder name"), ignored():
            model.load_adapter(tmp_path / "saved/schön 1", adapter_name=name)
    model.save_pretrained(tmp_path / "saved")
    assert not Path("/abs").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "saved"}
    settings["output_dir"] = ""
    said = command("train", settings)
    assert said.code == 2
    assert "output_dir" in said.error
