"""Experts: one A for all, frozen and sparse A, SVD starts, counts by pattern and by depth."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from rotmole import ConfigError, RotMoleConfig
from rotmole.ops import ROTATIONS
from rotmole.ops.compiled import FEW_TOKENS
from rotmole.ops.initial import gaussian, sparse_mask, svd_segments
from rotmole.ops.reference import method as reference
from rotmole.tuner.config import RotMoleConfig as Config
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = tiny.tokens(2, 7)


def adapted(base: torch.nn.Module | None = None, **settings: object) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "num_experts": 3, "target_modules": TARGETS}
    return get_peft_model(base or tiny.llama(), RotMoleConfig(**(fields | settings)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def experts(model: PeftModel, adapter: str = "default") -> dict[str, Experts]:
    return {
        name: layer.experts(adapter)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, RotMoleLayer) and adapter in layer.rotmole_experts
    }


def one(**settings: Any) -> Experts:
    """Return the experts of one layer of width 7 to 6, drawn at random, in float64."""
    fields = {"r": 4, "num_experts": 3, "init_weights": False}
    layer = torch.nn.Sequential(torch.nn.Linear(7, 6, bias=False))
    config = Config(**(fields | {"target_modules": ["0"]} | settings))
    torch.manual_seed(1)
    return get_peft_model(layer.double(), config).base_model.model[0].experts("default").double()


def slow(module: Experts, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gates = {name: getattr(module, name) for name in module.gate_names}
    return reference.mixture(
        x, x, weight, module.expert_A, module.expert_B, gates,
        rotation=module.spec.rotation, scale=module.spec.scale,
    )  # fmt: skip


def grads(y: torch.Tensor, module: Experts, x: torch.Tensor) -> Mapping[str, torch.Tensor]:
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    named = {"x": x} | {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((y * probe).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


# One A for all experts (HydraLoRA)


@pytest.mark.parametrize("rotation", list(ROTATIONS))
def test_a_shared_A_equals_the_slow_loops_with_every_gradient(rotation: str) -> None:
    module = one(share_A=True, rotation=rotation)
    assert module.expert_A.shape == (1, 4, 7)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = tiny.addition(module, x)[0]
    expected = slow(module, x, tiny.routing(module, x).weight_TE)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found, wanted = grads(y, module, x), grads(expected, module, x)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("rotation", ["none", "tangent", "radar_pairs"])
def test_a_shared_A_computes_what_equal_separate_As_compute(rotation: str) -> None:
    shared = one(share_A=True, rotation=rotation)
    apart = one(rotation=rotation)
    for name, value in shared.named_parameters():
        getattr(apart, name).data.copy_(value)  # [1, R, D] is copied to every expert
    x = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(
        tiny.addition(shared, x)[0], tiny.addition(apart, x)[0], rtol=1e-12, atol=1e-12
    )


class Products(TorchDispatchMode):
    """Notes the shape of every matrix product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(result.shape))
        return result


def test_a_shared_A_is_multiplied_once_and_the_number_of_products_does_not_grow() -> None:
    def counted(number: int, tokens: int, *, shared: bool) -> list[tuple[int, ...]]:
        module = one(share_A=shared, num_experts=number, rotation="none")
        x = torch.randn(tokens, 7, dtype=torch.float64)
        with Products() as products:
            tiny.addition(module, x)
        return products.shapes

    rank, few, many = 4, 5, FEW_TOKENS + 1
    assert counted(3, many, shared=True) == [(rank + 3, many), (many, 6)]  # A with the router, B
    assert counted(9, many, shared=True) == [(rank + 9, many), (many, 6)]
    assert counted(9, many, shared=False) == [(9 * rank + 9, many), (many, 6)]
    assert counted(3, few, shared=True) == [(rank, few), (3, few), (few, 6)]  # A, router, B
    assert counted(9, few, shared=True) == [(rank, few), (9, few), (few, 6)]
    assert counted(9, few, shared=False) == [(9 * rank, few), (9, few), (few, 6)]


# Starts


def test_segments_are_the_singular_directions_they_claim_to_be() -> None:
    torch.manual_seed(0)
    weight, E, R, s = torch.randn(9, 13, dtype=torch.float64), 2, 3, 1.7
    A, B = svd_segments(weight, E, R, s)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    for e in range(E):
        first = e * (9 // E)
        part = U[:, first : first + R] @ torch.diag(S[first : first + R]) @ Vh[first : first + R]
        torch.testing.assert_close(s * (B[e].T @ A[e]), part / 10, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(A[e].norm(dim=1), B[e].norm(dim=1))  # sqrt(S) on either side
    with pytest.raises(ValueError, match=r"need 12 singular directions.*has 9"):
        svd_segments(weight, 4, 3, s)


def test_sparse_and_gaussian_rows_are_drawn_as_they_say() -> None:
    torch.manual_seed(0)
    mask = sparse_mask((32, 1, 40), 0.25)
    assert set(mask.sum(-1).flatten().tolist()) == {10}
    assert len({tuple(row.tolist()) for row in mask.flatten(0, 1)}) == 32
    assert set(sparse_mask((4, 2, 40), 0.001).sum(-1).flatten().tolist()) == {1}
    drawn = gaussian((8, 4, 4000))
    assert abs(float(drawn.std()) * 32 - 1) < 0.01


def test_gaussian_starts_at_the_base_model() -> None:
    base = tiny.llama()
    plain = logits(base)
    model = adapted(base, init_weights="gaussian", rotation="plane")
    assert torch.equal(logits(model), plain)
    A = experts(model)["model.layers.0.self_attn.q_proj"].expert_A
    assert 0.6 < float(A.detach().std()) * 12 < 1.4


# GOAT: SVD segments with the residual kept beside the base weight


def goat(**settings: object) -> dict[str, object]:
    return {"init_weights": "svd", "rotation": "none", "goat_eta": 1.0} | settings


def test_goat_leaves_the_base_weight_alone_and_two_adapters_do_not_meet() -> None:
    base = tiny.llama()
    plain, weights = logits(base), {n: p.detach().clone() for n, p in base.named_parameters()}
    model = adapted(base, **goat())
    first = logits(model)
    model.add_adapter("other", RotMoleConfig(r=2, target_modules=["q_proj"], **goat()))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    alone = adapted(tiny.llama(), r=2, num_experts=4, target_modules=["q_proj"], **goat())
    for name, twin in experts(alone).items():
        module = experts(model, "other")[name]
        assert torch.equal(module.expert_A, twin.expert_A)  # not of a weight that has moved
        twin.router_weight.data.copy_(module.router_weight)
    assert torch.equal(logits(alone), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    unloaded = model.unload()
    assert all(torch.equal(p, weights[n]) for n, p in unloaded.named_parameters())


def test_goat_starts_at_the_base_model_where_gates_are_balanced() -> None:
    """Equal gates are the base model; a drawn router is within a few per cent of it per token."""
    base = tiny.llama()
    plain = logits(base)
    model = adapted(base, **goat(selection="dense"))
    for module in experts(model).values():
        torch.nn.init.zeros_(module.router_weight)
    assert (logits(model) - plain).abs().max() < 1e-5 * plain.abs().max()
    drawn = logits(adapted(tiny.llama(), **goat()))
    distance = (drawn - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert 0 < distance.max() < 0.2


def test_goat_with_one_expert_starts_at_the_base_model_bit_for_bit() -> None:
    model = adapted(**goat(num_experts=1))
    assert torch.equal(logits(model), logits(tiny.llama()))


def test_goat_equals_the_original_form_with_the_residual_written_into_the_weight() -> None:
    """W_res = W - (s / E) sum_e B0_e^T A0_e, then plain MoE-LoRA on W_res."""
    torch.manual_seed(2)
    linear = torch.nn.Linear(12, 9, bias=False).double()
    config = RotMoleConfig(r=3, num_experts=3, target_modules=["0"], **goat())
    model = get_peft_model(torch.nn.Sequential(copy.deepcopy(linear)), config)
    module = model.base_model.model[0].experts("default").double()
    module.expert_A.data += 0.1 * torch.randn_like(module.expert_A)  # as after some training
    assert module.spec.scale == pytest.approx((3 * 12 / 3) ** 0.5)
    products = torch.einsum("ero,erd->eod", module.residual_B, module.residual_A)
    residual = linear.weight - module.spec.scale / 3 * products.sum(0)
    x = torch.randn(5, 12, dtype=torch.float64)
    dropout = torch.nn.Dropout(0.5)  # the residual is a part of W, which reads x undropped
    torch.manual_seed(5)
    keep = torch.empty(5, 12, dtype=torch.bool).bernoulli_(0.5)
    torch.manual_seed(5)
    found, _ = tiny.addition(module, x, dropout)
    expected = x @ residual.T + slow(module, x * keep * 2, tiny.routing(module, x).weight_TE)
    torch.testing.assert_close(linear(x) + found, expected, rtol=1e-10, atol=1e-10)


def test_goat_reloads_bit_equal_also_onto_an_empty_adapter(tmp_path: Path) -> None:
    model = adapted(**goat())
    for module in experts(model).values():
        module.expert_B.data += 0.1
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path, **options)
        assert torch.equal(logits(again), expected), options
        names = {n.rpartition(".")[2] for n, p in again.named_parameters() if p.requires_grad}
        assert names == ({"expert_A", "expert_B", "router_weight"} if "is_trainable" in options
                         else set())  # fmt: skip


def test_goat_reads_a_transposed_weight_and_names_one_that_is_too_narrow() -> None:
    base = tiny.gpt2()
    ids = {"input_ids": IDS}
    plain = base.eval()(**ids).logits
    model = adapted(base, target_modules=["c_attn"], **goat(num_experts=1))
    assert torch.equal(model.eval()(**ids).logits, plain)
    name, module = next(iter(experts(model).items()))
    weight = base.get_submodule(name).base_layer.weight  # Conv1D: [D, O]
    kept = module.spec.scale * 10 * module.expert_A[0].T @ module.expert_B[0]
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    torch.testing.assert_close(kept, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="singular directions"):
        adapted(r=8, num_experts=8, **goat())


# Frozen and sparse A


@pytest.mark.parametrize(("frozen", "trained"), [("A", {"expert_B"}), ("AB", set())])
def test_frozen_factors_stay_frozen_through_everything_that_switches_training_on(
    frozen: str, trained: set[str], tmp_path: Path
) -> None:
    model = adapted(frozen=frozen, A_density=0.25, init_weights="gaussian", rotation="none")

    def learning(of: torch.nn.Module) -> set[str]:
        return {n.split(".")[-1] for n, p in of.named_parameters() if p.requires_grad}

    trained = trained | {"router_weight"}
    assert learning(model) == trained
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert learning(model) == trained
    model.set_adapter("default")
    assert learning(model) == trained
    model.set_requires_grad("default")
    assert learning(model) == trained
    with model.disable_adapter():
        pass
    assert learning(model) == trained
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert learning(again) == trained
    half = adapted(tiny.llama().to(torch.bfloat16), frozen=frozen)
    assert learning(half) == trained | {"rotation_vector"}
    assert {p.dtype for n, p in half.named_parameters() if "rotmole" in n} == {torch.float32}


def test_a_sparse_A_is_trained_around_and_comes_back_bit_equal(tmp_path: Path) -> None:
    model = adapted(frozen="A", A_density=0.25, init_weights="gaussian", rotation="none")
    before = {n: m.expert_A.detach().clone() for n, m in experts(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, module in experts(model).items():
        assert torch.equal(module.expert_A, before[name])
        assert set((module.expert_A != 0).sum(-1).flatten().tolist()) == {
            max(1, module.expert_A.shape[-1] // 4)
        }
        assert module.expert_B.any()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(logits(again), expected)


# Patterns


def test_experts_and_top_k_by_name_and_by_depth() -> None:
    model = adapted(
        tiny.llama(num_hidden_layers=4),
        num_experts_pattern={"v_proj": 1, r"layers\.3\.mlp\.down_proj": 5},
        top_k_pattern=[1, 2], norm_topk_prob=False,
    )  # fmt: skip
    found = {n: (m.spec.num_experts, m.spec.top_k) for n, m in experts(model).items()}
    assert found["model.layers.0.self_attn.q_proj"] == (3, 1)
    assert found["model.layers.2.self_attn.q_proj"] == (3, 2)
    assert found["model.layers.3.self_attn.v_proj"] == (1, 1)
    assert found["model.layers.3.mlp.down_proj"] == (5, 2)
    assert found["model.layers.2.mlp.down_proj"] == (3, 2)
    routed = {n.split(".")[-2] for n, m in experts(model).items() if hasattr(m, "router_weight")}
    assert routed == {"self_attn", "mlp"}


def test_a_list_cuts_the_depth_into_equal_parts(tmp_path: Path) -> None:
    model = adapted(
        tiny.llama(num_hidden_layers=5), target_modules=["q_proj"], init_weights=False,
        num_experts_pattern=[2, 4, 6, 8], router_aux_loss_coef=0.1,
    )  # fmt: skip
    assert [m.spec.num_experts for m in experts(model).values()] == [2, 2, 4, 6, 8]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(num_hidden_layers=5), tmp_path)
    assert torch.equal(logits(again), expected)


def test_only_layers_with_a_router_share_the_balance_loss() -> None:
    model = adapted(num_experts_pattern={"v_proj": 1, "down_proj": 1}, router_aux_loss_coef=0.6)
    weights = {n: m.loss_weights.balance for n, m in experts(model).items()}
    routed = [value for name, value in weights.items() if "q_proj" in name]
    assert routed == [0.3, 0.3]
    one_expert = adapted(num_experts=1, rotation="none", num_experts_pattern={"q_proj": 2},
                         router_aux_loss_coef=0.6)  # fmt: skip
    named = experts(one_expert)["model.layers.0.self_attn.q_proj"]
    assert named.loss_weights.balance == 0.3


def test_fewer_experts_than_a_token_uses_is_said_with_the_module() -> None:
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj' has 2 experts.*to use 3"):
        adapted(num_experts=4, top_k=3, num_experts_pattern={"q_proj": 2})


BROKEN: list[tuple[dict[str, object], str]] = [
    ({"num_experts_pattern": {"q_proj": 0}}, "num_experts_pattern['q_proj'] is 0"),
    ({"num_experts_pattern": "q_proj"}, "num_experts_pattern is 'q_proj'"),
    ({"top_k_pattern": [2, True]}, "top_k_pattern[1] is True"),
    ({"share_A": 1}, "share_A is 1"),
    ({"share_A": True, "init_weights": "svd"}, "share_A is True but init_weights is 'svd'"),
    ({"share_A": True, "router": "magnitude"}, "share_A is True but router is 'magnitude'"),
    ({"frozen": "B"}, "frozen is 'B'"),
    ({"init_weights": "pissa"}, "init_weights is 'pissa'"),
    (
        {"init_weights": "svd", "router_scope": "block"},
        "init_weights is 'svd' but router_scope is 'block'",
    ),
    ({"A_density": 0}, "A_density is 0;"),
    ({"A_density": 1.5, "frozen": "A"}, "A_density is 1.5"),
    ({"A_density": 0.5}, "A_density is 0.5 but frozen is 'none'"),
    (
        {"A_density": 0.5, "frozen": "A", "init_weights": "svd"},
        "init_weights is 'svd', whose A has no zeros",
    ),
    ({"goat_eta": 0}, "goat_eta is 0"),
]


@pytest.mark.parametrize(("settings", "told"), BROKEN, ids=[told for _, told in BROKEN])
def test_settings_of_experts_that_cannot_work_are_told(
    settings: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        RotMoleConfig(**settings)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_experts": 1, "rotation": "none", "share_A": True}, "share_A=True"),
        ({"selection": "dense", "top_k_pattern": {"q_proj": 1}}, "top_k_pattern="),
        ({"goat_eta": 1.0, "use_rslora": True}, "use_rslora=True"),
        ({"goat_eta": 1.0, "alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_experts_without_effect_warn(settings: dict[str, object], told: str) -> None:
    with pytest.warns(UserWarning, match=f"{told}.*has no effect"):
        RotMoleConfig(**settings)


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # bitsandbytes computes 8-bit products in float16
def test_goat_starts_from_a_quantised_weight_and_leaves_it_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny.llama(**sizes).save_pretrained(tmp_path / "base")

    def load() -> torch.nn.Module:
        quantised = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, dtype=torch.float32
        )

    before = logits(load())
    model = adapted(load(), **goat(r=2, num_experts=2))
    assert 0 < (logits(model) - before).norm() < 0.1 * before.norm()
    for module in experts(model).values():
        module.expert_B.data += 0.1
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
