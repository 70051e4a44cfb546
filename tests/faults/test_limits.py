"""Texts that a model cannot read: one sentence and exit 2 from every command, before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

COMMANDS = ["check", "train", "eval"]


@pytest.fixture(scope="module")
def short(base, tmp_path_factory) -> Path:
    """A GPT-2 with 32 positions and the byte tokenizer of `base`."""
    folder = tmp_path_factory.mktemp("short") / "gpt2"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(base)), n_positions=32, n_embd=32, n_layer=1,
        n_head=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def with_rows(settings: dict, model: Path, prompts: list[str]) -> dict:
    rows = [{"prompt": prompt, "completion": " yes"} for prompt in prompts]
    file = Path(settings["data"]["root"], "rows.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"source": "jsonl", "files": {"train": "rows.jsonl", "validation": "rows.jsonl"}}
    settings["model"]["name"] = str(model)
    settings["adapter"]["target_modules"] = ["c_attn"] if "gpt2" in model.name else ["q_proj"]
    settings["data"]["tasks"] = {"sums": task}
    settings["training"]["max_length"] = 256
    settings["evaluation"] = {"max_new_tokens": 4}
    return settings


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_row_longer_than_the_positions(command, settings, short, verb):
    said = command(verb, with_rows(settings, short, ["a", "b" * 136]))
    assert said.code == 2
    assert "rows.jsonl: row 2: 141 tokens are more than the 32 positions of the model" in said.error
    assert "likelihoods" not in said.error
    assert "no mistakes found" not in said.output


@pytest.mark.parametrize("verb", COMMANDS)
def test_rows_that_may_be_cut(command, settings, short, verb):
    content = with_rows(settings, short, ["a", "b" * 136])
    content["data"]["tasks"]["sums"]["long_rows"] = "cut"
    content["training"]["max_length"] = 32
    said = command(verb, content)
    assert said.code == 0, said.error


@pytest.mark.parametrize("verb", COMMANDS)
def test_rotary_positions_only_warn(command, settings, base, verb):
    said = command(verb, with_rows(settings, base, ["a", "b" * 136]))
    assert said.code == 0, said.error
    assert said.error.count("141 tokens are more than the 128 positions that the model was") == 1


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_token_that_is_not_embedded(command, settings, base, tmp_path, verb):
    folder = shutil.copytree(base, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(folder)
    said = command(verb, with_rows(settings, folder, ["a", "b <|call|>"]))
    assert said.code == 2
    assert "rows.jsonl: row 2: token 257 ('<|call|>') is none of the 257 tokens" in said.error


def test_generate_past_the_positions(command, settings, short):
    content = with_rows(settings, short, ["a"])
    said = command("generate", content, "a" * 20, "--max-new-tokens", "13")
    assert said.code == 2
    numbers = "the prompt: 20 tokens and 13 new ones are more than the 32 positions of the model"
    assert numbers in said.error
    assert command("generate", content, "a" * 20, "--max-new-tokens", "12").code == 0
