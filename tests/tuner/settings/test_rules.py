"""Rules of the scaling gate: contradictions are named, and settings without effect warn."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from rotmole import AdapterError, ConfigError, RotMoleConfig
from rotmole.ops import ROUTERS, SELECTIONS
from rotmole.ops.routing.selection import SCORINGS

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"router": "cosin"}, "did you mean 'cosine'"),
    ({"selection": "topp"}, "did you mean 'top_p'"),
    ({"scoring": "relu"}, "scoring is 'relu'; it must be one of softmax, sigmoid"),
    ({"router": "mlp", "router_dim": 0}, "router_dim is 0"),
    ({"router": "mlp", "router_dim": 2.5}, "router_dim is 2.5"),
    ({"router": "hash", "router_seed": -1}, "router_seed is -1"),
    ({"router_temperature": 0}, "router_temperature is 0"),
    ({"router_jitter": 1}, "router_jitter is 1"),
    ({"router_jitter": float("nan")}, "router_jitter is nan"),
    ({"selection": "top_p", "top_p": 0}, "top_p is 0"),
    ({"selection": "top_p", "top_p": 1.1}, "top_p is 1.1"),
    ({"router_bias_rate": -0.1}, "router_bias_rate is -0.1"),
    ({"router_bias_rate": "0.1"}, "router_bias_rate is '0.1'"),
    ({"selection": "top_p", "scoring": "sigmoid"}, "probabilities that sum to one"),
    ({"selection": "threshold", "scoring": "sigmoid"}, "selection is 'threshold'"),
    ({"selection": "dense", "router": "hash"}, "router is 'hash' but selection is 'dense'"),
    ({"selection": "top_p", "router": "magnitude"}, "router is 'magnitude' but selection"),
    ({"router": "hash", "router_bias_rate": 0.1}, "fixed by its id"),
    ({"selection": "dense", "router_bias_rate": 0.1}, "router_bias_rate is 0.1 but selection"),
    ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; it must be a number above 0"),
    ({"shared_expert_r": -1}, "shared_expert_r is -1"),
    ({"shared_expert_r": 4, "shared_expert_alpha": 0}, "shared_expert_alpha is 0"),
    ({"shared_expert_r": 4, "shared_expert_rotation": "tangents"}, "did you mean 'tangent'"),
    ({"shared_expert_r": 1, "shared_expert_rotation": "tangent"}, "shared_expert_r is 1"),
    ({"shared_expert_r": 3, "shared_expert_rotation": "givens"}, "shared_expert_r=3"),
    (
        {"shared_expert_r": 4, "shared_expert_rotation": "givens", "rotation_input": "router"},
        "the shared expert has no router",
    ),
    (
        {"shared_expert_r": 4, "shared_expert_rotation": "cayley", "rotation_input": "z"},
        "rotation_input is 'z' but shared_expert_rotation is 'cayley'",
    ),
    (
        {"shared_expert_r": 4, "router_scope": "block"},
        "shared_expert_r is 4 but router_scope is 'block'",
    ),
    ({"selection": "expert_choice", "task_type": "CAUSAL_LM"}, "not written yet"),
    ({"expert_names": ["a", "b"]}, "expert_names has 2 names but num_experts is 4"),
    ({"num_experts": 2, "expert_names": ["a", "a"]}, "a list of different names"),
    ({"num_experts": 2, "expert_names": ["a", "b c"]}, "of letters, digits and - _ . +"),
    (
        {"num_experts_pattern": [1, 4], "expert_names": list("abcd")},
        "expert_names is set but num_experts_pattern too",
    ),
]
IDLE: list[tuple[dict[str, Any], str]] = [
    ({"router": "hash", "router_dim": 8}, "router_dim=8 has no effect"),
    ({"rotation": "none", "rotation_dim": 8}, "rotation_dim=8 has no effect"),
    ({"router": "hash", "router_temperature": 0.5}, "router_temperature=0.5 has no effect"),
    ({"router": "hash", "router_jitter": 0.5}, "router_jitter=0.5 has no effect"),
    ({"routed_scaling_factor": 2, "num_experts": 1, "rotation": "none"}, "_factor=2 has no effect"),
    ({"shared_expert_alpha": 8}, "shared_expert_alpha=8 has no effect"),
    ({"shared_expert_rotation": "plane"}, "shared_expert_rotation='plane' has no effect"),
    ({"shared_expert_gate": True}, "shared_expert_gate=True has no effect"),
    (
        {"shared_expert_r": 4, "shared_expert_rotation": "radar_pairs"},
        "shared_expert_rotation='radar_pairs' has no effect",
    ),
    ({"router_seed": 3}, "router_seed=3 has no effect"),
    ({"top_p": 0.7}, "top_p=0.7 has no effect"),
    ({"router": "magnitude", "scoring": "sigmoid"}, "scoring='sigmoid' has no effect"),
    ({"router": "magnitude", "norm_topk_prob": False}, "norm_topk_prob=False has no effect"),
    ({"selection": "threshold", "norm_topk_prob": False}, "norm_topk_prob=False has no effect"),
    ({"selection": "dense", "norm_topk_prob": False}, "norm_topk_prob=False has no effect"),
    ({"router": "hash", "router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 has no effect"),
    ({"router": "hash", "router_z_loss_coef": 0.1}, "router_z_loss_coef=0.1 has no effect"),
    ({"num_experts": 1, "router": "mlp"}, "router='mlp' has no effect"),
    ({"num_experts": 1, "router_bias_rate": 0.1}, "router_bias_rate=0.1 has no effect"),
]


def _ids(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("settings", "sentence"), BROKEN, ids=_ids)
def test_a_broken_rule_is_named_with_its_value(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RotMoleConfig(**settings)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_of_them_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RotMoleConfig(router_dim=0, router_jitter=2, selection="top_p", scoring="sigmoid", top_p=7)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(("settings", "sentence"), IDLE, ids=_ids)
def test_a_setting_without_effect_warns_once_by_name(
    settings: dict[str, Any], sentence: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RotMoleConfig(**settings)
    assert [str(w.message) for w in caught if sentence in str(w.message)]
    assert len(caught) == 1


def test_whatever_is_allowed_is_silent_and_survives_saving(tmp_path: object) -> None:
    allowed = 0
    for router in ROUTERS:
        for selection in SELECTIONS:
            for scoring in SCORINGS:
                settings = {"router": router, "selection": selection, "scoring": scoring}
                learned = ROUTERS[router].weight == "learned"
                if not learned and (selection != "top_k" or scoring != "softmax"):
                    continue
                if scoring not in SELECTIONS[selection].scorings:
                    continue
                config = RotMoleConfig(**settings)
                config.save_pretrained(str(tmp_path))
                assert RotMoleConfig.from_pretrained(str(tmp_path)) == config
                allowed += 1
    assert allowed == 6 * 7 + 2


def test_an_unknown_key_about_scoring_is_refused(tmp_path: object) -> None:
    RotMoleConfig().save_pretrained(str(tmp_path))
    file = f"{tmp_path}/adapter_config.json"
    with open(file, encoding="utf-8") as opened:
        saved = json.load(opened) | {"scoring_power": 2}
    with open(file, "w", encoding="utf-8") as opened:
        json.dump(saved, opened)
    with pytest.raises(AdapterError, match="scoring_power"):
        RotMoleConfig.from_pretrained(str(tmp_path))
