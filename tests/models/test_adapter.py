from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import rotmole
import tiny
from rotmole.errors import AdapterError
from rotmole.models.adapter import check_adapter_folder


@pytest.fixture
def folder(tmp_path):
    """A RotMoLE adapter as PEFT saves it."""
    config = rotmole.RotMoleConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config)
    model.peft_config["default"].base_model_name_or_path = "somewhere"
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def change(folder, remove=(), **values):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def test_what_peft_saves_is_right(folder):
    assert check_adapter_folder(folder)["peft_type"] == "ROTMOLE"


@pytest.mark.parametrize("rotation", ["none", "givens", "radar_pairs", "cayley"])
def test_every_mode_as_saved_is_right(tmp_path, rotation):
    config = rotmole.RotMoleConfig(
        target_modules="all-linear", rotation=rotation, rank_pattern={"q_proj": 4},
        layers_to_transform=None, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny.llama(), config)
    model.peft_config["default"].base_model_name_or_path = "somewhere"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert check_adapter_folder(tmp_path)["rotation"] == rotation


def test_another_method_is_none_of_our_business(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    change(tmp_path, something_new=1)
    assert check_adapter_folder(tmp_path)["peft_type"] == "LORA"


@pytest.mark.parametrize("text", ["", "{", '{"r": 4,}', "\ufffe", "[1]", '"x"'])
def test_a_configuration_that_is_no_json_object(folder, text):
    (folder / "adapter_config.json").write_text(text, encoding="utf-16")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: not JSON"):
        check_adapter_folder(folder)
    (folder / "adapter_config.json").write_text(text or "null", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: (not JSON|a JSON)"):
        check_adapter_folder(folder)


@pytest.mark.parametrize("key", ["peft_type", "r", "num_experts", "rotation", "target_modules"])
def test_a_missing_key(folder, key):
    change(folder, remove=[key])
    with pytest.raises(AdapterError, match=f"{key} is missing"):
        check_adapter_folder(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("r", -4, "r is -4; it must be a whole number of at least 1"),
        ("r", "many", "r: 'many' is not a whole number"),
        ("lora_alpha", None, "lora_alpha: None is not a number"),
        ("num_experts", 0, "num_experts is 0"),
        ("top_k", 9, "top_k is 9 but num_experts is 4"),
        ("rotation", "tangnt", "did you mean 'tangent'"),
        ("norm_topk_prob", "perhaps", "norm_topk_prob: 'perhaps' is not true or false"),
        ("target_modules", {"q": 1}, "target_modules"),
        ("lora_dropout", 1.5, "lora_dropout is 1.5"),
        ("router_aux_loss_coef", -1, "router_aux_loss_coef is -1"),
        ("format_version", 99, "newer rotmole"),
        ("peft_type", "ROTMOL", "did you mean 'ROTMOLE'"),
    ],
)
def test_a_wrong_value(folder, key, value, words):
    change(folder, **{key: value})
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(folder)
    assert words in str(caught.value)


def test_every_bad_field_at_once(folder):
    change(folder, remove=["rotation"], r=-4, lora_alpha="x", rotaton="none")
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(folder)
    text = str(caught.value)
    for words in ("rotation is missing", "r is -4", "lora_alpha: 'x'", "'rotaton'"):
        assert words in text


def test_an_unknown_key_that_speaks_of_the_mathematics(folder):
    change(folder, expert_temperature=2.0)
    with pytest.raises(AdapterError, match="unknown key 'expert_temperature'"):
        check_adapter_folder(folder)


def test_an_unknown_key_that_does_not(folder):
    change(folder, comment="made on a Sunday")
    with pytest.warns(UserWarning, match="unknown key 'comment' is ignored"):
        check_adapter_folder(folder)


def test_a_missing_folder_or_file(folder):
    with pytest.raises(AdapterError, match="no such folder"):
        check_adapter_folder(folder / "nowhere")
    with pytest.raises(AdapterError, match=r"did you mean '.*adapter'"):
        check_adapter_folder(folder.parent)


def test_weights_missing_cut_short_or_empty(folder):
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    for part in (b"", content[:6], content[: len(content) // 2], content[:-1], b"\xff" * 100):
        file.write_bytes(part)
        with pytest.raises(AdapterError, match=rf"damaged \({len(part)} bytes"):
            check_adapter_folder(folder)
    file.unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        check_adapter_folder(folder)


def test_a_pickle_is_refused_unopened(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle file .* can run code"):
        check_adapter_folder(folder)
