"""The parity vectors in docs/vectors are what their script writes, and what an adapter computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

import rotmole
from docs_scripts import script

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "vectors").glob("*.safetensors"))
COMPUTED = ("x", "base_weight", "logits", "weight", "added", "output")


def read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, "pt") as vectors:
        return {key: vectors.get_tensor(key) for key in vectors.keys()}, vectors.metadata()  # noqa: SIM118 - no mapping


def test_there_is_a_file_for_each_case() -> None:
    assert [file.stem for file in FILES] == sorted(script("vectors").CASES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_adapted_layer_computes_the_vectors(file: Path) -> None:
    tensors, metadata = read(file)
    base = nn.Sequential(nn.Linear(16, 12, bias=False)).double()
    config = rotmole.RotMoleConfig(target_modules=["0"], **json.loads(metadata["config"]))
    model = get_peft_model(base, config).double().eval()
    layer = model.base_model.model[0]
    experts = layer.experts("default")
    assert set(dict(experts.named_parameters())) == tensors.keys() - set(COMPUTED)
    with torch.no_grad():
        layer.base_layer.weight.copy_(tensors["base_weight"])
        for name, parameter in experts.named_parameters():
            parameter.copy_(tensors[name])
        torch.testing.assert_close(model(tensors["x"]), tensors["output"])
    assert experts.spec.scale == float(metadata["scale"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_script_writes_the_vectors(file: Path) -> None:
    tensors, metadata = read(file)
    again, words = script("vectors").vectors(file.stem)
    assert metadata == words
    torch.testing.assert_close(tensors, again)
