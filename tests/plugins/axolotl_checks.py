"""The plug-in in axolotl itself, on a tiny model; run by tests/plugins/lane.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import PeftModel

import tiny_folders
from rotmole import ConfigError

SECTION = {
    "r": 4, "num_experts": 3, "top_k": 2, "rotation": "plane",
    "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("axolotl")
    tiny_folders.write_model(folder / "model")
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    rows = "".join(json.dumps({"messages": turns}) + "\n" for _ in range(8))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    return folder


def config(place: Path, output: str, **more: Any) -> Any:
    """Write axolotl's file and read it as its command does."""
    from axolotl.cli.config import load_cfg

    values = {
        "base_model": str(place / "model"),
        "plugins": ["rotmole.plugins.axolotl.RotMolePlugin"],
        "adapter": "rotmole",
        "rotmole": SECTION,
        "datasets": [
            {"path": str(place / "rows.jsonl"), "ds_type": "json", "type": "chat_template"}
        ],
        "special_tokens": {"pad_token": tiny_folders.END},
        "dataset_prepared_path": str(place / "prepared"),
        "output_dir": str(place / output),
        "sequence_len": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 3, "learning_rate": 0.01, "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "val_set_size": 0, "save_safetensors": True, "attn_implementation": "sdpa",
        "num_epochs": 1, "bf16": False, "fp16": False, "tf32": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    file = place / f"{output}.yaml"
    file.write_text(yaml.safe_dump(values | more), encoding="utf-8")
    return load_cfg(str(file))


def train(cfg: Any) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.train import do_train

    do_train(cfg, TrainerCliArgs())


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The adapter that `axolotl train` writes."""
    train(config(place, "out"))
    return place / "out"


def test_the_output_is_an_adapter_with_these_settings(place: Path, trained: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, trained)
    saved = model.peft_config["default"]
    assert (saved.peft_type.value, saved.r, saved.num_experts) == ("ROTMOLE", 4, 3)
    assert saved.rotation == "plane"
    ids = torch.arange(9)[None]
    with model.disable_adapter():
        before = model(ids).logits
    assert (model(ids).logits - before).abs().max() > 1e-4  # trained: B is no longer zero


def loaded(cfg: Any, inference: bool = True) -> Any:
    from axolotl.cli.utils import load_model_and_tokenizer

    return load_model_and_tokenizer(cfg=cfg, inference=inference)[0]


def test_it_loads_the_adapter_again(place: Path, trained: Path) -> None:
    model = loaded(config(place, "again", lora_model_dir=str(trained)))
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    ours = PeftModel.from_pretrained(base, trained)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model.eval()(ids).logits.float(), ours.eval()(ids).logits)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_r": 8}, "lora_r is 8, a setting of axolotl's own adapters"),
        ({"load_in_8bit": True}, "axolotl quantises only for its own adapters"),
        ({"rotmole": {"num_expert": 3}}, r"rotmole\.num_expert"),
    ],
)
def test_what_would_not_be_followed_is_refused(
    place: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(config(place, "none", **more), inference=False)


def test_a_section_that_contradicts_the_loaded_adapter_is_refused(
    place: Path, trained: Path
) -> None:
    section = SECTION | {"r": 8}
    with pytest.raises(ConfigError, match=r"rotmole\.r is 8, and the adapter in .* 4"):
        loaded(config(place, "other", lora_model_dir=str(trained), rotmole=section))


def test_merging_is_refused(place: Path, trained: Path) -> None:
    from axolotl.cli.merge_lora import do_cli

    with pytest.raises(ConfigError, match="a mixture cannot be merged into its base"):
        do_cli(str(place / "out.yaml"))
    assert not (trained / "merged").exists()
