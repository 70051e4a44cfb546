"""Saving and loading: the same logits to the last bit, in another process too, by every loader."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from rotmole import AdapterError, ConfigError, ModelError, RotMoleConfig
from rotmole.ops import ROTATIONS
from rotmole.ops.routing.route import select_by

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _config(**settings: object) -> RotMoleConfig:
    return RotMoleConfig(**({"r": 4, "target_modules": TARGETS, "init_weights": False} | settings))


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """Return (base folder, adapter folder, logits of the pair), as training leaves them."""
    root = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    model = get_peft_model(base, _config(task_type="CAUSAL_LM"))
    model.save_pretrained(root / "adapter")
    return root / "base", root / "adapter", _logits(model, tiny.tokens(2, 7))


LOADERS = {
    "PeftModel": "m = PeftModel.from_pretrained("
    "AutoModelForCausalLM.from_pretrained(base), adapter)",
    "low_cpu_mem_usage": "m = PeftModel.from_pretrained("
    "AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)",
    "load_adapter": "m = AutoModelForCausalLM.from_pretrained(base); m.load_adapter(adapter)",
    "AutoPeftModel": "m = AutoPeftModelForCausalLM.from_pretrained(adapter)",
    "AutoModel": "m = AutoModelForCausalLM.from_pretrained(adapter)",
}


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_logits_with_every_loader(
    folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """Before the import PEFT knows no such adapter; the import is silent; then all loaders do."""
    base, adapter, expected = folders
    expected_file = tmp_path / "expected.pt"
    torch.save(expected, expected_file)
    lines = [
        "import logging, sys, torch",
        "from peft import AutoPeftModelForCausalLM, PeftModel",
        "from transformers import AutoModelForCausalLM",
        "base, adapter, expected = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])",
        "try:",
        "    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)",
        "except KeyError as error:",
        "    print(error)",
        "before = list(logging.root.handlers)",
        "import rotmole",
        "assert list(logging.root.handlers) == before",
        "sys.path.insert(0, sys.argv[4])",
        "import tiny",
        "torch.set_num_threads(1)",
    ]
    for name, line in LOADERS.items():
        lines += [
            line,
            "logits = m.eval()(input_ids=tiny.tokens(2, 7)).logits",
            f"assert torch.equal(logits, expected), {name!r}",
            f"print({name!r})",
        ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), base, adapter, expected_file,
         Path(__file__).parents[2]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["'ROTMOLE'", *LOADERS]


@pytest.mark.parametrize("rotation", list(ROTATIONS))
def test_every_mode_reloads_bit_equal(rotation: str, tmp_path: Path) -> None:
    base, ids = tiny.llama(), tiny.tokens(2, 7)
    options = {"radar_rank": 3} if rotation == "radar_pairs" else {}
    model = get_peft_model(copy.deepcopy(base), _config(rotation=rotation, **options))
    expected = _logits(model, ids)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(_logits(again, ids), expected)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(stored) == len(trainable)


def test_two_adapters_switch_disable_delete_and_unload(tmp_path: Path) -> None:
    base, ids = tiny.llama(), tiny.tokens(2, 7)
    plain = _logits(base, ids)
    model = get_peft_model(base, _config())
    first = _logits(model, ids)
    model.add_adapter("other", _config(rotation="givens", num_experts=2, target_modules=["k_proj"]))
    assert torch.equal(_logits(model, ids), first)
    model.set_adapter("other")
    second = _logits(model, ids)
    assert not torch.equal(first, second)
    assert all(".other." in n for n, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(_logits(model, ids), plain)
    assert torch.equal(_logits(model, ids), second)
    model.base_model.set_adapter(["default", "other"])
    both = _logits(model, ids)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(_logits(model, ids), first)
    assert not [n for n, _ in model.named_parameters() if ".other." in n]
    unloaded = model.unload()
    assert torch.equal(_logits(unloaded, ids), plain)
    assert not [n for n, _ in unloaded.named_parameters() if "rotmole" in n]


def test_copy_and_pickle_keep_the_adapter() -> None:
    model, ids = get_peft_model(tiny.llama(), _config(router_aux_loss_coef=0.1)), tiny.tokens(2, 7)
    expected = _logits(model, ids)
    assert torch.equal(_logits(copy.deepcopy(model), ids), expected)
    config = model.peft_config["default"]
    assert pickle.loads(pickle.dumps(config)) == config
    assert json.loads(json.dumps(config.peft_type)) == "ROTMOLE"


def test_modules_to_save_and_token_indices_are_trained_and_stored(tmp_path: Path) -> None:
    base, ids = tiny.llama(), tiny.tokens(2, 7)
    config = _config(modules_to_save=["lm_head"], trainable_token_indices=[3, 4, 5])
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected = _logits(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(PeftModel.from_pretrained(base, tmp_path), ids), expected)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.bert, tiny.t5])
def test_other_architectures_use_pefts_default_targets(make: object, tmp_path: Path) -> None:
    base, ids = make(), tiny.tokens(2, 7)
    inputs = {"input_ids": ids}
    if make is tiny.t5:
        inputs["decoder_input_ids"] = ids
    model = get_peft_model(copy.deepcopy(base), _config(target_modules=None)).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.equal(expected, base.eval()(**inputs).logits)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(again(**inputs).logits, expected)


def test_bfloat16_base_keeps_float32_gates_and_autocast_runs() -> None:
    base, ids = tiny.llama().to(torch.bfloat16), tiny.tokens(2, 7)
    model = get_peft_model(base, _config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits = _logits(model, ids)
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = _logits(model, ids)
    assert (again.float() - logits.float()).abs().max() < 0.05
    pure = get_peft_model(tiny.llama().to(torch.bfloat16), _config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in pure.parameters() if p.requires_grad} == {torch.bfloat16}
    pure(input_ids=ids, labels=ids).loss.backward()


def test_routing_is_the_same_under_autocast() -> None:
    model, ids = get_peft_model(tiny.llama(), _config(num_experts=16)), tiny.tokens(4, 16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x, seen = torch.randn(*ids.shape, 32), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            experts = layer.experts("default")
            _, routed = tiny.addition(experts, x.flatten(0, 1))
        seen.append(select_by(experts.spec, routed.logits_TE))
    assert torch.equal(seen[0].selected_TE, seen[1].selected_TE)
    assert torch.equal(seen[0].weight_TE, seen[1].weight_TE)


def test_layers_and_patterns_choose_rank_alpha_and_depth() -> None:
    config = _config(
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=0,
        rank_pattern={"v_proj": 6},
        alpha_pattern={"v_proj": 3},
    )
    model = get_peft_model(tiny.llama(), config)
    layers = model.base_model.model.model.layers
    assert not hasattr(layers[1].self_attn.q_proj, "rotmole_experts")
    q, v = (getattr(layers[0].self_attn, f"{n}_proj").experts("default") for n in "qv")
    assert q.expert_A.shape[1] == 4
    assert v.expert_A.shape[1] == 6
    assert (q.spec.scale, v.spec.scale) == (16 / 4, 3 / 6)


def test_merging_and_mixed_batches_are_refused_with_the_reason() -> None:
    model, ids = get_peft_model(tiny.llama(), _config()).eval(), tiny.tokens(2, 7)
    before = _logits(model, ids)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ModelError, match="differs from token to token"):
            merge()
    assert torch.equal(_logits(model, ids), before)
    with pytest.raises(ModelError, match="adapter_names"):
        model(input_ids=ids, adapter_names=["default", "default"])


def test_targets_that_match_nothing_or_no_linear_layer_are_named() -> None:
    with pytest.raises(ValueError, match=r"not found in the base model.*q_proj"):
        get_peft_model(tiny.llama(), _config(target_modules=["q_prj"]))
    with pytest.raises(ModelError, match=r"'model.embed_tokens' is a Embedding"):
        get_peft_model(tiny.llama(), _config(target_modules=["embed_tokens"]))


def test_a_saved_configuration_with_a_key_that_changes_the_maths_is_refused(
    folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    _, adapter, _ = folders
    saved = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("rotation_speed", "tpo_k"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {key: 3}))
        with pytest.raises(AdapterError, match=key):
            RotMoleConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"spam": 3}))
    with pytest.warns(UserWarning, match="spam"):
        RotMoleConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"r": -4, "top_k": 9}))
    with pytest.raises(ConfigError, match=r"(?s)r is -4"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{not json")
    with pytest.raises(AdapterError, match="not valid JSON"):
        RotMoleConfig.from_pretrained(tmp_path)


def test_a_layer_that_torch_never_calls_is_refused() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.MultiheadAttention(8, 2)

    with pytest.raises(ModelError, match=r"inner.out_proj.*would do nothing"):
        get_peft_model(Attention(), _config(target_modules=["out_proj"]))


def test_a_base_model_named_from_another_working_folder_is_the_same() -> None:
    from rotmole.tuner.storage.fingerprint import _same_place

    for first, second in (("model", "/a/model"), ("/a/b/model", "b/model"), ("m", "m")):
        assert _same_place(first, second)
        assert _same_place(second, first)
    for first, second in (
        ("model", "/a/other"),
        ("/b/model", "/a/model"),
        ("a", "b"),
        ("x/m", "m"),
    ):
        assert not _same_place(first, second)
