"""Settings: every broken rule is named at once; defaults are the documented ones."""

from __future__ import annotations

import pytest

from rotmole import ConfigError, RotMoleConfig

BROKEN: list[tuple[dict[str, object], str]] = [
    ({"r": 0}, "r is 0"),
    ({"r": -4}, "r is -4"),
    ({"r": 2.5}, "r is 2.5"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
    ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"num_experts": 2, "top_k": 3}, "top_k is 3 but num_experts is 2"),
    ({"top_k": 0}, "top_k is 0"),
    ({"rotation": "tangnt"}, "did you mean 'tangent'"),
    ({"router": "conv"}, "router is 'conv'"),
    ({"selection": "topk"}, "did you mean 'top_k'"),
    ({"rotation": "givens", "r": 5}, "even rank: r=5"),
    ({"rotation": "givens", "rank_pattern": {"q_proj": 3}}, "rank_pattern['q_proj']=3"),
    ({"rotation": "plane", "r": 2}, "at least 3; r is 2"),
    ({"rotation": "cayley", "r": 17}, "at most 16; r is 17"),
    ({"rotation": "givens", "r": 4, "rotation_planes": 3}, "rotation_planes is 3; r=4 has 2"),
    (
        {"rotation_input": "z", "rotation": "cayley"},
        "rotation_input is 'z' but rotation is 'cayley'; only tangent, bivector, plane, givens, "
        "bias can",
    ),
    ({"rotation_input": "z", "rotation_dim": 4}, "rotation_dim is 4 but rotation_input is 'z'"),
    ({"rotation_input": "router", "rotation": "radar"}, "rotation_input is 'router' but rotation"),
    ({"rotation_input": "router", "router": "hash"}, "needs a learned router in every layer"),
    ({"rotation_input": "router", "num_experts": 1}, "needs a learned router in every layer"),
    ({"rotation_input": "router", "router_scope": "block"}, "needs a learned router in every"),
    ({"rotation": "givens", "rotation_metric": "output"}, "rotation_metric is 'output'"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
    ({"router_aux_loss_scope": "batch"}, "router_aux_loss_scope is 'batch'"),
    ({"router_z_loss_coef": float("inf")}, "router_z_loss_coef is inf"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"target_modules": 3}, "target_modules is 3"),
    ({"target_modules": ["q_proj", 3]}, "must be a list of module names"),
    ({"target_modules": "q.*", "layers_to_transform": [0]}, "regular expression"),
    ({"layers_pattern": "layers"}, "layers_to_transform must be set"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0"),
    ({"rank_pattern": 4}, "rank_pattern is 4"),
    ({"alpha_pattern": {"q": -1}}, "alpha_pattern['q'] is -1"),
    ({"format_version": 2}, "a newer rotmole is needed"),
    ({"router_task_loss_coef": -1}, "router_task_loss_coef is -1"),
    ({"router_task_offset": 1}, "router_task_offset is 1"),
    ({"router_task_loss_coef": 0.1, "router_task_groups": "two"}, "router_task_groups is 'two'"),
    ({"router_task_loss_coef": 0.1, "router_task_groups": 5}, "each group needs an expert"),
    ({"router_sqrt_gate": "yes"}, "router_sqrt_gate is 'yes'"),
    ({"router_sqrt_gate": True, "rotation": "radar"}, "router_sqrt_gate is True but rotation"),
    ({"router_scope": "model"}, "router_scope is 'model'"),
    ({"kernels": "triton"}, "kernels is 'triton'"),
    ({"kernels": "compiled", "rotation": "cayley"}, "kernels is 'compiled', which needs"),
    (
        {"router_scope": "block", "rotation": "none", "kernels": "compiled"},
        "kernels is 'compiled', which needs",
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), BROKEN, ids=[s for _, s in BROKEN])
def test_a_broken_rule_is_named_with_its_value(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RotMoleConfig(**settings)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RotMoleConfig(r=-1, lora_dropout=1.5, rotation="spin", router_aux_loss_coef=-1, top_k=0)
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigError) as caught:
        RotMoleConfig(num_experts=2, top_k=3, rotation="givens", r=3, rotation_metric="output")
    assert len(caught.value.problems) == 3
    with pytest.raises(
        ConfigError
    ) as caught:  # rules between settings that are right by themselves
        RotMoleConfig(r="four", num_experts=2, top_k=3, rotation_input="z", rotation="cayley")
    assert len(caught.value.problems) == 3


BLOCK: dict[str, object] = {"router_scope": "block", "rotation": "none"}


def test_defaults() -> None:
    config = RotMoleConfig()
    assert (config.rotation, config.rotation_input, config.num_experts) == ("tangent", "x", 4)
    assert (config.top_k, config.r, config.lora_alpha) == (2, 8, 16)
    assert RotMoleConfig(num_experts=1, rotation="none").top_k == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top_k": 1}, "the scaling gate cannot learn"),
        ({"rotation": "radar_pairs", "top_k": 1, "norm_topk_prob": False}, "there are no pairs"),
        ({"rotation_planes": 2}, "rotation_planes=2 has no effect"),
        ({"radar_rank": 2}, "radar_rank=2 has no effect"),
        ({"num_experts": 1, "router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 has no effect"),
        ({"router_task_groups": 3}, "router_task_groups=3 has no effect"),
        ({"router_task_offset": 0.3}, "router_task_offset=0.3 has no effect"),
        ({"num_experts": 1, "router_sqrt_gate": True}, "router_sqrt_gate=True has no effect"),
        (BLOCK | {"dispatch": "grouped"}, "dispatch='grouped' has no effect"),
        (BLOCK | {"compute_dtype": "input"}, "only on modules outside of feed-forward blocks"),
    ],
)
def test_a_setting_without_effect_warns_by_name(settings: dict[str, object], sentence: str) -> None:
    with pytest.warns(UserWarning, match=sentence):
        RotMoleConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "notice"),
    [
        ({"rotation": "none", "rotation_planes": 2}, "rotation_planes"),
        ({"auto_mapping": {"parent_library": "elsewhere"}}, "auto_mapping"),
    ],
    ids=str,
)
def test_a_notice_points_at_the_line_that_makes_the_configuration(
    settings: dict[str, object], notice: str
) -> None:
    with pytest.warns(UserWarning, match=notice) as record:
        RotMoleConfig(**settings)
    assert {warning.filename for warning in record} == {__file__}
