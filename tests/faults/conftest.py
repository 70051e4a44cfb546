"""A tiny model on disk, a run file that is right, and the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rotmole
import tiny
from rotmole_cli.run import run


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    error: str


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny base model with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {"</s>": 0} | {
        letter: number + 1
        for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    tiny.llama(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict:
    """Return a run file that is right, as a dictionary to break."""
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "adapter": {"r": 4, "target_modules": ["q_proj"]},
        "data": {
            "root": str(tmp_path),
            "tasks": {"sums": {"source": "jsonl", "files": {"train": "rows.jsonl"}}},
        },
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64},
    }


@pytest.fixture
def command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Return a function that runs `rotmole VERB ...` and checks the form of its complaint."""

    def call(verb: str, settings: dict | None, *words: object) -> Said:
        given = [verb]
        if settings is not None:
            file = tmp_path / "run.yaml"
            file.write_text(yaml.safe_dump(settings), encoding="utf-8")
            given.append(str(file))
        code = run([*given, *map(str, words)])
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Said(code, said.err)

    return call


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return the folder of an adapter that is right."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = rotmole.RotMoleConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
