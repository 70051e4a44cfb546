"""Bad input through the real command line: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Command = Callable[..., Any]

NO_MODEL = """
import transformers
def loads(*args, **kwargs):
    raise AssertionError("a model was loaded")
transformers.AutoModelForCausalLM.from_pretrained = loads
"""


# ---- rows 4 and 5: an adapter's configuration


def _change(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved.update(changes)
    file.write_text(json.dumps({key: value for key, value in saved.items() if value != "DROP"}))


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"r": -4}, ["r is -4; it must be a whole number of at least 1"]),
        ({"r": "four", "top_k": 9}, ["r: 'four' is not a whole number", "top_k is 9"]),
        ({"r": "DROP"}, ["r is missing"]),
        (
            {"num_experts": "DROP", "rotation": "DROP"},
            ["num_experts is missing", "rotation is missing"],
        ),
        ({"rotation_speed": 3}, ["unknown key 'rotation_speed' = 3"]),
    ],
)
def test_every_bad_field_of_an_adapter_is_named(
    command: Command, settings: dict, adapter: Path, changes: dict, sentences: list[str]
) -> None:
    _change(adapter, **changes)
    said = command("generate", None, adapter, "1 plus 1 is", before=NO_MODEL)
    assert said.code == 2
    assert all(sentence in said.error for sentence in sentences), said.error


def test_an_adapter_configuration_that_is_no_json(command: Command, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{r: 4")
    said = command("generate", None, adapter, "1 plus 1 is")
    assert said.code == 2
    assert "adapter_config.json" in said.error
    assert "JSON" in said.error


def test_an_unknown_key_that_changes_nothing_is_a_warning(command: Command, adapter: Path) -> None:
    _change(adapter, spam=3)
    said = command("generate", None, adapter, "1 plus 1 is", "--max-new-tokens", 2)
    assert said.code == 0
    assert "the unknown key 'spam' is ignored" in said.error


# ---- row 14: the method is not imported


def test_doctor_explains_what_a_process_without_the_import_lacks(
    adapter: Path, command: Command
) -> None:
    """That such a process fails is in tests/tuner/storage/test_storage.py."""
    said = command("doctor", None, adapter)
    assert said.code == 0
    assert "load it after `import rotmole`" in said.output
    readme = Path(__file__).parents[2] / "README.md"
    blocks = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    assert blocks
    assert all(block.startswith("import rotmole") for block in blocks)


# ---- rows 15 and 16: the run file


def test_all_mistakes_of_a_run_file_at_once_before_the_model_loads(
    command: Command, settings: dict
) -> None:
    settings["modle"] = {}
    settings["adapter"]["num_expert"] = 3
    settings["training"]["learning_rat"] = 1e-3
    settings["data"]["tasks"]["sums"]["format"] = "txt"
    for verb in ("check", "train"):
        said = command(verb, settings, before=NO_MODEL)
        assert said.code == 2
        for word in ("modle", "num_expert", "learning_rat", "'txt'", "did you mean"):
            assert word in said.error, word
        for right in ("model", "num_experts", "learning_rate"):
            assert f"'{right}'" in said.error or f"{right}?" in said.error, right
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    ("adapter_settings", "words"),
    [
        ({"num_experts": 2, "top_k": 3}, ["top_k is 3 but num_experts is 2"]),
        ({"rotation": "givens", "r": 5}, ["givens", "even", "5"]),
        ({"num_experts": 0}, ["num_experts is 0; it must be a whole number of at least 1"]),
        ({"lora_dropout": 1.5}, ["lora_dropout", "1.5"]),
        ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef", "-0.1"]),
    ],
)
def test_rules_between_settings_show_both_values(
    command: Command, settings: dict, adapter_settings: dict, words: list[str]
) -> None:
    settings["adapter"].update(adapter_settings)
    said = command("check", settings)
    assert said.code == 2
    assert all(word in said.error for word in words), said.error


def test_a_right_run_file_passes(command: Command, settings: dict) -> None:
    assert command("check", settings).code == 0


# ---- row 17: target modules


def test_targets_that_match_nothing_name_the_nearest(command: Command, settings: dict) -> None:
    settings["adapter"]["target_modules"] = ["q_prj"]
    for verb in ("check", "train"):
        said = command(verb, settings)
        assert said.code == 2
        assert "'q_prj' matches no module of this model; did you mean 'q_proj'?" in said.error


def test_a_target_of_an_unsupported_type_is_named_with_its_path(
    command: Command, settings: dict
) -> None:
    settings["adapter"]["target_modules"] = ["embed_tokens"]
    said = command("train", settings)
    assert said.code == 2
    assert "model.embed_tokens" in said.error
    assert "Embedding" in said.error


# ---- row 23: data

ROW = '{"prompt": "1 plus 1 is", "completion": " 2"}\n'


MIXED = ["rows.jsonl", "row 2", "mixes types", "row 1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["rows.jsonl", "empty"]),
        ((ROW + '{"prompt": "x"}\n').encode(), ["rows.jsonl", "row 2", "completion"]),
        ((ROW + '{"prompt": {"a": 1}, "completion": 3.5}\n').encode(), MIXED),
        ((ROW + "{nonsense\n").encode(), ["rows.jsonl", "row 2", "nonsense"]),
        ((ROW + '{"prompt": ' + "9" * 5000 + "}\n").encode(), ["rows.jsonl", "row 2", "999"]),
        ((ROW + "[" * 100_000 + "\n").encode(), ["rows.jsonl", "row 2", "[[["]),
        (ROW.encode() + b'{"prompt": "\xff\xfe", "completion": " 2"}\n', ["rows.jsonl", "row 2"]),
        ((ROW + '{"prompt": "x", "completion": ""}\n').encode(), ["rows.jsonl", "row 2"]),
        (
            (ROW + json.dumps({"prompt": "x " * 200, "completion": " 2"}) + "\n").encode(),
            ["rows.jsonl", "row 2", "64"],
        ),
    ],
    ids=[
        "empty",
        "missing column",
        "mixed types",
        "no JSON",
        "huge number",
        "deep nest",
        "broken UTF-8",
        "no answer",
        "long",
    ],
)
def test_bad_data_names_file_and_row(
    command: Command, settings: dict, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    said = command("train", settings)
    assert said.code == 2, said.error
    assert all(word in said.error for word in words), said.error
    assert not list(Path(settings["output_dir"]).glob("adapter*"))


def test_the_faults_of_all_data_files_at_once(
    command: Command, settings: dict, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW + "{nonsense\n" + '{"prompt": "x"}\n')
    (tmp_path / "more.csv").write_text("prompt;completion\na\n")
    (tmp_path / "test.json").write_text(ROW + '{"prompt": "x", "completion": NaN}\n')
    settings["data"]["tasks"]["sums"]["files"]["test"] = "test.json"
    settings["data"]["tasks"]["more"] = {"files": "more.csv"}
    for verb in ("check", "train"):
        said = command(verb, settings, before=NO_MODEL if verb == "check" else "")
        assert said.code == 2
        assert "4 problems in the data" in said.error
        for words in (
            "rows.jsonl: row 2 is not JSON",
            "rows.jsonl: row 3: no column 'completion'",
            "more.csv: row 1 (line 2) has 1 values",
            "test.json: row 2: column 'completion' is NaN",
        ):
            assert words in said.error, said.error
    assert not Path(settings["output_dir"], "adapter").exists()


def test_a_fully_masked_batch_gives_zero_and_not_nan(base: Path, settings: dict) -> None:
    import yaml

    from rotmole.config.load import load_run
    from rotmole.training.build import build

    trainer = build(load_run(None, text=yaml.safe_dump(settings))).trainer
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.full_like(ids, -100),
    }
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
