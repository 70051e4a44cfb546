"""adapter.peft_type: any method of PEFT with its own settings, checked as rotmole's are."""

from __future__ import annotations

import pytest
from peft import HRAConfig, LoraConfig, OFTConfig

import rotmole
from rotmole.config.adapter import check_adapter
from rotmole.config.load import load_run, resolved_yaml
from rotmole.config.names import did_you_mean_place
from rotmole.config.peft_types import UNFIT, field_hints, peft_types
from rotmole.errors import ConfigError

FILE = """
output_dir: runs/1
adapter: {peft_type: LORA, r: 6, lora_alpha: 12, use_dora: true, target_modules: [q_proj]}
data: {tasks: {a: {source: locale, kind: dates, languages: [de]}}}
"""


def problems(**adapter: object) -> list[str]:
    return check_adapter(adapter, did_you_mean_place)[2]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LoraConfig, {"peft_type": "LORA", "r": 6, "use_dora": True}),
        (OFTConfig, {"peft_type": "OFT", "oft_block_size": 8, "r": 0}),
        (HRAConfig, {"peft_type": "HRA", "r": 4}),
        (rotmole.RotMoleConfig, {"peft_type": "ROTMOLE", "r": 4}),
    ],
)
def test_it_makes_the_methods_own_configuration(kind, settings):
    _, config, found = check_adapter(settings | {"target_modules": ["q_proj"]})
    assert found == []
    assert type(config) is kind
    assert config.r == settings["r"]
    assert config.task_type == "CAUSAL_LM"


def test_all_mistakes_of_a_method_of_peft_at_once():
    found = problems(peft_type="LORA", rr=3, r="many", num_experts=4, usedora=True, revision="x")
    text = "\n".join(found)
    assert "adapter.usedora: there is no such setting; did you mean 'use_dora'?" in text
    assert "adapter.r: 'many' is not a whole number" in text
    assert "adapter.num_experts: there is no such setting" in text
    assert "adapter.revision cannot be set here: write model.revision" in text
    assert "adapter.rr: there is no such setting" in text
    assert "LoraConfig" in "\n".join(problems(peft_type="LORA", zzzzzz=1))
    assert len(found) == 5


def test_the_methods_own_rules_are_said():
    (found,) = problems(peft_type="OFT", r=8, oft_block_size=8)
    assert found.startswith("adapter: ")
    assert "oft_block_size" in found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LORRA", ["adapter.peft_type is 'LORRA'", "did you mean 'LORA'?"]),
        (["LORA"], ["adapter.peft_type is ['LORA']"]),
        ("PREFIX_TUNING", ["cannot be trained here", "virtual tokens"]),
        *((name, ["cannot be trained here", reason]) for name, reason in UNFIT.items()),
    ],
)
def test_methods_that_cannot_be_trained_are_refused_by_name(name, words):
    (found,) = problems(peft_type=name)
    assert all(word in found for word in words), found


def test_a_preset_is_rotmoles_alone():
    (found,) = problems(peft_type="LORA", preset="moe_lora")
    assert found.startswith("adapter.preset: there is no such setting")


def test_the_types_of_all_methods_are_known():
    from rotmole.config.peft_types import config_class

    assert {"LORA", "OFT", "HRA", "LILY", "ROTMOLE"} <= set(peft_types())
    for name in peft_types():
        hints = field_hints(config_class(name))
        assert "peft_type" in hints
        assert len({str(hint) for hint in hints.values()}) > 1, name  # not all Any


def test_the_run_file_is_written_and_read_again():
    run = load_run(None, text=FILE)
    again = load_run(None, text=resolved_yaml(run))
    assert again.adapter == run.adapter
    assert again.adapter["peft_type"] == "LORA"
    assert again.adapter_config.to_dict() == run.adapter_config.to_dict()


def test_another_method_on_the_command_line_replaces_the_files():
    with pytest.warns(UserWarning, match="adapter.peft_type on the command line replaces use_dora"):
        run = load_run(None, ["adapter.peft_type=HRA"], text=FILE.replace("lora_alpha: 12, ", ""))
    assert run.adapter.pop("target_modules")
    assert run.adapter == {"peft_type": "HRA", "r": 6}


def test_settings_of_gates_have_no_effect_and_say_so():
    with pytest.warns(UserWarning, match="rotation_gate_lr has no effect, because adapter.peft_ty"):
        load_run(None, ["optimizer.rotation_gate_lr=1e-3"], text=FILE)


def test_our_optimizers_are_for_our_experts():
    with pytest.raises(ConfigError, match=r"optimizer.name: muon works on the experts of ROTMOLE"):
        load_run(None, ["optimizer.name=muon"], text=FILE)
