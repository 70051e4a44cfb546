"""Growing: old outputs and old tensors stay, whatever is trained afterwards."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import rotmole
from rotmole.errors import ConfigError, ModelError
from rotmole.ops.routing.balance import load_balance_loss
from rotmole.ops.routing.generations import select_generations
from rotmole.ops.routing.route import route
from rotmole.optim import ExpertRates, Muon, RiemannianAdamW, RiemannianSGD, parameter_groups
from rotmole.optim.riemannian import expert_modules
from rotmole.tuner.grow import grow, grow_saved
from tiny import bert, llama

IDS = torch.arange(3, 27).reshape(2, 12)
BOTH = ["experts", "router", "shared_expert"]
# outputs at the start equal the old ones for each of these, up to the rounding of float64
EXACT: dict[str, dict[str, Any]] = {
    "top_k": {},
    "one of K": {"top_k": 1},
    "switch": {"top_k": 1, "norm_topk_prob": False},
    "not normalised": {"norm_topk_prob": False},
    "sigmoid": {"scoring": "sigmoid"},
    "sigmoid, not normalised": {"scoring": "sigmoid", "norm_topk_prob": False},
    "dense": {"selection": "dense"},
    "dense sigmoid": {"selection": "dense", "scoring": "sigmoid", "norm_topk_prob": False},
    "top_p": {"selection": "top_p", "top_p": 0.6},
    "top_p, not normalised": {"selection": "top_p", "norm_topk_prob": False},
    "threshold": {"selection": "threshold"},
    "bias": {"router_bias_rate": 0.01},
    "mlp": {"router": "mlp"},
    "mlp_hadamard": {"router": "mlp_hadamard"},
    "cosine": {"router": "cosine"},
    "attention": {"router": "attention"},
    "hybrid": {"router": "hybrid"},
    "hash": {"router": "hash"},
    "magnitude": {"router": "magnitude"},
    "factored router": {"router_dim": 4},
    "temperature": {"router_temperature": 0.5},
    "from one expert": {"num_experts": 1},
    "from one expert, not normalised": {
        "num_experts": 1, "scoring": "sigmoid", "norm_topk_prob": False,
    },
    "by layer": {"num_experts_pattern": {"q_proj": 1, "v_proj": 5}},
    "by depth": {"num_experts_pattern": [2, 3]},
    "shared A": {"share_A": True},
    "frozen A": {"frozen": "A", "A_density": 0.5, "init_weights": "gaussian"},
    "svd": {"init_weights": "svd", "r": 2},
    "grouped": {"dispatch": "grouped"},
    "rotation none": {"rotation": "none"},
    "plane": {"rotation": "plane"},
    "centroid": {"rotation": "centroid"},
    "givens": {"rotation": "givens"},
    "output metric": {"rotation_metric": "output"},
    "few gates": {"rotation_dim": 3},
    "gates of z": {"rotation_input": "z"},
    "gates of the router": {"rotation_input": "router"},
    "radar": {"rotation": "radar"},
    "radar_pairs": {"rotation": "radar_pairs", "radar_rank": 3},
    "sqrt gate": {"router_sqrt_gate": True},
    "shared expert": {
        "shared_expert_r": 2, "shared_expert_gate": True, "shared_expert_rotation": "tangent",
    },
}  # fmt: skip


def trained(**settings: Any) -> PeftModel:
    """A model whose adapter has random parameters, as after training, in float64."""
    settings = {"num_experts": 4, "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one expert a token, and of settings without effect
        config = rotmole.RotMoleConfig(**settings)
    model = get_peft_model(llama().double(), config).double()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: PeftModel) -> None:
    for name, tensor in experts_of(model).items():
        if "residual" not in name and not name.endswith("expert_A"):
            tensor.copy_(torch.randn_like(tensor) * (0.3 if "router" not in name else 0.6))


def experts_of(model: PeftModel) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if ".rotmole_experts." in n}


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def step(model: PeftModel, optimizer: torch.optim.Optimizer, times: int = 2) -> None:
    model.train()
    for _ in range(times):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        rotmole.update_router_bias(model)


@pytest.mark.parametrize("case", EXACT)
def test_outputs_are_what_they_were(case: str) -> None:
    model = trained(**EXACT[case])
    before, old = logits(model), {n: t.clone() for n, t in experts_of(model).items()}
    with model.disable_adapter():
        base = logits(model)
    assert (before - base).abs().max() > 1e-2, "the adapter must matter"
    grow(model, 1)
    grow(model, 2)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    for name, tensor in old.items():
        if name.endswith("router_bias"):
            assert torch.equal(experts_of(model)[name][: len(tensor)], tensor)
        else:
            assert torch.equal(experts_of(model)[name], tensor)


def test_expert_choice_stays_too() -> None:
    config = rotmole.RotMoleConfig(
        num_experts=4, r=4, selection="expert_choice", task_type="SEQ_CLS", target_modules=["query"]
    )
    torch.manual_seed(1)
    model = get_peft_model(bert().double(), config).double()
    randomise(model)
    before = logits(model)
    grow(model, 2)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in EXACT if "frozen" not in c])
def test_new_experts_learn(case: str) -> None:
    model = trained(**EXACT[case])
    before = logits(model)
    grow(model, 1, freeze_old=BOTH if case == "shared expert" else BOTH[:2])
    old = {n: t.clone() for n, t in experts_of(model).items()}
    trains = [p for p in model.parameters() if p.requires_grad]
    step(model, torch.optim.AdamW(trains, lr=1e-2, weight_decay=0.3))
    assert (logits(model) - before).abs().max() > 1e-4
    for name, tensor in experts_of(model).items():
        new = name.endswith("_1")
        if not new and not name.endswith("router_bias"):
            assert torch.equal(tensor, old[name]), name
        elif name.endswith(("expert_B_1", "router_weight_1")):
            assert not torch.equal(tensor, old[name]), name


OPTIMIZERS: dict[str, Callable[[PeftModel, Any], torch.optim.Optimizer]] = {
    "adamw": lambda model, groups: torch.optim.AdamW(groups),
    "sgd": lambda model, groups: torch.optim.SGD(groups, momentum=0.9),
    "muon": lambda model, groups: Muon(groups, model=model),
    "riemannian_adamw": lambda model, groups: RiemannianAdamW(groups, model=model),
    "riemannian_sgd": lambda model, groups: RiemannianSGD(groups, model=model, delta=1e-2),
}
SWITCHES = [["experts"], ["router", "shared_expert"], ["experts", "router"], []]


@pytest.mark.parametrize(
    ("optimizer", "kept"), list(itertools.product(OPTIMIZERS, SWITCHES)), ids=str
)
def test_frozen_tensors_keep_every_bit(optimizer: str, kept: list[str]) -> None:
    model = trained(
        rotation="plane", router="attention", share_A=optimizer == "muon", shared_expert_r=2,
        shared_expert_gate=True,
    )  # fmt: skip
    grow(model, 2, freeze_old=kept)
    old = {n: t.clone() for n, t in experts_of(model).items()}
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.3)
    steps = OPTIMIZERS[optimizer](model, groups)
    for _ in range(2):
        steps.zero_grad()
        for _ in range(2):  # accumulated
            (model.train()(input_ids=IDS, labels=IDS).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        steps.step()
    for name, tensor in experts_of(model).items():
        part = "router" if ".router_" in name else "experts"
        part = "shared_expert" if ".shared_" in name else part
        frozen = part in kept and not name.endswith("_1")
        assert torch.equal(tensor, old[name]) == frozen, name


def test_roles_of_added_tensors() -> None:
    model = trained(rotation="plane")
    grow(model, 1, freeze_old=["experts"])
    grow(model, 1)  # the last growth decides what is kept
    groups = parameter_groups(model, lr=1.0, scaling_gate_lr=2.0, lora_plus_ratio=3.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    wanted = {"expert_A": 1.0, "expert_B": 3.0, "router_weight": 2.0, "rotation_vector": 1.0}
    for name, parameter in model.named_parameters():
        word = name.rpartition(".")[2].removesuffix("_1").removesuffix("_2")
        if word in wanted:
            assert rates[id(parameter)] == wanted[word], name


def test_a_frozen_A_stays_frozen_and_sparse_in_added_experts() -> None:
    model = trained(**EXACT["frozen A"])
    grow(model, 2)
    added = [(n, p) for n, p in model.named_parameters() if n.endswith("expert_A_1")]
    assert added
    for name, parameter in added:
        assert not parameter.requires_grad, name
        assert ((parameter != 0).sum(-1) == parameter.shape[-1] // 2).all()
    imported = trained(frozen="AB", init_weights=False)
    grow(imported, 1)
    learns = {n.rpartition(".")[2] for n, p in imported.named_parameters() if p.requires_grad}
    assert {"expert_A_1", "expert_B_1"} < learns
    assert not {"expert_A", "expert_B"} & learns


@pytest.mark.parametrize("share_A", [False, True])
def test_every_factor_is_paired_with_its_own_experts(share_A: bool) -> None:
    model = trained(share_A=share_A, shared_expert_r=2, target_modules=["q_proj"])
    grow(model, 1)
    for module in expert_modules(model):
        pairs = {id(factor): other for factor, other in module.factor_pairs()}
        named = {n: p for n, p in module.named_parameters() if n.split("_")[1] in "AB"}
        assert len(named) == (5 if share_A else 6)
        assert pairs.keys() == {id(p) for p in named.values()}
        for name, parameter in named.items():
            other, partner = pairs[id(parameter)], name.translate(str.maketrans("AB", "BA"))
            if share_A and name == "expert_A":
                assert torch.equal(other, torch.cat([module.expert_B, module.expert_B_1]))
            else:
                assert other is named["expert_A" if share_A and "expert" in name else partner]


def test_saved_loaded_and_decoded(tmp_path: Path) -> None:
    model = trained(num_experts_pattern={"q_proj": 1})
    grow(model, 1, freeze_old=["experts"])
    grow(model, 2, freeze_old=["experts", "router"])
    randomise(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["num_experts"], saved["num_experts_pattern"]) == (7, {"q_proj": 4})
    assert saved["experts_added"] == [1, 2]
    assert saved["freeze_old"] == ["experts", "router"]
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            llama().double(), tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=False
        )
        assert torch.equal(logits(loaded), wanted)
    asked = {"max_new_tokens": 6, "do_sample": False}
    ids = IDS[:, :4]
    cached = loaded.generate(input_ids=ids, use_cache=True, **asked)
    assert torch.equal(cached, loaded.generate(input_ids=ids, use_cache=False, **asked))
    training = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    learns = {n.rpartition(".")[2] for n, p in training.named_parameters() if p.requires_grad}
    assert learns == {"expert_A_2", "expert_B_2", "rotation_vector_2", "router_weight_2"}


def test_a_saved_adapter_grows_without_its_model(tmp_path: Path) -> None:
    model = trained(num_experts_pattern={"v_proj": 2}, rank_pattern={"v_proj": 2})
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "note.txt").write_text("kept")
    grow_saved(tmp_path / "old", tmp_path / "one", 2, freeze_old=["router"])
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    grow_saved(tmp_path / "old", tmp_path / "two", 2, freeze_old=["router"])
    assert torch.equal(torch.random.get_rng_state(), state)
    grow_saved(tmp_path / "old", tmp_path / "other", 2, seed=1)
    old, one, two, other = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("old", "one", "two", "other")
    )
    assert all(torch.equal(one[name], tensor) for name, tensor in old.items())
    assert all(torch.equal(one[name], two[name]) for name in one)
    added = [n for n in one if n.endswith(("expert_A_1", "router_weight_1"))]
    assert added
    assert not any(torch.equal(one[n], other[n]) for n in added)
    assert (tmp_path / "one" / "note.txt").read_text() == "kept"
    loaded = PeftModel.from_pretrained(
        llama().double(), tmp_path / "one", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-12)
    grow(model, 2, freeze_old=["router"])
    shapes = {n.replace(".default", ""): t.shape for n, t in experts_of(model).items()}
    assert shapes == {n: t.shape for n, t in one.items()}


@pytest.mark.parametrize("router", ["linear", "mlp", "attention", "hybrid"])
def test_new_weights_know_nothing_of_a_number_on_all_old_logits(router: str) -> None:
    x_TD = torch.rand(9, 32).double() + 0.5
    weights = []
    for shift in (0.0, 20.0):
        model = trained(router=router, target_modules=["q_proj"])
        with torch.no_grad():
            for name, row in expert_modules(model)[0].named_parameters():
                if name in ("router_weight", "router_key"):
                    row.add_(shift * torch.ones(row.shape[1]))
        torch.manual_seed(3)
        grow(model, 1)
        first = expert_modules(model)[0]
        weights.append(route(first.spec, x_TD, first.weights())[1].weight_TE)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-9)
    assert (weights[0][:, 4] > 1e-3).any()


def test_float32_is_equal_to_rounding() -> None:
    model = trained(rotation="none").float()
    before = logits(model)
    grow(model, 2)
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


def test_the_bias_balances_within_a_generation() -> None:
    model = trained(router_bias_rate=0.5, num_experts=4)
    grow(model, 3, freeze_old=["router"])
    biases = [t for n, t in experts_of(model).items() if n.endswith("router_bias")]
    old = [bias[:4].clone() for bias in biases]
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    rotmole.update_router_bias(model)
    for bias, before in zip(biases, old, strict=True):
        assert torch.equal(bias[:4], before)
        assert bias[4:].any()


def test_even_use_within_generations_has_a_balance_loss_of_one() -> None:
    logits_TE = torch.eye(6)[torch.tensor([0, 1, 2, 3] * 3)] * 9 + torch.cat(
        [torch.zeros(12, 4), torch.eye(2)[torch.arange(12) // 4 % 2] * 9], dim=1
    )
    rows = torch.cat([logits_TE[:4], logits_TE[4:8]])
    routing = select_generations(rows, [4, 2], top_k=1)
    loss = load_balance_loss(
        routing.probability_TE,
        routing.selected_TE,
        sequence_T=torch.zeros(8, dtype=torch.long),
        sequences=1,
        mask_T=None,
    )
    torch.testing.assert_close(loss, torch.ones_like(loss))


def test_names_go_on_and_the_factor_stays_where_it_was() -> None:
    model = trained(expert_names=["math", "code", "law"], num_experts=3, routed_scaling_factor=2.0)
    before = logits(model)
    grow(model, 2)
    config = model.peft_config["default"]
    assert config.expert_names == ["math", "code", "law", "added-1", "added-2"]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no effect with one expert
        single = trained(num_experts=1, routed_scaling_factor=2.0)
    before = logits(single)
    grow(single, 1)
    torch.testing.assert_close(logits(single), before, rtol=0, atol=1e-12)
    mixed = trained(num_experts_pattern={"q_proj": 1}, routed_scaling_factor=2.0)
    with pytest.raises(ConfigError, match=r"routed_scaling_factor is 2\.0"):
        grow(mixed, 1)


def test_rates_by_load_reach_added_tensors() -> None:
    model = trained(num_experts=2, top_k=1)
    grow(model, 2)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    rates = ExpertRates(optimizer, model=model, decay=0.0)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    plain = trained(num_experts=2, top_k=1)
    grow(plain, 2)
    plain.load_state_dict(before)
    other = torch.optim.AdamW(parameter_groups(plain, lr=1e-2))
    plain.train()(input_ids=IDS, labels=IDS).loss.backward()
    other.step()
    stepped = dict(plain.named_parameters())
    for path, layer in model.named_modules():
        if not hasattr(layer, "rotmole_experts"):
            continue
        name = f"{path}.rotmole_experts.default.expert_B_1"
        factor_E = rates.factors()[f"{path}.default"][2:]
        wanted = before[name] + factor_E[:, None, None] * (stepped[name] - before[name])
        torch.testing.assert_close(dict(model.named_parameters())[name], wanted)


def test_what_cannot_grow_says_why() -> None:
    model = trained()
    for number in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match=r"experts is .*at least 1"):
            grow(model, number)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(ConfigError, match=r"freeze_old is .*experts, router, shared_expert"):
        grow(model, 1, freeze_old=["gates"])
    with pytest.raises(ModelError, match="no RotMoLE adapter named 'other'; it has default"):
        grow(model, 1, adapter_name="other")
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="no RotMoLE adapter"):
        grow(lora, 1)
    block = rotmole.RotMoleConfig(
        num_experts=3, router_scope="block", target_modules=["gate_proj", "up_proj", "down_proj"]
    )
    with pytest.raises(ConfigError, match="router_scope block cannot grow"):
        grow(get_peft_model(llama(), block), 1)
    assert model.peft_config["default"].experts_added == []
    with pytest.warns(UserWarning, match="there is no shared expert"):
        grow(model, 1, freeze_old=BOTH)
    assert model.peft_config["default"].freeze_old == ["experts", "router"]
