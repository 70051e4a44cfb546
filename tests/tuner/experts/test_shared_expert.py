"""The shared expert in a model: every way, with every setting, saved and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tiny
from rotmole import AdapterError, RotMoleConfig, RotMoleModel
from rotmole.optim import Muon, RiemannianAdamW, parameter_groups
from rotmole.optim.riemannian import preconditioned
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"rotation": "none"},
    "gated": {"shared_expert_gate": True},
    "turned": {"shared_expert_rotation": "plane", "shared_expert_alpha": 5},
    "both through C": {
        "shared_expert_rotation": "tangent", "rotation_dim": 2, "shared_expert_gate": True,
    },
    "reads z": {"shared_expert_rotation": "givens", "rotation_input": "z", "shared_expert_r": 4},
    "the others read the router": {"rotation": "givens", "rotation_input": "router"},
    "outputs turned": {
        "rotation": "radar", "shared_expert_rotation": "radar", "shared_expert_r": 4,
    },
    "other metric": {
        "rotation": "bias", "rotation_metric": "output", "shared_expert_rotation": "givens",
        "shared_expert_r": 4,
    },
    "pairs": {"rotation": "radar_pairs"},
    "grouped": {"dispatch": "grouped", "shared_expert_gate": True},
    "alone": {"num_experts": 1, "shared_expert_gate": True},
    "one A": {"share_A": True, "shared_expert_rotation": "cayley"},
    "sqrt gate": {"router_sqrt_gate": True, "rotation": "none"},
    "sigmoid router": {"scoring": "sigmoid", "norm_topk_prob": False},
    "threshold": {"selection": "threshold"},
    "frozen A": {"frozen": "A", "A_density": 0.5, "router": "magnitude"},
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "num_experts": 6, "target_modules": TARGETS, "shared_expert_r": 3}
    fields |= {"init_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny.llama().double(), RotMoleConfig(**(fields | settings))).double()


def experts(model: PeftModel) -> list[Experts]:
    return [m.experts("default") for m in model.modules() if isinstance(m, RotMoleLayer)]


def logits(model: PeftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@every
def test_cached_decoding_and_gradients_are_those_of_the_slow_twin(name: str) -> None:
    """torch.func takes the dense way, one step of autograd at a time."""
    model, ids = adapted(**CASES[name]).eval(), tiny.tokens(3, 7)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(last, logits(model, ids)[:, -1], rtol=0, atol=1e-12)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": ids, "labels": ids}
        return torch.func.functional_call(model, values, kwargs=inputs).loss

    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained.values())
    if CASES[name].get("router_sqrt_gate"):
        return  # its gradient is not that of its function
    wanted = torch.func.grad(loss)({n: p.detach() for n, p in trained.items()})
    for key, parameter in trained.items():
        assert torch.allclose(parameter.grad, wanted[key], rtol=0, atol=1e-11), key
        assert wanted[key].any() or "shared" not in key, key


@every
def test_it_starts_at_the_model_without_it_and_comes_back_from_disk(
    name: str, tmp_path: Path
) -> None:
    ids = tiny.tokens(2, 6)
    settings = CASES[name] | {"init_weights": True}
    model = adapted(**settings)
    base = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(base, logits(model, ids))
    alone = {n: v for n, v in settings.items() if not n.startswith("shared")}
    plain = adapted(**alone, shared_expert_r=0)
    with torch.no_grad():
        for ours, theirs in zip(experts(model), experts(plain), strict=True):
            for key, parameter in theirs.named_parameters():
                parameter.copy_(parameter.normal_() if "expert_B" in key else parameter)
                ours.get_parameter(key).copy_(parameter)
    assert torch.allclose(logits(model, ids), logits(plain, ids), rtol=0, atol=1e-13)
    with torch.no_grad():
        for one in experts(model):
            one.shared_B.normal_()
    assert not torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama().double(), tmp_path).double()
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))


@pytest.mark.parametrize("metric", ["rank", "output"])
def test_its_rotation_starts_at_none_bit_for_bit(metric: str) -> None:
    ids, found = tiny.tokens(2, 6), []
    options = {"init_weights": True, "rotation": "bias", "rotation_metric": metric}
    for rotation in ("none", "bias"):
        model = adapted(**options, shared_expert_rotation=rotation)
        with torch.no_grad():
            for one in experts(model):
                generator = torch.Generator().manual_seed(1)
                for parameter in (one.expert_A, one.expert_B, one.shared_A, one.shared_B):
                    value = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(value)
        found.append(logits(model, ids))
    assert torch.equal(*found)


def test_one_expert_with_a_shared_one_is_PEFTs_LoRA_of_both_ranks() -> None:
    ids = tiny.tokens(2, 6)
    model = adapted(num_experts=1, rotation="none", r=4, lora_alpha=8, shared_expert_r=3).eval()
    config = LoraConfig(r=7, lora_alpha=14, target_modules=TARGETS, task_type="CAUSAL_LM")
    lora = get_peft_model(tiny.llama().double(), config).double().eval()
    for ours, module in zip(experts(model), _loras(lora), strict=True):
        with torch.no_grad():
            A = torch.cat([ours.expert_A[0], ours.shared_A[0]])
            B = torch.cat([ours.expert_B[0], ours.shared_B[0]])
            module.lora_A["default"].weight.copy_(A)
            module.lora_B["default"].weight.copy_(B.T)
    assert torch.allclose(logits(model, ids), logits(lora, ids), rtol=0, atol=1e-12)
    for one in (model, lora):
        one(input_ids=ids, labels=ids).loss.backward()
    for ours, module in zip(experts(model), _loras(lora), strict=True):
        wanted = module.lora_A["default"].weight.grad
        found = torch.cat([ours.expert_A.grad[0], ours.shared_A.grad[0]])
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)
        wanted = module.lora_B["default"].weight.grad
        found = torch.cat([ours.expert_B.grad[0], ours.shared_B.grad[0]])
        assert torch.allclose(found.T, wanted, rtol=1e-10, atol=1e-14)


def _loras(model: PeftModel) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and m.lora_A]


class _LowRank(nn.Module):
    """Experts as transformers' blocks call them, each the low-rank map of one of ours."""

    def __init__(self, A_ERD: Tensor, B_ERO: Tensor, scale: float) -> None:
        super().__init__()
        self.A_ERD, self.B_ERO, self.scale = A_ERD, B_ERO, scale

    def forward(self, x_TD: Tensor, *routing: Tensor) -> Tensor:
        y_TEO = torch.einsum("td,erd,ero->teo", x_TD, self.A_ERD, self.B_ERO) * self.scale
        if not routing:
            return y_TEO[:, 0]
        first, second = routing
        index, weight = (second, first) if first.is_floating_point() else (first, second)
        chosen = y_TEO.gather(1, index[..., None].expand(-1, -1, y_TEO.shape[-1]))
        return (chosen * weight[..., None]).sum(1)


@pytest.mark.parametrize("normalise", [False, True])
def test_routing_gate_and_sum_are_those_of_Qwen2_MoE(normalise: bool) -> None:
    """transformers' own block, whose experts are replaced by low-rank maps."""
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen

    torch.manual_seed(0)
    config = qwen.Qwen2MoeConfig(
        hidden_size=8, num_experts=6, num_experts_per_tok=2, norm_topk_prob=normalise,
        moe_intermediate_size=4, shared_expert_intermediate_size=4,
    )  # fmt: skip
    block = qwen.Qwen2MoeSparseMoeBlock(config)
    layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    settings = {"r": 3, "num_experts": 6, "top_k": 2, "norm_topk_prob": normalise}
    settings |= {"shared_expert_r": 5, "shared_expert_gate": True, "shared_expert_alpha": 7}
    ours = RotMoleConfig(
        rotation="none", target_modules=["0"], init_weights=False, **settings
    )  # fmt: skip
    model = get_peft_model(layer, ours)
    (one,) = experts(model)
    with torch.no_grad():
        block.gate.weight.copy_(one.router_weight)
        block.shared_expert_gate.weight.copy_(one.shared_gate)
    block.experts = _LowRank(one.expert_A, one.expert_B, 16 / 3)
    block.shared_expert = _LowRank(one.shared_A, one.shared_B, 7 / 5)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        found = model(x)
        with model.disable_adapter():
            found = found - model(x)
        wanted = block(x)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    assert torch.allclose(found, wanted, rtol=0, atol=2e-6)


def test_sigmoid_bias_sum_and_factor_are_those_of_DeepSeek_V3() -> None:
    """transformers' own block of one group; the bias acts on the selection alone."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    torch.manual_seed(0)
    config = deepseek.DeepseekV3Config(
        hidden_size=8, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=4, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    block = deepseek.DeepseekV3MoE(config)
    layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    settings = {"r": 3, "num_experts": 6, "shared_expert_r": 5, "shared_expert_alpha": 7}
    ours = RotMoleConfig.preset("deepseek_v3", target_modules=["0"], init_weights=False, **settings)
    model = get_peft_model(layer, ours)
    (one,) = experts(model)
    with torch.no_grad():
        block.gate.weight.copy_(one.router_weight)
        one.router_bias.copy_(torch.linspace(-0.4, 0.4, 6))
        block.gate.e_score_correction_bias.copy_(one.router_bias)
    block.experts = _LowRank(one.expert_A, one.expert_B, 16 / 3)
    block.shared_experts = _LowRank(one.shared_A, one.shared_B, 7 / 5)
    x = torch.randn(10, 8)
    with torch.no_grad():
        found = model(x)
        with model.disable_adapter():
            found = found - model(x)
        wanted = block(x)
    assert torch.allclose(found, wanted, rtol=0, atol=5e-6)


def test_goat_starts_where_it_did() -> None:
    """The shared expert adds nothing at the start, so what is subtracted stays the same."""
    ids = tiny.tokens(2, 6)
    options = {"init_weights": "svd", "r": 2, "num_experts": 2, "rotation": "none"}
    plain, model = adapted(**options, shared_expert_r=0), adapted(**options)
    with torch.no_grad():
        for ours, theirs in zip(experts(model), experts(plain), strict=True):
            ours.router_weight.copy_(theirs.router_weight)
    assert torch.allclose(logits(model, ids), logits(plain, ids), rtol=0, atol=1e-13)


def test_roles_rates_and_freezing() -> None:
    settings = {"shared_expert_rotation": "plane", "shared_expert_gate": True, "frozen": "A"}
    model = adapted(**settings)
    one = experts(model)[0]
    roles = {name: one.role(name) for name, _ in one.named_parameters() if "shared" in name}
    assert roles == {
        "shared_A": "expert", "shared_B": "expert", "shared_gate": "scaling_gate",
        "shared_rotation_vector": "rotation_gate", "shared_rotation_angle": "rotation_gate",
    }  # fmt: skip
    assert one.shared_A.requires_grad  # `frozen` is about the routed experts
    assert not one.expert_A.requires_grad
    groups = parameter_groups(model, lr=1.0, lora_plus_ratio=4.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert (rates[id(one.shared_A)], rates[id(one.shared_B)]) == (1.0, 4.0)


def test_riemannian_and_muon_step_its_pair_too() -> None:
    ids = tiny.tokens(2, 6)
    model, twin = adapted(), adapted()
    for each in (model, twin):
        each(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for one in experts(twin):
            for A, B in ((one.expert_A, one.expert_B), (one.shared_A, one.shared_B)):
                solved = preconditioned(A.grad, B, 1e-4), preconditioned(B.grad, A, 1e-4)
                A.grad, B.grad = solved
    ours = RiemannianAdamW(parameter_groups(model, lr=1e-2), model=model, delta=1e-4)
    theirs = torch.optim.AdamW(parameter_groups(twin, lr=1e-2))
    ours.step()
    theirs.step()
    for parameter, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-7, atol=1e-9)
    muon = Muon(parameter_groups(twin, lr=1e-2), model=twin)
    before = [one.shared_A.detach().clone() for one in experts(twin)]
    muon.step()
    for one, old in zip(experts(twin), before, strict=True):
        assert muon.state[one.shared_A].keys() == {"step", "momentum_buffer"}
        assert not torch.equal(one.shared_A, old)


def test_trained_adapters_get_one_beside_them(tmp_path: Path) -> None:
    folders = []
    for name in ("math", "code"):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(len(folders))
        get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    model = RotMoleModel.from_adapters(tiny.llama(), folders, shared_expert_r=3)
    learns = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert {"shared_A", "shared_B", "router_weight"} <= learns
    assert not learns & {"expert_A", "expert_B"}


@pytest.mark.parametrize(("stored", "saved"), [(0, 3), (3, 0), (3, 4)])
def test_weights_of_another_shared_expert_are_refused(
    stored: int, saved: int, tmp_path: Path
) -> None:
    adapted(shared_expert_r=stored).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shared_expert_r": saved}))
    with pytest.raises(AdapterError, match=f"shared_expert_r is {saved} in .* have {stored}"):
        PeftModel.from_pretrained(tiny.llama().double(), tmp_path)


@pytest.mark.slow
def test_compiled_and_in_bfloat16() -> None:
    ids = tiny.tokens(2, 6)
    model = adapted(shared_expert_rotation="tangent", shared_expert_gate=True)
    wanted = model(input_ids=ids, labels=ids)
    wanted.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids)
    found.loss.backward()
    assert torch.allclose(found.logits, wanted.logits, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        if name in grads:
            assert torch.allclose(parameter.grad, grads[name], rtol=0, atol=1e-12), name
    half = model.bfloat16()
    near = half(input_ids=ids, labels=ids)
    near.loss.backward()
    assert (near.logits.double() - wanted.logits).norm() < 0.05 * wanted.logits.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = model.float()(input_ids=ids)
    assert (near.logits.double() - wanted.logits).norm() < 0.05 * wanted.logits.norm()
