from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

import rotmole
import tiny_folders
from rotmole.config.schema import ModelSection
from rotmole.models.load import load_model
from rotmole.models.memory import estimate_memory, resident_bytes, traced_update
from rotmole.models.preview import adapter_problems, matched, preview, trainable_by_role


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """A tiny Llama on disk; tests only read it."""
    folder = tiny_folders.write_model(tmp_path_factory.mktemp("model"))
    return ModelSection(name=str(folder), dtype="float32", device="cpu")


ADAPTER = {"r": 4, "num_experts": 3, "rotation": "plane", "target_modules": ["q_proj", "up_proj"]}


def config(adapter: dict[str, Any]) -> rotmole.RotMoleConfig:
    return rotmole.RotMoleConfig(task_type="CAUSAL_LM", **adapter)


@pytest.mark.parametrize("rotation", ["none", "tangent", "plane", "radar_pairs"])
def test_the_counts_are_those_of_the_real_model(section, rotation):
    adapter = ADAPTER | {"rotation": rotation}
    shown = preview(section, config(adapter), torch.float32)
    real = get_peft_model(
        load_model(section).model, rotmole.RotMoleConfig(**adapter, task_type="CAUSAL_LM")
    )
    roles = trainable_by_role(shown)
    assert sum(roles.values()) == real.get_nb_trainable_parameters()[0]
    assert roles == trainable_by_role(real)
    assert (roles["rotation_gate"] == 0) == (rotation == "none")
    assert matched(shown) == {("q_proj", 32, 32): 2, ("up_proj", 32, 64): 2}


def test_modules_to_save_are_counted(section):
    shown = preview(section, config(ADAPTER | {"modules_to_save": ["norm"]}), torch.float32)
    assert trainable_by_role(shown)["other"] == 5 * 32  # PEFT takes every name that ends so


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_porj"], ["'q_porj' matches no module", "did you mean 'q_proj'"]),
        (["q_proj", "xyz"], ["'xyz' matches no module", "its linear modules are down_proj"]),
        (["aa", "bb"], ["'aa'", "'bb'"]),
        ("nothing_like_it", ["nothing_like_it", "nearest module names"]),
        (["embed_tokens"], ["'model.embed_tokens' is a Embedding, which cannot be adapted"]),
        (["norm"], ["'model.norm' is a LlamaRMSNorm"]),
        (["lm_head"], ["the output layer (lm_head) cannot be adapted"]),
    ],
)
def test_targets_that_do_not_fit(section, targets, words):
    text = " ".join(adapter_problems(section, config(ADAPTER | {"target_modules": targets})))
    for word in words:
        assert word in text


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", None, r".*\.[qk]_proj"])
def test_targets_that_fit(section, targets):
    assert adapter_problems(section, config(ADAPTER | {"target_modules": targets})) == []


def test_a_model_that_is_not_there():
    (problem,) = adapter_problems(ModelSection(name="/no/such"), config(ADAPTER))
    assert "no such folder" in problem


def live_bytes(model, batch, length):
    """Count what autograd really keeps after a forward pass, by its own hooks."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_base_model().model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
    return sum(kept.values()), output


@pytest.mark.parametrize("rotation", ["none", "tangent"])
def test_the_trace_counts_what_autograd_really_keeps(section, rotation):
    adapter = ADAPTER | {"rotation": rotation}
    real = get_peft_model(
        load_model(section).model.train(),
        rotmole.RotMoleConfig(**adapter, task_type="CAUSAL_LM"),
    )
    kept, _ = live_bytes(real, 4, 96)
    shown = preview(section, config(adapter), torch.float32)
    traced = traced_update(shown, batch=4, length=96, checkpointing=False).peak
    assert kept <= traced <= 1.5 * kept  # the peak holds passing tensors and gradients as well


def test_checkpointing_needs_less_and_more_tokens_need_more(section):
    def traced(batch, length, checkpointing=False):
        shown = preview(section, config(ADAPTER), torch.float32)
        return traced_update(shown, batch=batch, length=length, checkpointing=checkpointing).peak

    plain = traced(4, 96)
    assert traced(4, 96, checkpointing=True) < 0.8 * plain
    assert 1.8 * plain < traced(8, 96) < 2.2 * plain


def test_the_parts_of_the_estimate(section):
    def estimate(quantization="none", **settings):
        shown = preview(section, config(ADAPTER), torch.bfloat16)
        return estimate_memory(
            shown,
            batch=2,
            length=16,
            settings=settings,
            process=10**9,
            quantization=quantization,
        )

    shown = preview(section, config(ADAPTER), torch.bfloat16)
    trainable, total = shown.get_nb_trainable_parameters()
    plain = estimate(optim="adamw_torch")
    assert plain.weights == 2 * (total - trainable)
    assert plain.adapter == 4 * trainable  # the adapter stays in float32
    assert plain.optimizer == 2 * plain.adapter
    assert plain.total == sum(
        (plain.process, plain.weights, plain.adapter, plain.optimizer, plain.step)
    )
    linear = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)  # layers, attention, feed-forward
    assert estimate("bnb-8bit").weights == plain.weights - linear
    assert estimate("bnb-4bit-nf4").weights < estimate("torchao-int8").weights
    assert estimate(optim="sgd").optimizer < plain.optimizer
    assert estimate(gradient_accumulation_steps=2).step == plain.step + plain.adapter
    assert estimate(label_smoothing_factor=0.1).step > plain.step


def test_resident_bytes_follow_an_allocation():
    before = resident_bytes()
    held = torch.ones(50_000_000)
    assert 150e6 < resident_bytes() - before < 250e6
    del held
