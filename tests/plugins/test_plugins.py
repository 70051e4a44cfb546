"""What both plug-ins share; `make plugins` tests each in the program it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotmole import ConfigError, RotMoleConfig
from rotmole.plugins import adapter_config, foreign, read_settings


def test_the_settings_are_those_of_a_run_file() -> None:
    config = adapter_config(
        {"preset": "hydralora", "r": 4, "target_modules": ["q_proj"]}, "rotmole"
    )
    preset = RotMoleConfig.preset(
        "hydralora", task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]
    )
    assert config == preset
    assert config.task_type == "CAUSAL_LM"


def test_a_wrong_setting_is_named_as_it_was_written() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_config({"num_expert": 4, "top_k": 0, "task_type": "SEQ_CLS"}, "rotmole")
    text = str(caught.value)
    assert "rotmole.num_expert" in text
    assert "num_experts" in text
    assert "rotmole.top_k" in text
    assert "rotmole.task_type" in text


def test_another_method_of_peft_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rotmole\.peft_type is LORA"):
        adapter_config({"peft_type": "LORA"}, "rotmole")


def test_what_would_not_be_followed_is_named() -> None:
    error = foreign({"lora_r": 8}, "axolotl", "the section rotmole:")
    assert "lora_r is 8, a setting of axolotl's own adapters" in str(error)
    assert "the section rotmole:" in str(error)


def test_settings_are_read_between_braces_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "adapter.yaml"
    assert read_settings("", "HERE") == {}
    assert read_settings(" {r: 4, rotation: plane}", "HERE") == {"r": 4, "rotation": "plane"}
    file.write_text("r: 2\n", encoding="utf-8")
    assert read_settings(str(file), "HERE") == {"r": 2}
    file.write_text("- r\n", encoding="utf-8")
    for given, said in ((str(file), "holds no settings"), ("none.yaml", "cannot be read")):
        with pytest.raises(ConfigError, match=f"HERE is .*{said}"):
            read_settings(given, "HERE")
    with pytest.raises(ConfigError, match="HERE: not valid YAML"):
        read_settings("{r: 4", "HERE")
