"""Adapters written by every release still load, and compute what they computed then."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ADAPTERS = sorted(folder.parent for folder in HERE.glob("*/*/adapter_config.json"))


def test_every_release_left_an_adapter_of_every_mode() -> None:
    assert len(ADAPTERS) >= 13
    changes = (HERE.parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changes, re.MULTILINE)
    assert released
    assert {folder.parent.name for folder in ADAPTERS} == set(released)


@pytest.mark.parametrize(
    "folder", ADAPTERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_logits_are_what_they_were(folder: Path) -> None:
    expected = load_file(folder.parent / "logits.safetensors")[folder.name]
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12).reshape(2, 6)).logits
        with model.disable_adapter():
            plain = model(input_ids=torch.arange(12).reshape(2, 6)).logits
    # processors differ in the last bits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert (logits - plain).abs().max() > 1e-4
