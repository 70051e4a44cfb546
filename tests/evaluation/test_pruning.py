"""Pruning: planted unused experts go, planted twins become one, and what changes is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import tiny
from rotmole import ConfigError, InputError, ModelError, RotMoleConfig, update_router_bias
from rotmole.evaluation.choices import similarities
from rotmole.evaluation.pruning import prune
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

UNUSED = {"model.layers.0.self_attn.q_proj": (1, 3), "model.layers.1.self_attn.v_proj": (0,)}


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(6)
    fields = {"r": 3, "num_experts": 5, "target_modules": ["q_proj", "v_proj"]}
    fields |= {"init_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny.llama(), RotMoleConfig(**(fields | settings)))
    return model.eval()


def named(model: PeftModel, adapter: str = "default") -> dict[str, Experts]:
    return {
        name: layer.experts(adapter)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, RotMoleLayer) and adapter in layer.rotmole_experts
    }


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        ids = tiny.tokens(4, 9, seed)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@torch.no_grad()
def forget(model: PeftModel) -> PeftModel:
    """Let no token choose the experts of UNUSED: the bias of the selection forbids it."""
    for name, experts in named(model).items():
        for e in UNUSED.get(name, ()):
            experts.router_bias[e] = -1e3
    return model


def logits(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated": {"rotation": "plane"},
    "pairs": {"rotation": "radar_pairs", "radar_rank": 2, "top_k": 3},
    "one A": {"share_A": True, "shared_expert_r": 2},
    "attention": {"router": "attention", "scoring": "sigmoid"},
    "magnitude": {"router": "magnitude", "top_k": 1, "norm_topk_prob": True},
}


@pytest.mark.parametrize("name", CASES)
def test_unused_experts_go_and_the_outputs_stay(name: str, tmp_path: Path) -> None:
    model = forget(adapted(router_bias_rate=0.1, **CASES[name]))
    rows = batches()
    before = [logits(model, batch) for batch in rows]
    found = prune(model, rows, tmp_path)
    assert {cut.path: cut.unused for cut in found.cuts if cut.unused} == UNUSED
    assert found.difference.kl < 1e-9
    assert found.difference.logit < 1e-4
    assert max(found.difference.hidden) < 1e-5
    assert found.difference.tokens == sum(int((b["labels"][:, 1:] != -100).sum()) for b in rows)
    assert found.parameters[1] < found.parameters[0]
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    numbers = {name: experts.spec.num_experts for name, experts in named(again).items()}
    assert numbers == {name: 5 - len(UNUSED.get(name, ())) for name in numbers}
    for batch, wanted in zip(rows, before, strict=True):
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(logits(again, batch)[kept], wanted[kept], rtol=1e-4, atol=1e-5)


def test_a_pruned_adapter_generates_and_is_trained_on(tmp_path: Path) -> None:
    model = forget(adapted(router_bias_rate=0.1))
    prune(model, batches(), tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ids = batches()[0]["input_ids"]
        assert torch.equal(again.eval().generate(ids, **options), model.generate(ids, **options))
    trained = [p for p in again.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = again.train()(**batches()[0]).loss
        loss.backward()
        optimizer.step()
        update_router_bias(again)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again.save_pretrained(tmp_path / "more")
    more = PeftModel.from_pretrained(tiny.llama(), tmp_path / "more").eval()
    assert torch.equal(logits(more, batches()[0]), logits(again.eval(), batches()[0]))


def test_with_one_expert_left_a_layer_needs_no_router(tmp_path: Path) -> None:
    model = adapted(
        router_bias_rate=0.1,
        router="magnitude",
        top_k=1,
        num_experts=2,
        rotation="none",
        routed_scaling_factor=1.5,
    )
    with torch.no_grad():
        for experts in named(model).values():
            experts.router_bias[1] = 1e3
    found = prune(model, batches(), tmp_path)
    assert (found.config.num_experts, found.config.top_k) == (1, 1)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert not any(experts.has_router for experts in named(again).values())
    for batch in batches():
        kept = batch["attention_mask"].bool()
        wanted = logits(model, batch)[kept]
        torch.testing.assert_close(logits(again, batch)[kept], wanted, rtol=1e-4, atol=1e-5)


def test_a_block_is_pruned_as_a_whole(tmp_path: Path) -> None:
    model = adapted(
        router_scope="block", rotation="none", router_bias_rate=0.1,
        target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    block = "model.layers.0.mlp."
    with torch.no_grad():
        named(model)[f"{block}gate_proj"].router_bias[2] = -1e3
    found = prune(model, batches(), tmp_path)
    assert found.difference.logit < 1e-4
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    numbers = {name: experts.spec.num_experts for name, experts in named(again).items()}
    assert {n for name, n in numbers.items() if name.startswith(block)} == {4}
    assert {n for name, n in numbers.items() if "layers.1.mlp" in name} == {5}
    assert {n for name, n in numbers.items() if "q_proj" in name} == {1}


@torch.no_grad()
def plant_twins(model: PeftModel, gauge: bool = True) -> None:
    """Make expert 4 of each layer a twin of expert 0: another A and B, the same product."""
    for experts in named(model).values():
        mix = torch.linalg.qr(torch.randn(3, 3))[0] * 1.5 if gauge else torch.eye(3)
        experts.expert_A[4] = mix @ experts.expert_A[0]
        experts.expert_B[4] = torch.linalg.inv(mix).T @ experts.expert_B[0]


def test_twins_become_one_with_the_weight_of_both(tmp_path: Path) -> None:
    """With equal rows, the logit of both is that of one plus log 2, which a fitted row can say."""
    model = adapted(rotation="none", selection="dense", r=3)
    plant_twins(model)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[:, 0] = 0.5  # a direction all tokens have
        for experts in named(model).values():
            experts.router_weight[4] = experts.router_weight[0]
    found = prune(model, batches(8), tmp_path, similarity=0.99)
    assert all(dict(cut.merged) == {4: 0} and cut.kept == (0, 1, 2, 3) for cut in found.cuts)
    assert found.difference.logit < 2e-3  # 0.08 with the row of expert 0 as it was


def test_twins_that_tokens_choose_apart_are_merged_and_what_changes_is_measured(
    tmp_path: Path,
) -> None:
    model = adapted(rotation="none", top_k=1, norm_topk_prob=False)
    plant_twins(model)
    found = prune(model, batches(8), tmp_path, similarity=0.99)
    assert all(dict(cut.merged) in ({0: 4}, {4: 0}) for cut in found.cuts)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    largest, divergence, tokens = 0.0, 0.0, 0
    for batch in batches(8):
        learnt = batch["labels"][:, 1:] != -100
        p, q = (logits(m, batch)[:, :-1][learnt] for m in (model, again))
        largest = max(largest, float((p - q).abs().max()))
        kl = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True
        )
        divergence, tokens = divergence + float(kl), tokens + len(p)
    assert found.difference.logit == pytest.approx(largest, rel=1e-3)
    assert found.difference.kl == pytest.approx(divergence / tokens, rel=1e-3)


def test_gates_that_read_the_router_miss_the_logits_of_what_went(tmp_path: Path) -> None:
    settings = {"rotation": "givens", "r": 4, "rotation_input": "router"}
    model = forget(adapted(router_bias_rate=0.1, **settings))
    found = prune(model, batches(), tmp_path)
    assert found.difference.logit > 1e-4
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    gate = named(again)["model.layers.0.self_attn.q_proj"].rotation_angle
    assert gate.shape == (3, 2, 3)


def test_likeness_counts_length_and_gates() -> None:
    model = adapted(rotation="centroid")
    plant_twins(model, gauge=False)
    experts = next(iter(named(model).values()))
    assert float(similarities(experts)[0, 4]) < 0.5  # the gates are strangers
    with torch.no_grad():
        for parameter, _ in experts.by_expert():
            parameter[4] = parameter[0]
    alike = similarities(experts)
    torch.testing.assert_close(alike[0, 4], torch.tensor(1.0, dtype=torch.float64))
    assert alike[1, 0] < 0.9
    with torch.no_grad():
        experts.expert_B[4] *= 2
    torch.testing.assert_close(similarities(experts)[0, 4], torch.tensor(0.8, dtype=torch.float64))


@pytest.mark.parametrize("everywhere", [True, False])
def test_names_stay_if_the_same_experts_stay_in_every_layer(
    everywhere: bool, tmp_path: Path
) -> None:
    model = adapted(router_bias_rate=0.1, expert_names=["a", "b", "c", "d", "e"])
    with torch.no_grad():
        for number, experts in enumerate(named(model).values()):
            if everywhere or number == 0:
                experts.router_bias[1] = -1e3
    found = prune(model, batches(), tmp_path)
    assert found.config.expert_names == (["a", "c", "d", "e"] if everywhere else None)


def test_what_cannot_be_pruned_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing can go: .* least used one"):
        prune(adapted(), batches(), tmp_path)
    for settings, said in (
        ({"num_experts": 1, "rotation": "none"}, "num_experts is 1"),
        ({"router": "hash"}, "router is 'hash'"),
        ({"experts_added": [2]}, r"experts_added is \[2\]"),
        ({"init_weights": "svd", "rotation": "none"}, "init_weights is 'svd'"),
    ):
        with pytest.raises(ConfigError, match=said):
            prune(adapted(**settings), batches(), tmp_path)
    model = adapted()
    model.add_adapter("second", RotMoleConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="one active RotMoLE adapter"):
        prune(model, batches(), tmp_path)
    assert not list(tmp_path.iterdir())
