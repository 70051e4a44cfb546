"""A new adapter takes the old one's place whole, or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from rotmole import RotMoleConfig
from rotmole.errors import StorageError
from rotmole.training.folder.layout import save_adapter


def _model(seed: int) -> PeftModel:
    base = tiny.llama()
    torch.manual_seed(seed)
    config = RotMoleConfig(r=2, target_modules=["q_proj"], init_weights=False)
    return get_peft_model(base, config)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_newer_adapter_takes_the_place(tmp_path: Path) -> None:
    before = _contents(save_adapter(_model(0), tmp_path))
    assert _contents(save_adapter(_model(1), tmp_path)) != before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("step", ["old steps aside", "new steps in"])
def test_a_failed_swap_leaves_the_older_adapter(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save_adapter(_model(0), tmp_path)
    before = _contents(target)
    rename = Path.rename

    def full(path: Path, to: Path) -> Path:
        here = "old steps aside" if path == target else "new steps in"
        if here == step and "-old-" not in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save_adapter(_model(1), tmp_path)
    assert _contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
