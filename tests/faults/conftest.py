"""A tiny model on disk, a run file that is right, and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rotmole
import tiny
from tiny_folders import ADAPTER


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    error: str
    output: str = ""


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


def check_one_sentence(said: Said) -> None:
    """A failure ends in one line, the last; several problems at once are listed below it."""
    lines = said.error.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("rotmole: ")]
    if said.code in (1, 2, 3, 4):
        assert len(errors) == 1, said.error
        assert all(line.startswith("  - ") for line in lines[errors[0] + 1 :]), said.error
    else:
        assert not errors, said.error


class Warm:
    """The process of parent.py, and how to ask it."""

    def __init__(self, preload: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("parent.py")],
            env=os.environ | {"LD_PRELOAD": str(preload)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the warm parent has ended"
        return json.loads(line)

    def ask(self, **request: object) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.answer()["code"])


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Return a process that has everything imported and forks a child for each command.

    A child can die at a chosen write, fsync or rename: kill_at.cpp is loaded into it.
    """
    source = Path(__file__).with_name("kill_at.cpp")
    library = tmp_path_factory.mktemp("preload") / "kill_at.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    parent = Warm(library)
    yield parent
    assert parent.process.stdin is not None
    assert parent.process.stdout is not None
    parent.process.stdin.close()
    parent.process.kill()  # its own way out takes seconds
    parent.process.wait()
    parent.process.stdout.close()


@pytest.fixture
def rotmole_command(warm: Warm, tmp_path: Path) -> Callable[..., Said]:
    """Return a function that runs `rotmole WORDS...` in a process of its own.

    With cold=True that process starts from nothing; `before` is code that it runs first. Whatever
    it says may hold no traceback, and a refusal is one line, or one and a list of problems.
    """

    def call(
        *words: object,
        cold: bool = False,
        before: str = "",
        folder: Path = tmp_path,
        traceback: bool = False,
        **env: str,
    ) -> Said:
        given = [str(word) for word in words]
        if cold:
            start = f"{before}\nimport sys\nfrom rotmole_cli import main\nsys.exit(main())"
            done = subprocess.run(
                [sys.executable, "-c", start, *given], cwd=folder, env=os.environ | env,
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            said = Said(done.returncode, done.stderr, done.stdout)
        else:
            out, err = tmp_path / ".out", tmp_path / ".err"
            code = warm.ask(
                words=given, folder=str(folder), out=str(out), err=str(err), env=env, before=before
            )
            said = Said(code, err.read_text(errors="replace"), out.read_text(errors="replace"))
        if not traceback:
            assert "Traceback" not in said.error, said.error
            assert "rotmole: unexpected" not in said.error, said.error
            if words[0] != "doctor":  # whose report says what is wrong
                check_one_sentence(said)
        return said

    return call


@pytest.fixture
def command(rotmole_command: Callable[..., Said], tmp_path: Path) -> Callable[..., Said]:
    """Return a function that runs `rotmole VERB RUN.yaml ...` with these settings."""

    def call(verb: str, settings: dict | None, *words: object, **options: Any) -> Said:
        given = [verb]
        if settings is not None:
            file = tmp_path / "run.yaml"
            file.write_text(yaml.safe_dump(settings), encoding="utf-8")
            given.append(str(file))
        return rotmole_command(*given, *words, **options)

    return call


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return the folder of an adapter that is right; no tensor has the value of a new one."""
    torch.manual_seed(1)
    config = rotmole.RotMoleConfig(**ADAPTER, init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_weights": True}))
    return tmp_path / "adapter"
