from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

import rotmole
import tiny
from rotmole.export.static_lora import active_experts, needed_rank, static_lora, total_share
from rotmole.inspection.regression import Sums, best_map, mean
from rotmole.inspection.sums import added_sums
from rotmole.tuner.experts.experts import Experts

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base: torch.nn.Module | None = None, **settings: object) -> PeftModel:
    """A tiny model whose adapter has weights that do something."""
    config = rotmole.RotMoleConfig(
        **({"task_type": "CAUSAL_LM", "r": 3, "target_modules": TARGETS} | settings)
    )
    model = get_peft_model(tiny.llama() if base is None else base, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                for parameter in module.parameters():
                    parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def batches(count: int, seed: int = 0, length: int = 12) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tiny.tokens(4, length, seed=seed + i)} for i in range(count)]


def regression(x: torch.Tensor, y: torch.Tensor) -> Sums:
    return Sums(x.T @ x, x.T @ y, float(y.square().sum()), len(x))


def test_the_best_map_of_a_rank_is_the_minimum_of_the_squared_error() -> None:
    """Against torch's own least squares, and against gradient descent on A and B."""
    torch.manual_seed(0)
    x = torch.randn(200, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    y = x @ torch.randn(7, 5, dtype=torch.float64) + torch.randn(200, 5, dtype=torch.float64)
    W, A, B = best_map(regression(x, y), 2, ridge=0.0)
    torch.testing.assert_close(W, torch.linalg.lstsq(x, y).solution)
    ours = float((y - x @ A.T @ B.T).square().sum())
    for seed in range(3):
        torch.manual_seed(seed)
        a = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
        b = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([a, b], max_iter=500, line_search_fn="strong_wolfe")

        def loss(a=a, b=b, search=search) -> torch.Tensor:
            search.zero_grad()
            value = (y - x @ a.T @ b.T).square().sum()
            value.backward()
            return value

        search.step(loss)
        found = float((y - x @ a.T @ b.T).square().sum().detach())
        assert found == pytest.approx(ours, rel=1e-6)


def test_the_share_is_that_of_the_explained_power() -> None:
    torch.manual_seed(1)
    x, y = (torch.randn(50, n, dtype=torch.float64) for n in (4, 3))
    W = torch.randn(4, 3, dtype=torch.float64)
    expected = 1 - float((y - x @ W).square().sum() / y.square().sum())
    assert regression(x, y).share(W) == pytest.approx(expected)


def test_a_rank_above_the_widths_is_filled_with_zeros() -> None:
    torch.manual_seed(2)
    x, y = (torch.randn(50, n, dtype=torch.float64) for n in (4, 3))
    W, A, B = best_map(regression(x, y), 9, ridge=0.0)
    assert A.shape == (9, 4)
    assert B.shape == (3, 9)
    torch.testing.assert_close(A.T @ B.T, W)


def test_parts_count_alike_and_empty_ones_not_at_all() -> None:
    torch.manual_seed(3)
    x, y = (torch.randn(60, n, dtype=torch.float64) for n in (4, 3))
    few, many = regression(x[:10], y[:10]), regression(x[10:], y[10:])
    empty = Sums(torch.zeros(4, 4).double(), torch.zeros(4, 3).double(), 0.0, 0)
    both = mean([few, many, empty])
    torch.testing.assert_close(both.XX_DD, (few.XX_DD / 10 + many.XX_DD / 50) / 2)
    torch.testing.assert_close(both.XY_DO, (few.XY_DO / 10 + many.XY_DO / 50) / 2)
    assert both.power == pytest.approx((few.power / 10 + many.power / 50) / 2)


def test_the_sums_are_those_of_what_the_adapter_adds() -> None:
    """Against inputs and outputs of the layers, with and without adapter; q and v share X^T X."""
    model = adapted(num_experts=3, rotation="tangent").double()
    experts = active_experts(model)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {path: [] for path in experts}

    def hook(path: str):
        def listen(layer, arguments, output):
            with torch.no_grad():
                seen[path].append((arguments[0], output - layer.base_layer(arguments[0])))

        return listen

    base = model.get_base_model()
    handles = [base.get_submodule(p).register_forward_hook(hook(p)) for p in experts]
    sums = added_sums(model, experts, batches(3))
    for handle in handles:
        handle.remove()
    for path, pairs in seen.items():
        x, y = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in (0, 1))
        torch.testing.assert_close(sums[path].XX_DD, x.T @ x)
        torch.testing.assert_close(sums[path].XY_DO, x.T @ y)
        assert sums[path].power == pytest.approx(float(y.square().sum()))
        assert sums[path].tokens == 3 * 4 * 12
    q, v = (sums[f"model.layers.0.self_attn.{name}_proj"].XX_DD for name in "qv")
    assert q is v
    assert not any(module._forward_hooks for module in experts.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 1},
        {"num_experts": 1, "init_weights": "svd"},
        {"num_experts": 1, "shared_expert_r": 2},
        {"num_experts": 1, "use_rslora": True, "lora_alpha": 5, "r": 4},
    ],
    ids=["one expert", "svd start", "shared expert", "rslora"],
)
def test_an_adapter_that_is_a_lora_is_exported_exactly(settings: dict[str, object]) -> None:
    model = adapted(**({"rotation": "none"} | settings)).double()
    rank = needed_rank(model)
    assert rank is not None
    layers = static_lora(model, {"rows": batches(1)}, rank=rank + 1)
    assert all(layer.exact for layer in layers.values())
    for path, module in active_experts(model).items():
        layer = layers[path]
        x = torch.randn(6, layer.A_RD.shape[1], dtype=torch.float64)
        y, _ = tiny.addition(module, x)
        torch.testing.assert_close(x @ layer.A_RD.T @ layer.B_OR.T, y)
    below = static_lora(model, {"rows": batches(2)}, rank=1)
    assert not any(layer.exact for layer in below.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 2},
        {"num_experts": 1, "rotation": "plane", "r": 4},
        {"num_experts": 1, "shared_expert_r": 2, "shared_expert_gate": True},
        {"num_experts": 1, "shared_expert_r": 3, "shared_expert_rotation": "plane"},
    ],
    ids=["two experts", "rotation", "gated shared expert", "rotated shared expert"],
)
def test_what_is_no_lora_is_not_called_one(settings: dict[str, object]) -> None:
    model = adapted(**({"rotation": "none"} | settings))
    assert needed_rank(model) is None


def test_a_larger_rank_explains_more_and_the_linear_map_the_most() -> None:
    model = adapted(num_experts=4, rotation="tangent")
    shares = [
        total_share(static_lora(model, {"rows": batches(8)}, rank=rank), "rows") for rank in (1, 4)
    ]
    assert shares[0].static < shares[1].static < shares[1].linear < 1
    assert shares[1].tokens == 8 * 4 * 12


def test_experts_that_are_equal_are_one_linear_map() -> None:
    """A dense mixture of equal experts is a LoRA, which the regression must find."""
    model = adapted(num_experts=3, selection="dense", rotation="none")
    with torch.no_grad():
        for module in active_experts(model).values():
            for factor in (module.expert_A, module.expert_B):
                factor.copy_(factor[:1].expand_as(factor))
    layers = static_lora(model, {"rows": batches(8)}, {"other": batches(2, seed=50)}, rank=3)
    for name in ("rows", "other"):
        assert total_share(layers, name).static == pytest.approx(1, abs=1e-3)


def test_little_memory_only_costs_passes() -> None:
    model = adapted(num_experts=4)
    whole = static_lora(model, {"rows": batches(3)}, rank=2)
    parts = static_lora(model, {"rows": batches(3)}, rank=2, memory=1)
    for path, layer in whole.items():
        torch.testing.assert_close(layer.A_RD.T @ layer.B_OR.T,
                                   parts[path].A_RD.T @ parts[path].B_OR.T)  # fmt: skip
        assert layer.shares == parts[path].shares


def test_a_layer_that_is_never_called_adds_nothing() -> None:
    model = adapted(num_experts=2)
    layer = model.get_base_model().model.layers[1].mlp
    layer.forward = lambda x: torch.zeros_like(x)
    layers = static_lora(model, {"rows": batches(1)}, rank=2)
    dead = layers["model.layers.1.mlp.down_proj"]
    assert not dead.A_RD.any()
    assert dead.shares["rows"].tokens == 0


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(num_experts=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    static_lora(model, {"rows": batches(1)}, rank=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_a_lora_is_refused() -> None:
    blocks = adapted(
        num_experts=2, rotation="none", router_scope="block",
        target_modules=["gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    with pytest.raises(rotmole.ModelError, match="whole feed-forward blocks"):
        static_lora(blocks, {"rows": batches(1)}, rank=2)
    with pytest.raises(rotmole.ModelError, match="no active RotMoLE adapter"):
        static_lora(tiny.llama(), {"rows": batches(1)}, rank=2)
    with pytest.raises(rotmole.ConfigError, match="rank is 0"):
        static_lora(adapted(num_experts=2), {"rows": batches(1)}, rank=0)
