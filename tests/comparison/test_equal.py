"""Equal parameters: the solved size is the nearest there is, and the real model has it."""

from __future__ import annotations

import itertools

import pytest

from rotmole.comparison.equal import (
    FIELDS,
    TOLERANCE,
    Counter,
    active_rank,
    equal_parameters,
    equal_rank,
    plain_size,
    with_size,
)
from rotmole.comparison.study import load_study
from rotmole.config.peft_types import peft_types
from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError
from tiny_folders import write_model

TARGETS = {"target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def counter(tmp_path_factory) -> Counter:
    return Counter(ModelSection(name=str(write_model(tmp_path_factory.mktemp("model")))))


@pytest.mark.parametrize("target", [2000, 5000, 12345])
@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA"},
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "HRA"},
        {"peft_type": "LILY"},
        {"peft_type": "GRALORA"},
        {"peft_type": "FOURIERFT"},
        {"preset": "moe_lora"},
        {"preset": "rotmole"},
        {"preset": "hydralora"},
    ],
    ids=str,
)
def test_no_other_value_is_nearer(counter, adapter, target):
    adapter = adapter | TARGETS
    sized = equal_parameters(adapter, counter, 2.0, target)
    assert sized.parameters == counter.count(sized.adapter)[0]
    assert sized.equal == (abs(sized.parameters / target - 1) <= TOLERANCE)
    field = FIELDS[adapter.get("peft_type", "ROTMOLE")]
    distance = abs(sized.parameters - target)
    for value in range(max(sized.value - 2, 1), sized.value + 4):
        try:
            count = counter.count(with_size(adapter, field, value, 2.0))[0]
        except ConfigError:
            continue
        assert abs(count - target) >= distance or sized.equal, value
    below, above = sized.rounded[0], sized.rounded[-1]
    assert min(below[1], above[1]) <= target <= max(below[1], above[1]) or len(sized.rounded) == 1


def test_the_scale_stays(counter):
    for adapter in ({"peft_type": "LORA"}, {"preset": "rotmole"}):
        sized = equal_parameters(adapter | TARGETS, counter, 3.0, 9000)
        assert sized.scale == 3.0
        assert sized.adapter["lora_alpha"] == 3 * sized.adapter["r"]
        for key, rank in sized.adapter.get("rank_pattern", {}).items():
            assert sized.adapter["alpha_pattern"][key] == 3 * rank
    own = equal_parameters(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 20} | TARGETS, counter, 3.0, 9000
    )
    assert own.scale == 5.0
    assert own.adapter["lora_alpha"] == 5 * own.adapter["r"]


def test_some_layers_get_one_more_where_a_rank_is_too_coarse(counter):
    """8 experts: a rank is worth a quarter of the target; layers of the model are raised by one."""
    adapter = {"num_experts": 8, "top_k": 2, "rotation": "none"} | TARGETS
    low, high = (counter.count(with_size(adapter, FIELDS["ROTMOLE"], r, 2.0))[0] for r in (2, 3))
    target = (low + high) // 2
    sized = equal_parameters(adapter, counter, 2.0, target)
    assert sized.raised == 1  # of two layers
    assert sized.equal
    assert abs(sized.parameters - target) < min(target - low, high - target)
    assert sorted(set(sized.adapter["rank_pattern"].values())) == [3]
    model, _ = counter.shape(sized.adapter)
    ranks = {
        name.split(".")[2]: module.experts("default").expert_A.shape[1]
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "rotmole_experts")
    }
    assert sorted(ranks.values()) == [2, 3]


def test_block_sizes_are_divisors(counter):
    for kind in ("OFT", "BOFT", "C3A"):
        sized = equal_parameters({"peft_type": kind} | TARGETS, counter, None, 1500)
        assert 32 % sized.value == 0
        assert sized.parameters == counter.count(sized.adapter)[0]


@pytest.mark.parametrize("kind", ["IA3", "LN_TUNING", "BEFT"])
def test_methods_without_such_a_setting_are_refused_by_name(counter, kind):
    with pytest.raises(ConfigError, match=f"{kind} has no setting that equal: parameters"):
        equal_parameters({"peft_type": kind} | TARGETS, counter, None, 1500)


def test_a_preset_that_fixes_its_rank_is_refused(counter):
    with pytest.raises(ConfigError, match="preset flylora fixes r: 1"):
        equal_parameters({"preset": "flylora"} | TARGETS, counter, None, 1500)


def test_the_settings_exist():
    from rotmole.config.adapter import adapter_hints

    assert set(FIELDS) <= set(peft_types())
    for kind, field in FIELDS.items():
        names = {field.name, *(name for name, _ in field.others), *filter(None, [field.alpha])}
        assert names <= adapter_hints(kind).keys(), kind


def test_active_rank(counter):
    cases = {
        (("peft_type", "LORA"), ("r", 12)): 12,
        (("num_experts", 4), ("top_k", 2), ("r", 3)): 6,
        (("num_experts", 4), ("selection", "dense"), ("r", 3)): 12,
        (("num_experts", 4), ("top_k", 2), ("r", 3), ("shared_expert_r", 5)): 11,
    }
    for settings, rank in cases.items():
        assert active_rank(counter.shape(dict(settings) | TARGETS)[1]) == rank


def test_equal_active_rank(counter):
    mixture = {"num_experts": 4, "top_k": 2} | TARGETS
    even = equal_rank(mixture, counter, 2.0, 8, active=True)
    assert (even.value, even.equal, even.scale) == (4, True, 2.0)
    odd = equal_rank(mixture, counter, 2.0, 9, active=True)
    assert odd.value in (4, 5)
    assert not odd.equal
    assert [value for value, _ in odd.rounded] == [4, 5]
    shared = equal_rank(mixture | {"shared_expert_r": 4}, counter, 2.0, 8, active=True)
    assert (shared.value, shared.equal) == (2, True)
    assert equal_rank(mixture, counter, 2.0, 8, active=False).value == 8
    with pytest.raises(ConfigError, match="OFT has no rank"):
        equal_rank({"peft_type": "OFT"} | TARGETS, counter, None, 8, active=False)


def test_gates_are_counted_apart(counter):
    plain = plain_size({"preset": "rotmole", "r": 4} | TARGETS, counter, 2.0)
    without = plain_size({"preset": "moe_lora", "r": 4} | TARGETS, counter, 2.0)
    assert 0 < without.gates < plain.gates < plain.parameters
    assert plain.parameters - plain.gates == without.parameters - without.gates


@pytest.mark.parametrize("equal", ["parameters", "rank", "active_rank", "none"])
def test_the_real_model_has_the_parameters_that_were_counted(study_yaml, equal, tmp_path):
    from rotmole.models.load import load_model
    from rotmole.training.build import add_adapter

    study = load_study(study_yaml, [f"equal={equal}", "methods.hra={adapter: {peft_type: HRA}}"])
    for method, sized in study.sized.items():
        run = study.run_of(method)
        model = add_adapter(run, load_model(run.model).model)
        assert model.get_nb_trainable_parameters()[0] == sized.parameters
    pairs = itertools.combinations(study.sized.values(), 2)
    if equal == "rank":
        assert all(a.adapter["r"] == b.adapter["r"] for a, b in pairs)


def test_a_target_replaces_the_baselines_own_size(study_yaml):
    study = load_study(study_yaml, ["parameters=5000"])
    assert all(abs(sized.parameters / 5000 - 1) < 0.1 for sized in study.sized.values())
    assert study.sized["lora"].value is not None
    assert load_study(study_yaml).sized["lora"].value is None
