"""Methods of PEFT go the whole way: check, train, resume, eval, generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lanes import first_then_slow
from rotmole.evaluation.target import find_target, load_target
from rotmole_cli import main
from training_cases import settings, write_data, write_model

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "use_dora": True},
    "oft": {"peft_type": "OFT", "r": 0, "oft_block_size": 4},
    "hra": {"peft_type": "HRA", "r": 4},
    "lily": {"peft_type": "LILY", "r": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    (root / "data").mkdir()
    model, data = write_model(root / "model"), write_data(root / "data")
    content = settings(model, data, root / "run", max_steps=10)
    for name, adapter in METHODS.items():
        content["adapter"] = adapter | {"target_modules": ["q_proj", "v_proj"]}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", first_then_slow(METHODS))
def test_check_train_resume_eval_generate(name, root, tmp_path, capsys):
    file = str(root / f"{name}.yaml")
    assert main(["check", file]) == 0
    shown = capsys.readouterr().out
    assert "2 x q_proj [32 -> 32]" in shown
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(["train", file, f"output_dir={whole}"]) == 0
    assert "q_proj x 2, v_proj x 2" in capsys.readouterr().out
    words = ["train", file, f"output_dir={halves}"]
    assert main(words) == 0
    for later in ("adapter", "checkpoint-10"):  # as if it had died before
        shutil.rmtree(halves / later)
    (halves / ".unfinished").touch()
    assert main([*words, "--resume", "auto"]) == 0
    assert "going on from" in capsys.readouterr().err
    assert main([*words, "adapter.peft_type=ROTMOLE", "adapter.r=4", "--resume", "auto"]) == 2
    assert "adapter.peft_type is None, the checkpoint has" in capsys.readouterr().err
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"# {METHODS[name]['peft_type']} adapter for" in card
    assert "import rotmole" not in card
    first, again = weights(whole), weights(halves)
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.items())

    assert main(["eval", str(whole), "evaluation.max_new_tokens=4"]) == 0
    report = json.loads((whole / "eval.json").read_text())
    assert set(report["systems"]) == {"before", "after"}
    assert main(["generate", str(whole), "red 1 then ", "--max-new-tokens", "2"]) == 0
    model = load_target(find_target(whole)).model
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        changed = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(changed, model(input_ids=ids).logits)
