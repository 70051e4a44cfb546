"""Bases in 8 and 4 bits on a CPU: trained, saved, loaded, and the gates' precision kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from trl import SFTConfig, SFTTrainer

import tiny
from rotmole import RotMoleConfig
from rotmole.config.load import load_run
from rotmole.models.load import load_model
from rotmole.training.callbacks.balance import BalanceCallback
from rotmole.training.callbacks.float32 import Float32Callback
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.run import TrainResult, train
from rotmole_cli import main
from training_cases import settings, write_data, write_model

KINDS = {"bnb-8bit": "Linear8bitLt", "bnb-4bit-nf4": "Linear4bit", "torchao-int8": "Linear"}
IDS = torch.arange(3, 15)[None]

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 and torchao 0.18 about each other, at torchao's import and first use
    "ignore::DeprecationWarning:torchao",
    "ignore::FutureWarning:torchao",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model with layers wide enough for 4 bits (64), and rows."""
    root = tmp_path_factory.mktemp("quantised")
    (root / "data").mkdir()
    write_model(root / "model")
    words = LlamaConfig.from_pretrained(root / "model").vocab_size
    wide = tiny.llama(
        hidden_size=64, intermediate_size=128, vocab_size=words, initializer_range=0.1
    )
    wide.save_pretrained(root / "model")
    return root / "model", write_data(root / "data")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, folders, tmp_path_factory) -> TrainResult:
    content = settings(*folders, tmp_path_factory.mktemp("run") / "run", max_steps=6, save_steps=3)
    content["model"]["quantization"] = request.param
    content["training"] |= {"eval_steps": 3}
    return train(load_run(None, text=yaml.safe_dump(content)), progress=False)


def test_the_command_trains_a_quantised_run(folders, tmp_path, capsys):
    content = settings(*folders, tmp_path / "run", max_steps=2, save_steps=2)
    content["model"]["quantization"] = "bnb-4bit-nf4"
    content["training"] |= {"eval_steps": 2, "warmup_steps": 0}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["train", str(file)]) == 0
    assert "done             2 updates" in capsys.readouterr().out
    adapter = tmp_path / "run" / "adapter"
    base = load_model(load_run(file).model).model
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    projection = base.model.layers[0].self_attn.q_proj
    assert type(projection.base_layer).__name__ == "Linear4bit"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert all(value.any() for name, value in saved.items() if name.endswith("expert_B"))
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    with torch.no_grad():
        ours = loaded(IDS).logits
        with loaded.disable_adapter():
            assert not torch.equal(loaded(IDS).logits, ours)


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return {n: p for n, p in result.built.model.named_parameters() if p.requires_grad}


def test_the_base_is_quantised_and_the_adapter_is_not(trained):
    kind = trained.built.run.model.quantization
    base = trained.built.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert type(base).__name__ == KINDS[kind]
    weight = base.weight
    assert weight.dtype in (torch.int8, torch.uint8) or "Int8" in type(weight).__name__
    assert {value.dtype for value in weights_of(trained).values()} == {torch.float32}


def test_the_loss_falls(trained):
    losses = [r["loss"] for r in read_metrics(trained.run_dir / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 6
    assert losses[-1] < losses[1]


def test_every_part_of_the_adapter_moves(trained):
    first = load_file(trained.run_dir / "checkpoint-3" / "adapter_model.safetensors")
    last = load_file(trained.run_dir / "checkpoint-6" / "adapter_model.safetensors")
    assert all(not torch.equal(first[name], value) for name, value in last.items())


def test_saved_and_loaded_it_gives_the_same_logits(trained):
    """Both without gradients, as 4 bits take another kernel with them."""
    base = load_model(trained.built.run.model).model
    loaded = PeftModel.from_pretrained(base, trained.adapter_dir).eval()
    with torch.no_grad():
        ours, theirs = trained.built.model.eval()(IDS).logits, loaded(IDS).logits
        with loaded.disable_adapter():
            without = loaded(IDS).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(without, theirs)


def test_a_validation_leaves_the_gradients_as_they_were(trained):
    """A kernel for inference alone must not stay in place when training goes on."""
    model = trained.built.model
    found = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad.clone() for n, p in weights_of(trained).items()})
        model.eval()
        with torch.no_grad():
            model(input_ids=IDS)
    for name, value in found[0].items():
        assert value.any(), name
        assert torch.equal(found[1][name], value), name


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the base as it would be saved: packed weights, scales, scales of scales."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".rotmole_" not in name
    }


def test_goat_on_4_bits_learns_reloads_and_leaves_the_base_as_it_was(folders, tmp_path):
    """The residual lies beside the packed weight. All logits without gradients: one kernel."""
    content = settings(*folders, tmp_path / "run", eval_steps=10, save_steps=20)
    content["model"]["quantization"] = "bnb-4bit-nf4"
    names = ["q_proj", "v_proj", "down_proj"]
    content["adapter"] = {"preset": "goat", "r": 2, "num_experts": 4, "target_modules": names}
    result = train(load_run(None, text=yaml.safe_dump(content)), progress=False)
    losses = [r["loss"] for r in read_metrics(result.run_dir / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

    model, section = result.built.model.eval(), result.built.run.model
    fresh = load_model(section).model
    untouched = stored(fresh)
    assert any(value.dtype == torch.uint8 for value in untouched.values())
    now = stored(model)
    assert now.keys() == untouched.keys()
    assert all(torch.equal(now[name], value) for name, value in untouched.items())
    with torch.no_grad():
        plain, ours = fresh(IDS).logits, model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
        assert not torch.equal(ours, plain)
        again = PeftModel.from_pretrained(fresh, result.adapter_dir).eval()
        assert torch.equal(again(IDS).logits, ours)
        with again.disable_adapter():
            assert torch.equal(again(IDS).logits, plain)


def test_an_adapter_keeps_4_bit_weights_from_being_packed_for_inference(folders):
    """As from_pretrained leaves it on a CPU with AVX512-BF16; packed, scales change in a save."""
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        folders[0], quantization_config=four, dtype=torch.float32
    )
    layers = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = {name: value.clone() for name, value in stored(base).items()}
    config = RotMoleConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model(IDS)
    assert len(layers) == 14
    packed = [getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers]
    assert not any(packed)
    assert all(torch.equal(stored(model)[name], value) for name, value in before.items())


def of_kind(folders: tuple[Path, Path], folder: Path, kind: str) -> dict:
    given = settings(*folders, folder)
    given["model"]["quantization"] = kind
    return given


def sft(folders: tuple[Path, Path], folder: Path, kind: str, *more: object) -> SFTTrainer:
    base = load_model(load_run(None, text=yaml.safe_dump(of_kind(folders, folder, kind))).model)
    config = RotMoleConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], router_aux_loss_coef=0.1
    )
    rows = [{"prompt": f"{i} plus 1 is ", "completion": f"{i + 1}"} for i in range(8)]
    return SFTTrainer(
        model=get_peft_model(base.model, config),
        args=SFTConfig(
            str(folder), max_steps=3, learning_rate=1e-6, warmup_steps=0, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        callbacks=[BalanceCallback(), *more],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit-nf4"])
def test_gates_stay_float32_learn_and_reload_under_trl(folders, tmp_path, kind):
    """An update of 1e-6 is far below what bfloat16 can tell apart at a router's weights."""
    cast = sft(folders, tmp_path / "cast", kind)
    assert {p.dtype for p in cast.model.parameters() if p.requires_grad} == {torch.bfloat16}
    kept = sft(folders, tmp_path / "kept", kind, Float32Callback())
    learns = {n: p for n, p in kept.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learns.values()} == {torch.float32}
    routers = {n: p.detach().clone() for n, p in learns.items() if "router_weight" in n}
    kept.train()
    assert {p.dtype for p in learns.values()} == {torch.float32}
    for name, before in routers.items():
        moved = (learns[name] - before).abs()
        assert 0 < moved.max() < 1e-5
        assert (moved > 0).float().mean() > 0.9
    kept.save_model()
    section = load_run(None, text=yaml.safe_dump(of_kind(folders, tmp_path, kind))).model
    loaded = PeftModel.from_pretrained(load_model(section).model, tmp_path / "kept").eval()
    weights = dict(loaded.named_parameters())
    assert not [name for name, value in learns.items() if not torch.equal(value, weights[name])]
    assert {weights[name].dtype for name in learns} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(kept.model.eval()(IDS).logits, loaded(IDS).logits)
