"""Settings: a plain dataclass whose fields carry their ranges, shared by config and layers."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest

import tiny
from rotmole import ConfigError, RotMoleConfig
from rotmole.tuner.settings.by_module import module_settings
from rotmole.tuner.settings.settings import Settings, range_problems

WRONG = [-1, 0.5, "no such word", None, True, float("nan"), [], {"q_proj": -1}, object()]
"""Values of every kind; no setting allows all of them."""


def test_defaults_have_no_problem() -> None:
    assert range_problems(Settings()) == {}


@pytest.mark.parametrize(
    "name", [entry.name for entry in fields(Settings) if entry.metadata["range"] is not None]
)
def test_every_range_refuses_something_by_name_and_value(name: str) -> None:
    refused = [value for value in WRONG if range_problems(replace(Settings(), **{name: value}))]
    assert refused
    for value in refused:
        (sentence,) = range_problems(replace(Settings(), **{name: value}))[name]
        assert sentence.startswith(name)
        assert "; it must be " in sentence


def test_an_entry_of_a_pattern_is_named_by_its_key() -> None:
    problems = range_problems(
        replace(Settings(), num_experts_pattern=[2, 0], rank_pattern={"q": 0})
    )
    assert problems["num_experts_pattern"][0].startswith("num_experts_pattern[1] is 0")
    assert problems["rank_pattern"][0].startswith("rank_pattern['q'] is 0")


def test_the_settings_of_a_configuration_are_plain() -> None:
    plain = RotMoleConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").plain()
    assert type(plain) is Settings
    assert (plain.r, plain.top_k, plain.target_modules) == (4, 2, {"q_proj"})
    assert plain.is_routed
    assert not replace(plain, num_experts=1).is_routed
    assert replace(plain, num_experts=1, num_experts_pattern=[1, 2]).is_routed


def test_the_settings_of_a_module_follow_the_patterns_and_make_no_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RotMoleConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, num_experts_pattern=[1, 6],
        top_k_pattern={"v_proj": 5},
    )  # fmt: skip
    monkeypatch.setattr(RotMoleConfig, "__post_init__", lambda config: pytest.fail("made again"))
    model = tiny.llama()
    q, v = (
        f"model.layers.{layer}.self_attn.{name}" for layer, name in ((0, "q_proj"), (1, "v_proj"))
    )
    settings = module_settings(config, model, q)
    assert type(settings) is Settings
    assert (settings.r, settings.lora_alpha, settings.num_experts, settings.top_k) == (2, 3, 1, 1)
    settings = module_settings(config.plain(), model, v)
    assert (settings.r, settings.lora_alpha, settings.num_experts, settings.top_k) == (4, 16, 6, 5)
    with pytest.raises(ConfigError, match=r"has 6 experts by num_experts_pattern.*use 7"):
        module_settings(replace(config.plain(), top_k_pattern={"v_proj": 7}), model, v)


def test_settings_do_not_import_peft_torch_or_the_configuration() -> None:
    tree = ast.parse(Path(inspect.getfile(Settings)).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    ]
    assert not [m for m in modules if m and m.startswith(("peft", "torch", "rotmole.tuner.config"))]
