"""Which way a mixture is computed is a matter of speed alone; packed weights are never stale."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

import tiny
from rotmole import ConfigError, ModelError, RotMoleConfig
from rotmole.ops.mixture.packed import Pack
from rotmole.tuner.experts import decoding, ways
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

MODES = ["none", "tangent", "plane", "centroid", "givens", "bias", "cayley"]


def adapted(**settings: object) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "num_experts": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    fields |= {"init_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny.llama().double(), RotMoleConfig(**(fields | settings))).double()


def experts(model: PeftModel) -> list[Experts]:
    return [m.experts("default") for m in model.modules() if isinstance(m, RotMoleLayer)]


def decoded(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, read from the cache of the others."""
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        return model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]


def whole(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1]


def packs_made(model: PeftModel, ids: torch.Tensor) -> dict[Experts, bool]:
    """Which experts have weights packed for a generation, while its cache is there."""
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        model(input_ids=ids[:, -1:], past_key_values=cache)
    layers = [m for m in model.modules() if isinstance(m, RotMoleLayer)]
    groups = {}
    for layer in layers:
        groups |= layer.rotmole_stack.packs.get(cache, {})
    made = {layer.experts("default"): False for layer in layers}
    return made | {one: group.packed is not None for one, group in groups.items()}


@pytest.mark.parametrize("rotation", MODES)
@pytest.mark.parametrize("dispatch", ["fused", "grouped"])
def test_every_way_gives_one_result(rotation: str, dispatch: str) -> None:
    model, ids = adapted(rotation=rotation, dispatch=dispatch).eval(), tiny.tokens(3, 7)
    other = adapted(rotation=rotation).eval()
    assert torch.allclose(whole(model, ids), whole(other, ids), rtol=0, atol=1e-12)
    assert torch.allclose(decoded(model, ids), whole(other, ids), rtol=0, atol=1e-12)
    packed = packs_made(model, ids)
    assert packed == {one: dispatch == "fused" for one in experts(model)}


SMALL = {
    "dim": {"rotation": "plane", "rotation_dim": 2},
    "z": {"rotation": "tangent", "rotation_input": "z"},
    "router": {"rotation": "givens", "rotation_input": "router"},
    "router-sigmoid": {"rotation": "plane", "rotation_input": "router", "scoring": "sigmoid"},
    "factored": {"router_dim": 3, "rotation": "tangent", "rotation_input": "router"},
    "bias-dim": {"rotation": "bias", "rotation_dim": 3, "rotation_metric": "output"},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dispatch", ["fused", "grouped"])
def test_gates_of_few_inputs_give_one_result_every_way(name: str, dispatch: str) -> None:
    """Cached decoding, whole rows, gradients; the dense way by functorch is the slow twin."""
    settings = SMALL[name]
    if dispatch == "grouped" and ("rotation_metric" in settings or name == "z"):
        dispatch = "auto"
    model, ids = adapted(dispatch=dispatch, **settings).eval(), tiny.tokens(3, 7)
    assert torch.allclose(decoded(model, ids), whole(model, ids), rtol=0, atol=1e-12)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {"input_ids": ids, "labels": ids}
        return torch.func.functional_call(model, values, kwargs=inputs).loss

    wanted = torch.func.grad(loss)({n: p.detach() for n, p in trained.items()})
    model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in trained.items():
        assert torch.allclose(parameter.grad, wanted[key], rtol=0, atol=1e-11), key
        assert wanted[key].any(), key


@pytest.mark.parametrize("name", SMALL)
def test_gates_of_few_inputs_start_at_none_and_come_back(name: str, tmp_path: Path) -> None:
    ids = tiny.tokens(2, 6)
    others = {key: value for key, value in SMALL[name].items() if not key.startswith("rotation")}
    plain = adapted(rotation="none", init_weights=True, **others).train()
    model = adapted(init_weights=True, **SMALL[name]).train()
    state = {n: p for n, p in plain.named_parameters() if "expert_" in n or "router" in n}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("expert_B"):
                parameter.normal_()
            if key in state and state[key].shape == parameter.shape:
                state[key].copy_(parameter)
    assert torch.equal(whole(model, ids), whole(plain, ids))
    model(input_ids=ids, labels=ids).loss.backward()
    gates = [p for n, p in model.named_parameters() if "rotation_" in n]
    assert all(p.grad is not None for p in gates)
    assert any(p.grad.any() for p in gates)  # no gate sleeps
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama().double(), tmp_path).double()
    assert torch.equal(whole(again, ids), whole(model.eval(), ids))


@pytest.mark.parametrize("dispatch", ["fused", "grouped"])
def test_every_way_gives_the_same_gradients(dispatch: str) -> None:
    found = []
    for way in ("auto", dispatch):
        model, ids = adapted(dispatch=way, router_aux_loss_coef=0.1), tiny.tokens(3, 7)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=0, atol=1e-12), name


def test_many_experts_are_grouped_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    grouped = ways.grouped_mixture
    monkeypatch.setattr(
        ways, "grouped_mixture", lambda *a, **k: calls.append(1) or grouped(*a, **k)
    )
    ids = tiny.tokens(2, 5)
    for number, expected in ((6, False), (32, True)):
        calls.clear()
        whole(adapted(num_experts=number).eval(), ids)
        assert bool(calls) == expected


def test_grouping_what_cannot_be_grouped_is_refused() -> None:
    for settings in ({"rotation": "radar"}, {"selection": "dense"}, {"share_A": True}):
        with pytest.raises(ConfigError, match="dispatch is 'grouped'"):
            RotMoleConfig(dispatch="grouped", **settings)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize("frozen", ["none", "AB"])
def test_training_between_two_answers(fused: bool, switches: bool, frozen: str) -> None:
    """Fused AdamW changes weights without a new version; also where eval() is never left."""
    model, ids = adapted(frozen=frozen).eval(), tiny.tokens(2, 7)
    before = decoded(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    model.train(switches)
    loss = model(input_ids=ids, labels=ids).loss
    decoded(model, ids)  # an answer between the two passes must leave nothing behind
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval() if switches else None
    after = decoded(model, ids)
    assert not torch.allclose(after, before)
    assert torch.allclose(after, whole(model, ids), rtol=0, atol=1e-12)


def test_loading_moving_and_switching_between_two_answers() -> None:
    model, ids = adapted().eval(), tiny.tokens(2, 7)
    first = decoded(model, ids)
    state = {n: 2 * t for n, t in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    loaded = decoded(model, ids)
    assert not torch.allclose(loaded, first)
    assert torch.allclose(loaded, whole(model, ids), rtol=0, atol=1e-12)
    model.add_adapter("other", RotMoleConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.set_adapter("other")
    assert torch.allclose(decoded(model, ids), whole(model, ids), rtol=0, atol=1e-9)
    model.set_adapter("default")
    assert torch.equal(decoded(model, ids), loaded)
    model.float()
    assert torch.allclose(decoded(model, ids), whole(model, ids), rtol=0, atol=1e-4)
    assert decoded(model, ids).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the products' type alone is another
        assert torch.allclose(decoded(model, ids).float(), whole(model, ids).float(), atol=0.05)
    assert torch.allclose(decoded(model, ids), whole(model, ids), rtol=0, atol=1e-4)


class Attention(torch.nn.Module):
    """Reads one tensor three times, or changes it on the way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.q, self.k, self.v = (torch.nn.Linear(6, width) for width in (6, 3, 2))

    def forward(self, x: torch.Tensor, past_key_values: object = None) -> torch.Tensor:
        q, k = self.q(x), self.k(x + 1 if self.way == "another tensor" else x)
        if self.way == "changed in place":
            x.mul_(2)
        v = torch.zeros(*x.shape[:2], 2).double() if self.way == "not called" else self.v(x)
        return torch.cat([q, k, v], dim=-1)


def attention(way: str, **settings: object) -> tuple[PeftModel, dict[str, Experts]]:
    torch.manual_seed(0)
    settings = {"r": 4, "init_weights": False, "target_modules": ["q", "k", "v"]} | settings
    config = RotMoleConfig(**settings)
    model = get_peft_model(Attention(way).double(), config).double().eval()
    named = model.base_model.model.named_children()
    experts = {name: layer.experts("default") for name, layer in named}
    for one in experts.values():
        one.expert_B.data.add_(0.1)  # no start that subtracts itself
    return model, experts


class Cache:
    """Stands for the key-value cache of one generation."""


def group_of(model: PeftModel, leader: Experts, cache: Cache) -> object:
    layer = next(m for m in model.modules() if isinstance(m, RotMoleLayer))
    return layer.rotmole_stack.packs[cache][leader]


WAYS = ["alike", "another tensor", "changed in place", "not called"]


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": "none"},
        {"rotation": "none", "init_weights": "svd", "num_experts": 2, "r": 1},
        {"rotation": "tangent", "share_A": True},
        {"rotation": "plane"},
        {"rotation": "centroid"},
        {"rotation": "givens"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("way", WAYS)
def test_layers_that_read_one_tensor_share_their_work(way: str, settings: dict[str, Any]) -> None:
    """A copy, with gradients on, packs nothing: the slow twin of each of four tokens."""
    model, layers = attention("alike", **settings)
    inner, twin, cache = model.base_model.model, copy.deepcopy(model), Cache()
    for token in range(4):
        inner.way = "alike" if token < 2 else way  # first the group forms
        twin.base_model.model.way = inner.way
        x = torch.randn(3, 1, 6, generator=torch.Generator().manual_seed(token)).double()
        wanted = twin(x.clone()).detach()
        with torch.no_grad():
            found = model(x.clone(), past_key_values=cache)
        if token < 2:
            followers = group_of(model, layers["q"], cache).followers
            assert followers == [layers["k"], layers["v"]]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_first_reader_computes_for_the_others() -> None:
    model, layers = attention("alike")
    calls: list[int] = []
    inner, caches = model.base_model.model, [Cache()]
    x = torch.randn(3, 1, 6).double()
    counted = decoding.packed_additions

    def count(x_TD: torch.Tensor, packed: Pack) -> object:
        calls.append(len(packed.B_NO))
        return counted(x_TD, packed)

    def called(way: str) -> list[int]:
        inner.way = way
        calls.clear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "packed_additions", count)
            model(x.clone(), past_key_values=caches[-1])
        return list(calls)

    assert called("alike") == [1, 1, 1]  # who reads together is seen here
    assert called("alike") == [3]
    assert called("not called") == [3]
    assert called("not called") == [2]  # v did not come, and is not computed again
    assert called("alike") == [2, 1]
    assert called("alike") == [3]
    caches.append(Cache())  # another generation
    assert called("alike") == [1, 1, 1]
    assert called("alike") == [3]
    with torch.inference_mode():  # tensors without a version: a change between two would be unseen
        model(x.clone(), past_key_values=caches[-1])
        model(x.clone(), past_key_values=caches[-1])
    followers = group_of(model, layers["q"], caches[-1]).followers
    assert followers == [layers["k"], layers["v"]]
    caches.clear()
    with torch.no_grad():
        model(x.clone())  # no generation
    gc.collect()
    assert not next(m for m in model.modules() if isinstance(m, RotMoleLayer)).rotmole_stack.packs


@pytest.mark.parametrize("which", ["before", "after", "of all modules"])
def test_who_hooks_experts_sees_each_call_of_a_decoding_step(which: str) -> None:
    model, layers = attention("alike")
    seen: list[torch.nn.Module] = []

    def see(module: torch.nn.Module, *_: object) -> None:
        seen.append(module)

    handles = {
        "before": lambda: [one.register_forward_pre_hook(see) for one in layers.values()],
        "after": lambda: [one.register_forward_hook(see) for one in layers.values()],
        "of all modules": lambda: [torch.nn.modules.module.register_module_forward_hook(see)],
    }[which]()
    cache, x = Cache(), torch.randn(3, 1, 6).double()
    try:
        with torch.no_grad():
            for _ in range(3):
                seen.clear()
                model(x.clone(), past_key_values=cache)
                assert [one for one in seen if one in layers.values()] == list(layers.values())
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("change", ["in place", "another tensor", "dropout", "training"])
def test_a_change_of_one_reader_is_seen_by_all(name: str, change: str) -> None:
    model, layers = attention("alike", lora_dropout=0.5)
    x = torch.randn(3, 1, 6).double()
    layer = layers[name]
    with torch.no_grad():
        if change == "another tensor":  # as young as the one that comes
            first = layer.expert_A = torch.nn.Parameter(layer.expert_A.clone())
        cache = Cache()
        model(x, cache), model(x, cache)
        before = model(x, cache)
        if change == "in place":
            layer.expert_B.mul_(2)
        elif change == "another tensor":
            layer.expert_A = torch.nn.Parameter(2 * layer.expert_A)
            assert layer.expert_A._version == first._version
        elif change == "dropout":
            getattr(model.base_model.model, name).rotmole_dropout["default"].train()
        else:
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
            layer.train()
            with torch.enable_grad():
                getattr(model.base_model.model, name)(x).sum().backward()
            optimizer.step()  # changes weights without a new version
            layer.eval()
            cache = Cache()  # a generation that began before does not go on after
        after = model(x, cache)
    part = {"q": slice(0, 6), "k": slice(6, 9), "v": slice(9, 11)}[name]
    assert not torch.allclose(after[..., part], before[..., part])
    if change != "dropout":
        torch.testing.assert_close(after, model(x).detach(), rtol=0, atol=1e-12)  # with gradients


def test_weights_that_come_for_their_own_call_alone_are_not_read_before() -> None:
    """accelerate's offloading keeps them on the meta device until then."""
    model, layers = attention("alike")
    x = torch.randn(3, 1, 6).double()
    with torch.no_grad():
        cache = Cache()
        expected = [model(x * token, cache) for token in (1, 2, 3)]
        group = group_of(model, layers["q"], cache)
        assert group.followers == [layers["k"], layers["v"]]
        assert group_of(model, layers["k"], cache).packed is None  # q's holds its weights
        cpu_offload(model, execution_device="cpu")
        assert layers["k"].expert_A.is_meta
        for token, wanted in zip((1, 2, 3), expected, strict=True):
            assert torch.allclose(model(x * token, cache), wanted, rtol=0, atol=1e-12)
    assert len(group.followers) == 2


def test_layers_whose_gates_differ_do_not_share() -> None:
    """Two adapters that act together, alike but for their gates' shapes."""
    model, _ = attention("alike", rotation="givens", rotation_planes=1)
    model.add_adapter("b", RotMoleConfig(
        r=4, target_modules=["q", "k", "v"], init_weights=False, rotation="givens",
        rotation_planes=2,
    ))  # fmt: skip
    model.base_model.set_adapter(["default", "b"])
    model.double().eval()
    x = torch.randn(3, 1, 6).double()
    wanted = model(x).detach()
    model.eval()  # after a pass with gradients
    with torch.no_grad():
        cache = Cache()
        for _ in range(3):
            assert torch.allclose(model(x.clone(), cache), wanted, rtol=0, atol=1e-12)


def test_packs_end_with_their_generation() -> None:
    model, ids = adapted().eval(), tiny.tokens(2, 5)
    decoded(model, ids)
    gc.collect()
    stacks = {m.rotmole_stack for m in model.modules() if isinstance(m, RotMoleLayer)}
    assert not any(stack.packs for stack in stacks)


def test_data_parallel_is_refused() -> None:
    """Its replicas would share masks and packs."""
    layer = next(m for m in adapted().modules() if isinstance(m, RotMoleLayer))
    with pytest.raises(ModelError, match="DistributedDataParallel"):
        layer._replicate_for_data_parallel()


def test_copies_and_pickles_decode_alike() -> None:
    model, ids = adapted().eval(), tiny.tokens(2, 5)
    expected = decoded(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(decoded(twin, ids), expected)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(decoded(again, ids), expected)


# each setting, two of its values, and the others that let it act: the layer's answer must change
SETTINGS: list[tuple[str, object, object, dict[str, object]]] = [
    ("radar_normalize", True, False, {"rotation": "radar"}),
    ("rotation_input", "x", "z", {"rotation": "bias"}),
    ("rotation_input", "z", "router", {"rotation": "plane"}),
    ("rotation_dim", 2, 3, {"rotation": "tangent"}),
    ("router_dim", 2, 3, {}),
    ("rotation_metric", "rank", "output", {"rotation": "plane"}),
    ("router_temperature", 1.0, 0.2, {}),
    ("router_seed", 0, 1, {"router": "hash"}),
    ("norm_topk_prob", True, False, {}),
    ("scoring", "softmax", "sigmoid", {}),
    ("top_p", 0.3, 0.9, {"selection": "top_p"}),
    ("top_k", 2, 3, {}),
    ("selection", "top_k", "dense", {}),
    ("lora_alpha", 16, 8, {}),
    ("use_rslora", False, True, {}),
    ("goat_eta", None, 1.0, {}),
    ("router_jitter", 0.0, 0.5, {}),
    ("lora_dropout", 0.0, 0.5, {}),
]


@pytest.mark.parametrize(("setting", "one", "other", "rest"), SETTINGS, ids=lambda v: str(v)[:20])
def test_a_setting_reaches_the_layer(
    setting: str, one: object, other: object, rest: dict[str, object]
) -> None:
    ids, answers = tiny.tokens(2, 5), []
    for value in (one, one, other):
        fields = {"num_experts": 6, "rotation": "none"} | rest | {setting: value}
        model = adapted(**fields).train()  # two of them act in training alone
        torch.manual_seed(1)
        answers.append(whole(model, ids))
    assert torch.equal(answers[0], answers[1])
    assert (answers[2] - answers[0]).abs().max() > 1e-4
