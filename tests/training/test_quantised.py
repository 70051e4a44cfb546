"""Bases in 8 and 4 bits on a CPU: trained, saved, loaded, and the gates' precision kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig
from trl import SFTConfig, SFTTrainer

import tiny
from rotmole import RotMoleConfig
from rotmole.config.load import load_run
from rotmole.models.load import load_model
from rotmole.training.callbacks import BalanceCallback, read_metrics
from rotmole.training.quantised import Float32Callback
from rotmole.training.run import TrainResult, train
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
    tiny.llama(hidden_size=64, intermediate_size=128, vocab_size=words).save_pretrained(
        root / "model"
    )
    return root / "model", write_data(root / "data")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, folders, tmp_path_factory) -> TrainResult:
    content = settings(*folders, tmp_path_factory.mktemp("run") / "run", max_steps=6, save_steps=3)
    content["model"]["quantization"] = request.param
    content["training"] |= {"eval_steps": 3}
    return train(load_run(None, text=yaml.safe_dump(content)), progress=False)


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


def sft(folders: tuple[Path, Path], folder: Path, *more: object) -> SFTTrainer:
    content = settings(*folders, folder)
    content["model"]["quantization"] = "bnb-8bit"
    base = load_model(load_run(None, text=yaml.safe_dump(content)).model)
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


def test_gates_stay_float32_and_learn_under_trl(folders, tmp_path):
    """An update of 1e-6 is far below what bfloat16 can tell apart at a router's weights."""
    cast = sft(folders, tmp_path / "cast")
    assert {p.dtype for p in cast.model.parameters() if p.requires_grad} == {torch.bfloat16}
    kept = sft(folders, tmp_path / "kept", Float32Callback())
    learns = {n: p for n, p in kept.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learns.values()} == {torch.float32}
    routers = {n: p.detach().clone() for n, p in learns.items() if "router_weight" in n}
    kept.train()
    assert {p.dtype for p in learns.values()} == {torch.float32}
    for name, before in routers.items():
        moved = (learns[name] - before).abs()
        assert 0 < moved.max() < 1e-5
        assert (moved > 0).float().mean() > 0.9
