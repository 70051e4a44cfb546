"""Free memory, and what fits into it."""

from __future__ import annotations

import torch

import tiny
from rotmole.models import room


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    for name, text in (("memory.max", "3000\n"), ("memory.current", "1000\n")):
        (tmp_path / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert room.free_memory(torch.device("cpu")) == 2000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert room.free_memory(torch.device("cpu")) > 1e8


def test_what_a_token_needs():
    model = tiny.llama()
    assert room.token_bytes(model) == 2 * 2 * 2 * 8 * 4
    layers = 4 * (4 * 48 + 10 * 32)
    assert room.pass_bytes(model, logits=False) == layers
    assert room.pass_bytes(model, logits=True) == layers + tiny.VOCABULARY * 12
    assert room.tokens_that_fit(model, 1 << 62) == 1
    assert room.tokens_that_fit(model, 1) > 1e7
