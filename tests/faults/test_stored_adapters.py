"""Broken and foreign adapters: refused with one sentence, by the command line and by PEFT."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import rotmole
import tiny
from rotmole import AdapterError
from tiny_folders import ADAPTER

Command = Callable[..., Any]
WEIGHTS = "adapter_model.safetensors"
B = "base_model.model.model.layers.0.self_attn.q_proj.rotmole_experts.expert_B"
ROUTER = B.replace("expert_B", "router_weight")
FRESH = "1 plus 1 is"
IN_OPEN = 0x20


def alter(adapter: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def configure(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused_by_both(command: Command, base: Path, adapter: Path, *words: str) -> None:
    """One sentence and exit code 2 from the command line; an AdapterError through PEFT."""
    said = command("generate", None, adapter, FRESH)
    assert said.code == 2
    assert all(word in said.error for word in words), said.error
    refused_by_peft(base, adapter, *words)


def refused_by_peft(base: Path, adapter: Path, *words: str) -> None:
    """An AdapterError, in either way of loading, and not one tensor was copied."""
    new = new_adapter(base).get_base_model().state_dict()
    for low in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(0)
        with pytest.raises(AdapterError) as caught:
            PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=low)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
        for name, tensor in model.state_dict().items():
            empty = low and ".rotmole_experts." in name  # made without memory, to be filled
            there = name if name in new else name.replace(".weight", ".base_layer.weight")
            assert tensor.is_meta if empty else same_bits(tensor, new[there]), name


def new_adapter(base: Path) -> PeftModel:
    """The base with an adapter as it is before anything is loaded into it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    return get_peft_model(model, rotmole.RotMoleConfig(**ADAPTER))


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def refused_over(model: PeftModel, adapter: Path, name: str, *words: str) -> None:
    """Refused as an adapter of that name, whose every bit and those of all others stay."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        model.load_adapter(str(adapter), name)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    after = model.state_dict()
    assert all(same_bits(after[key], tensor) for key, tensor in before.items())


# ---- rows 1, 2, 3, 11: the file


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda content: content[:-7], ["its header promises"]),
        (lambda content: content[:40], ["40 bytes", "no readable header"]),
        (lambda content: b"", ["0 bytes", "no readable header"]),
        (lambda content: b"\xff" * 900, ["900 bytes", "no readable header"]),
        (lambda content: bytes(range(256)) * 4, ["1024 bytes"]),
        (lambda content: content[:8] + b"{" * 100 + content[108:], ["no readable header"]),
    ],
    ids=["truncated", "header truncated", "zero-byte", "0xff", "random", "header garbled"],
)
def test_rows_1_and_2_damaged_weights_name_path_size_and_expected_size(
    command: Command, base: Path, adapter: Path, cut: Callable, words: list[str]
) -> None:
    file = adapter / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(cut(whole))
    if words[0] == "its header promises" and len(words) == 1:
        words = [f"{len(whole) - 7} bytes", f"its header promises {len(whole)}"]
    refused_by_both(command, base, adapter, "damaged", "copy or save it again", WEIGHTS, *words)


def test_row_3_a_configuration_without_weights(command: Command, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    for verb, rest in (("generate", [FRESH]), ("doctor", [])):
        said = command(verb, None, adapter, *rest)
        assert said.code == 2
        text = said.error + said.output
        assert f"has a configuration but no {WEIGHTS}" in text
        assert str(adapter) in text


def test_row_11_a_pickle_is_never_opened(command: Command, base: Path, adapter: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(mark),))

    mark = str(adapter / "it ran")
    (adapter / WEIGHTS).unlink()
    pickle = adapter / "adapter_model.bin"
    torch.save({"x": Payload()}, pickle)
    with openings(pickle) as seen:
        refused_by_both(command, base, adapter, "pickle", "adapter_model.bin", "can run code")
        assert command("doctor", None, adapter).code == 2
    assert seen == []
    assert not Path(mark).exists()
    with openings(pickle) as seen:
        pickle.read_bytes()
    assert len(seen) == 1  # such a watch does see it


@contextmanager
def openings(file: Path) -> Iterator[list[int]]:
    """Note each time that any process opens the file: the kernel's own word (inotify)."""
    libc, seen = ctypes.CDLL(None, use_errno=True), []
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(file), IN_OPEN) > 0
    try:
        yield seen
        with suppress(BlockingIOError):
            while event := os.read(watch, 16):
                seen.append(event[0])
    finally:
        os.close(watch)


# ---- rows 6 to 10: the tensors


def drop(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(B), ["1 tensor is missing", "layers.0", "expert_B"]),
        (drop(ROUTER), ["1 tensor is missing", "router_weight"]),
        (put(B + "2", torch.ones(3)), ["1 tensor is unknown", "expert_B2"]),
        (put("base_model.model.extra", torch.ones(3)), ["1 tensor is unknown", "model.extra"]),
        (
            put(B.replace("layers.0", "layers.7"), torch.ones(4, 4, 32)),
            ["1 tensor is unknown", "layers.7"],
        ),
        (put(B, torch.full((4, 4, 32), torch.nan)), ["expert_B", "512 values", "NaN or infinite"]),
        (
            put(ROUTER, torch.tensor([torch.inf] * 2 + [0.0] * 126).reshape(4, 32)),
            ["router_weight", "2 values", "NaN or infinite"],
        ),
        (put(B, torch.ones(4, 4, 32, dtype=torch.int64)), ["expert_B", "float32", "stored as"]),
        (put(B, torch.ones(4, 4, 32, dtype=torch.bool)), ["expert_B", "float32", "stored as"]),
        (put(B, torch.ones(4, 4, 32).to(torch.float8_e4m3fn)), ["expert_B", "stored as"]),
        (put(B, torch.ones(4, 4, 40)), ["expert_B", "(4, 4, 40)", "(4, 4, 32)"]),
        (put(ROUTER, torch.ones(4, 31)), ["router_weight", "(4, 31)", "(4, 32)"]),
    ],
    ids=[
        "B missing", "router missing", "extra", "extra elsewhere", "extra layer", "NaN", "Inf",
        "integer", "bool", "8-bit float", "width of B", "width of router",
    ],
)  # fmt: skip
def test_rows_6_to_10_tensors_that_do_not_belong(
    command: Command, base: Path, adapter: Path, change: Callable, words: list[str]
) -> None:
    model = new_adapter(base)
    alter(adapter, change)
    refused_by_both(command, base, adapter, *words)
    refused_over(model, adapter, "default", *words)


def test_what_is_refused_would_have_changed_every_tensor(base: Path, adapter: Path) -> None:
    """Without that, a load that began would not be seen above."""
    new = get_peft_model_state_dict(new_adapter(base))
    stored = load_file(adapter / WEIGHTS)
    assert stored.keys() == new.keys()
    assert not any((tensor == new[name]).any() for name, tensor in stored.items())
    model = AutoModelForCausalLM.from_pretrained(base)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, str(adapter)))
    assert all(same_bits(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_row_9_a_state_that_no_file_holds_is_checked_too(
    base: Path, adapter: Path, dtype: torch.dtype
) -> None:
    model = new_adapter(base)
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    wrong = load_file(adapter / WEIGHTS)
    wrong[B] = torch.ones_like(wrong[B]).to(dtype)
    with pytest.raises(AdapterError, match="stored as"):
        set_peft_model_state_dict(model, wrong)
    after = get_peft_model_state_dict(model)
    assert all(same_bits(value, after[name]) for name, value in before.items())


def test_a_second_adapter_is_checked_and_the_first_keeps_its_weights(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    second = tmp_path / "second"
    new_adapter(base).save_pretrained(second)
    alter(second, put(B, torch.full((4, 4, 32), torch.nan)))
    refused_over(model, second, "second", "NaN or infinite")
    refused_over(model, second, "default", "NaN or infinite")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 2}, ["r is 2 in adapter_config.json", "have 4"]),
        ({"num_experts": 3}, ["num_experts is 3 in adapter_config.json", "have 4"]),
        ({"num_experts": 8, "r": 16}, ["num_experts is 8", "r is 16"]),
    ],
)
def test_row_10_rank_and_experts_are_compared_before_any_model_loads(
    command: Command, base: Path, adapter: Path, changes: dict, words: list[str]
) -> None:
    configure(adapter, **changes)
    said = command("generate", None, adapter, FRESH, before=NO_MODEL)
    assert said.code == 2
    assert all(word in said.error for word in words), said.error
    refused_by_both(command, base, adapter, *words)


NO_MODEL = """
import transformers
def loads(*args, **kwargs):
    raise AssertionError("a model was loaded")
transformers.AutoModelForCausalLM.from_pretrained = loads
"""


def other_base(folder: Path, base: Path, **sizes: object) -> Path:
    """Write a model with the tokenizer of `base`."""
    shutil.copytree(base, folder)
    settings = {"vocab_size": 257, "eos_token_id": 0, "bos_token_id": None}
    tiny.llama(**(settings | sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", [True, False], ids=["fingerprint", "adapter of release 0.1.0"])
def test_row_10_another_base_width_is_said_before_weights_load(
    command: Command, base: Path, adapter: Path, tmp_path: Path, known: bool
) -> None:
    wide = other_base(tmp_path / "wide", base, hidden_size=64)
    configure(adapter, base_model_name_or_path=str(wide))
    words = ["down_proj is 2 x 48 -> 64, not 2 x 48 -> 32", str(wide)]
    if not known:
        configure(adapter, base_fingerprint=None)
        words = ["expert_B", "(4, 4, 32)", "(4, 4, 64)"]
    refused_by_both(command, wide, adapter, *words)


# ---- row 13: the base model, and the module named for it


def test_row_13_another_architecture_is_an_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = tiny.gpt2()
    with pytest.raises(AdapterError, match=r"architecture 'llama'.*'gpt2'"):
        PeftModel.from_pretrained(model, str(adapter))
    fewer = tiny.llama(num_hidden_layers=1)
    with pytest.raises(AdapterError, match="k_proj is 1 x 32 -> 16, not 2 x 32 -> 16"):
        PeftModel.from_pretrained(fewer, str(adapter))


def notices(model: torch.nn.Module, adapter: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, str(adapter))
    return [str(w.message) for w in caught if "base model" in str(w.message)]


def test_row_13_another_name_path_or_norm_alone_is_one_warning_that_names_both(
    command: Command, base: Path, adapter: Path, tmp_path: Path
) -> None:
    load = AutoModelForCausalLM.from_pretrained
    assert notices(load(base), adapter) == []
    assert notices(load(base, dtype=torch.bfloat16), adapter) == []  # the format does not matter
    shutil.copytree(base, tmp_path / "copy")
    (told,) = notices(load(tmp_path / "copy"), adapter)
    assert str(base) in told
    assert str(tmp_path / "copy") in told
    assert "probably a copy" in told
    changed = load(base)
    changed.model.norm.weight.data[0] = 2.0
    changed.save_pretrained(tmp_path / "copy")
    (told,) = notices(changed, adapter)
    assert "the weights differ" in told
    configure(adapter, base_model_name_or_path=str(tmp_path / "copy"))
    said = command("generate", None, adapter, FRESH, "--max-new-tokens", 1)
    assert said.code == 0
    assert said.error.count("warning:") == 1
    assert "the weights differ" in said.error


def test_row_13_the_fingerprint_survives_every_way_of_saving(base: Path, tmp_path: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    config = rotmole.RotMoleConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "peft")
    PeftModel.from_pretrained(load(base), tmp_path / "peft").save_pretrained(tmp_path / "again")
    plain = load(base)
    if Version(version("peft")) < Version(MIN_PEFT_VERSION):  # transformers 5.24 came before it
        with pytest.raises(ValueError, match=f">= {MIN_PEFT_VERSION}"):
            plain.add_adapter(LoraConfig(target_modules=["q_proj"]))
    else:
        plain.add_adapter(rotmole.RotMoleConfig(r=4, target_modules=["q_proj"]))
        plain.save_pretrained(tmp_path / "transformers")
    saved = [
        json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"]
        for folder in (tmp_path / "peft", tmp_path / "again", tmp_path / "transformers")
        if folder.exists()
    ]
    assert len(saved) >= 2
    assert all(found == saved[0] for found in saved)
    assert saved[0]["architecture"] == "llama"
    assert saved[0]["shapes"]["q_proj"] == "2 x 32 -> 32"
    assert saved[0]["final_norm"].startswith("sha256:")
    # one configuration for two models in a row is no saved one
    config.base_model_name_or_path = None
    other = get_peft_model(tiny.llama(hidden_size=64), config)
    assert other.peft_config["default"].base_fingerprint["shapes"]["q_proj"] == "2 x 64 -> 64"


def test_row_13_auto_mapping_to_a_foreign_module_is_ignored(
    command: Command, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\n")
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    configure(adapter, auto_mapping=mapping, task_type=None)
    said = command("generate", None, adapter, FRESH, "--max-new-tokens", 1)
    assert said.code == 0
    assert "auto_mapping names the module 'evil'" in said.error
    with pytest.warns(UserWarning, match="'evil', which is not part of transformers"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    assert model.peft_config["default"].auto_mapping is None
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("value", [3, {}, {"architecture": 1, "shapes": [], "final_norm": None}])
def test_a_fingerprint_that_is_none_is_a_bad_field(
    command: Command, adapter: Path, value: object
) -> None:
    configure(adapter, base_fingerprint=value)
    said = command("generate", None, adapter, FRESH)
    assert said.code == 2
    assert "base_fingerprint" in said.error
