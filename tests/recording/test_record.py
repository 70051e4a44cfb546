"""record_routing: the sums of every way, router and selection beside loops over tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import rotmole
import tiny
from rotmole import ConfigError, DataError, RotMoleConfig, record_routing
from routing_witness import assert_log, facts, inputs_of

IDS = tiny.tokens(3, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
TASKS = ["de", "fr", "de"]


def adapted(base: torch.nn.Module | None = None, **settings: Any) -> PeftModel:
    torch.manual_seed(3)
    config = RotMoleConfig(
        **({"num_experts": 4, "top_k": 2, "r": 4, "rotation": "tangent", "init_weights": False,
            "target_modules": ["q_proj", "down_proj"]} | settings)
    )  # fmt: skip
    model = get_peft_model(tiny.llama() if base is None else base, config)
    for name, parameter in model.named_parameters():
        if "router" in name and parameter.dim() > 1:
            parameter.data.mul_(5)  # far from even
        if "rotation" in name:
            parameter.data.mul_(3)
    return model.double().eval()


def call(model: PeftModel, **more: Any) -> Any:
    return model(input_ids=IDS, attention_mask=MASK, **more)


WAYS: dict[str, dict[str, Any]] = {
    "fused": {},
    "dense": {"rotation": "radar"},
    "pairs": {"rotation": "radar_pairs"},
    "grouped": {"dispatch": "grouped", "num_experts": 6},
    "sqrt": {"router_sqrt_gate": True, "rotation": "plane"},
    "planes": {"rotation": "givens"},
    "z": {"rotation": "bivector", "rotation_input": "z"},
    "logits": {"rotation_input": "router"},
    "C": {"rotation_dim": 3, "rotation": "plane"},
    "metric": {"rotation_metric": "output"},
    "shared A": {"share_A": True},
    "none": {"rotation": "none"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "all experts": {"selection": "dense"},
    "top_p": {"selection": "top_p", "top_p": 0.6},
    "threshold": {"selection": "threshold"},
    "not normalised": {"norm_topk_prob": False},
    "sigmoid": {"scoring": "sigmoid", "router_bias_rate": 0.01},
    "hash": {"router": "hash", "top_k": 2},
    "cosine": {"router": "cosine", "router_dim": 4},
    "grown": {"experts_added": [1]},
    "block": {"router_scope": "block", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "block top_p": {"router_scope": "block", "selection": "top_p", "rotation": "givens",
                    "target_modules": ["gate_proj", "up_proj", "down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_every_way_says_what_loops_say_and_the_model_what_it_says_without(
    settings: dict[str, Any],
) -> None:
    model = adapted(**settings)
    with torch.no_grad():
        plain = call(model).logits
        with inputs_of(model) as inputs, record_routing(model) as log, log.of(TASKS):
            watched = call(model).logits
    assert torch.equal(plain, watched)
    assert_log(log, model, [(facts(model, inputs, IDS, MASK), MASK, TASKS)])


def test_experts_that_choose_tokens_and_each_side_of_two() -> None:
    model = adapted(tiny.bert(), selection="expert_choice", target_modules=["query"])
    with inputs_of(model) as inputs, record_routing(model) as log, torch.no_grad():
        call(model)
    assert_log(log, model, [(facts(model, inputs, IDS, MASK), MASK, ["all"] * 3)])
    model = adapted(tiny.t5(), target_modules=["SelfAttention.q", "EncDecAttention.k"])
    labels = tiny.tokens(3, 5).clone()
    labels[0, 3:] = -100
    with record_routing(model) as log, torch.no_grad():
        call(model, labels=labels)
    for path, layer in log.layers.items():
        decodes = "decoder" in path and "EncDec" not in path
        assert layer.total().tokens == (13 if decodes else 12), path


def test_the_shared_expert_is_apart() -> None:
    shared = {"shared_expert_r": 3, "shared_expert_gate": True, "shared_expert_rotation": "plane"}
    model, plain = adapted(**shared), adapted()
    with inputs_of(model) as inputs, record_routing(model) as log, torch.no_grad():
        call(model)
    assert_log(log, model, [(facts(model, inputs, IDS, MASK), MASK, ["all"] * 3)])
    for path, layer in log.layers.items():
        experts = model.get_base_model().get_submodule(path).experts("default")
        x_TD = inputs[path][MASK.bool()]
        task = layer.shared.tasks["all"]
        gate = torch.sigmoid(x_TD @ experts.shared_gate[0]).detach()
        assert float(task.mean_weight_E) == pytest.approx(float(gate.mean()), rel=1e-5)
        angle = torch.pi * torch.tanh(x_TD @ experts.shared_rotation_angle[0, 0]).detach()
        assert float(task.rotation.absolute_E) == pytest.approx(float(angle.abs().sum()), rel=1e-4)
        assert (layer.shared.rank, layer.shared.has_router) == (3, False)
    with record_routing(plain) as log, torch.no_grad():
        call(plain)
    assert {layer.shared for layer in log.layers.values()} == {None}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("settings", [{}, WAYS["block"]], ids=["layers", "blocks"])
def test_training_counts_each_token_once(settings: dict[str, Any], reentrant: bool | None) -> None:
    """Two micro-batches, with and without checkpointing; gradients stay bit for bit."""
    model = adapted(**settings).train()
    if reentrant is not None:
        tiny.enable_checkpointing(model, reentrant)
        model.enable_input_require_grads()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        for rows in (slice(0, 2), slice(2, 3)):
            model(input_ids=IDS[rows], attention_mask=MASK[rows], labels=IDS[rows]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    with record_routing(model) as log:
        found = gradients()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with record_routing(model) as once, torch.no_grad():
        call(model.eval())
    for path, layer in log.layers.items():
        total, wanted_total = layer.total(), once.layers[path].total()
        assert (total.tokens, total.rows) == (12, 3)
        assert torch.equal(total.choices_E, wanted_total.choices_E)
        assert torch.equal(total.rotation.count_E, wanted_total.rotation.count_E)
        cos_E = wanted_total.rotation.cos_E
        torch.testing.assert_close(total.rotation.cos_E, cos_E, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"router": "cosine", "router_dim": 4}], ids=str)
def test_generation_with_a_cache_counts_as_one_pass_over_its_tokens(
    settings: dict[str, Any],
) -> None:
    """The packed way and any other: prompt and all new tokens but the last, each once."""
    model = adapted(**settings, target_modules=["q_proj", "k_proj", "down_proj"])
    prompt, mask = IDS[:2], MASK[:2]  # padded on the left, as generation wants it
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with record_routing(model) as log, log.of(["a", "b"]):
        out = model.generate(input_ids=prompt, attention_mask=mask, **options)
    with record_routing(model) as whole, whole.of(["a", "b"]), torch.no_grad():
        mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=out[:, :-1], attention_mask=mask, position_ids=position)
    for path, layer in log.layers.items():
        for task, tokens in (("a", 10), ("b", 8)):
            mine, wanted = layer.tasks[task], whole.layers[path].tasks[task]
            assert mine.tokens == wanted.tokens == tokens
            assert torch.equal(mine.choices_E, wanted.choices_E)
            torch.testing.assert_close(mine.weight_E, wanted.weight_E, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                mine.rotation.cos_E, wanted.rotation.cos_E, rtol=1e-4, atol=1e-4
            )
    with record_routing(model) as log, log.of(["a", "b"]):
        model.generate(input_ids=prompt, attention_mask=MASK[:2], num_beams=2, **options)
    for layer in log.layers.values():  # of two beams, which begin together
        assert [layer.tasks[name].tokens for name in "ab"] == [2 * 6 + 2 * 4, 2 * 4 + 2 * 4]


def test_adapters_are_recorded_apart() -> None:
    model = adapted()
    model.add_adapter("other", RotMoleConfig(num_experts=3, target_modules=["q_proj"]))
    with record_routing(model) as mine, record_routing(model, "other") as theirs, torch.no_grad():
        call(model)
        assert not theirs.layers
        model.set_adapter("other")
        call(model)
        call(model)
    assert {layer.total().tokens for layer in mine.layers.values()} == {12}
    assert {layer.total().tokens for layer in theirs.layers.values()} == {24}
    assert {layer.experts for layer in theirs.layers.values()} == {3}
    assert len(theirs.layers) == 2
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="adapters default, other are active; say whose"):
        record_routing(model).__enter__()
    with pytest.raises(ConfigError, match="no rotmole adapter 'third'; its adapters are"):
        record_routing(model, "third").__enter__()
    with pytest.raises(ConfigError, match="it has no rotmole adapter"):
        record_routing(tiny.llama(), "default").__enter__()


def test_tasks_by_number_by_name_and_by_packed_sequence() -> None:
    model = adapted()
    with torch.no_grad():
        with record_routing(model, tasks=["de", "fr"]) as log:
            call(model, task_id=torch.tensor([0, 1, 0]))
            with pytest.raises(DataError, match=r"task_id holds 2; it must lie in 0\.\.1"):
                call(model, task_id=torch.tensor([0, 1, 2]))
        with record_routing(model) as named, named.of(TASKS):
            call(model)
        stack = model.get_base_model().model.layers[0].self_attn.q_proj.rotmole_stack
        assert not stack.takes_tasks
        assert not stack.outer.takes_tasks
    for path, layer in log.layers.items():
        for task in ("de", "fr"):
            assert torch.equal(
                layer.tasks[task].choices_E, named.layers[path].tasks[task].choices_E
            )
    place = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    with record_routing(model) as packed, torch.no_grad():
        with packed.of(["a", "b", "c", "d", "e", "f"]):
            model(input_ids=IDS, position_ids=place)
        with packed.of(["g", "h", "h"]):
            model(input_ids=IDS, position_ids=place)
        with packed.of(["a", "b"]), pytest.raises(DataError, match="2 tasks are given"):
            call(model)
    layer = next(iter(packed.layers.values()))
    sizes = {name: (task.tokens, task.rows) for name, task in layer.tasks.items()}
    assert sizes == {
        "a": (3, 1), "b": (2, 1), "c": (1, 1), "d": (2, 1), "e": (4, 1), "f": (6, 1),
        "g": (6, 3), "h": (12, 3),
    }  # fmt: skip


def test_nothing_recorded_is_said() -> None:
    model = adapted()

    def recorded_without_the_adapter() -> None:
        with record_routing(model), model.disable_adapter():
            call(model)

    with pytest.warns(UserWarning, match="nothing was recorded of adapter 'default'"):
        recorded_without_the_adapter()


@pytest.mark.parametrize(
    "settings", [{}, {"shared_expert_r": 3, "shared_expert_rotation": "plane"}]
)
def test_angles_are_those_without_dropout(settings: dict[str, Any]) -> None:
    sums = []
    for dropout in (0.0, 0.5):
        first = r".*layers\.0\.self_attn\.q_proj"
        model = adapted(lora_dropout=dropout, target_modules=first, **settings)
        with record_routing(model.train()) as log:
            call(model)
        (layer,) = log.layers.values()
        both = [layer] if layer.shared is None else [layer, layer.shared]
        sums.append([each.total().rotation.absolute_E for each in both])
    for plain_E, dropped_E in zip(*sums, strict=True):
        assert (plain_E > 0).all()
        torch.testing.assert_close(plain_E, dropped_E, rtol=1e-10, atol=0)


def test_a_second_hook_that_runs_the_way_again_counts_nothing_twice() -> None:
    model = adapted()

    def again(experts: Any, args: Any, output: Any) -> None:
        experts.forward(*args)

    with record_routing(model) as log, torch.no_grad():
        for module in model.modules():
            if hasattr(module, "rotmole_experts"):
                module.experts("default").register_forward_hook(again)
        call(model)
    assert {layer.total().tokens for layer in log.layers.values()} == {12}


def test_logs_add_up_and_survive_json() -> None:
    import json

    from rotmole.recording import RoutingLog

    model = adapted(shared_expert_r=2, shared_expert_rotation="tangent")
    with torch.no_grad():
        with record_routing(model) as both, both.of(TASKS):
            call(model)
            model(input_ids=IDS.flip(1))
        with record_routing(model) as first, first.of(TASKS):
            call(model)
        with record_routing(model) as second, second.of(TASKS):
            model(input_ids=IDS.flip(1))
    second = RoutingLog.from_dict(json.loads(json.dumps(second.to_dict())))
    first.merge(second)
    ours, theirs = first.to_dict(), both.to_dict()
    assert ours.keys() == theirs.keys()
    flat = [torch.utils._pytree.tree_leaves(content) for content in (ours, theirs)]
    for mine, wanted in zip(*flat, strict=True):
        assert mine == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)
    other = adapted(num_experts=3)
    with record_routing(other) as third, torch.no_grad():
        call(other)
    with pytest.raises(DataError, match="experts is 4 in one and 3 in the other"):
        first.merge(third)
    untouched = copy.deepcopy(third)
    third.clear()
    assert not third.layers
    assert untouched.tasks == ["all"]
    assert rotmole.record_routing is record_routing
