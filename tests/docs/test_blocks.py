"""Every code block of README and docs runs as it stands, on a tiny model in place of the real one.

The name of the hub model resolves to a local folder, and the cache of the built-in model holds a
tiny one, so no text is changed and nothing is fetched. A `text` block behind a Python block is what
that block prints; it runs on a model of the real sizes with random weights.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny
from fake_hub import fake_hub
from rotmole.comparison.study import is_study, load_study
from rotmole.config.load import load_run
from rotmole.models.builtin import SMOLLM2, built_in_folder
from rotmole_cli.run import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    text: str
    output: str | None = None  # what a Python block prints, if the document says so


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document; one without a language is an error."""
    result: list[Block] = []
    lines = document.read_text(encoding="utf-8").split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{document.name}: an open fence"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        text = "\n".join(lines[start + 1 : end]) + "\n"
        block = Block(document, start + 1, lines[start].strip().strip("`"), text)
        if block.language == "text":
            assert result, f"{document.name}: output without a block that prints it"
            result[-1] = replace(result[-1], output=text)
        else:
            result.append(block)
    return result


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
ran: set[Block] = set()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the documents' names of models mean tiny models."""
    root = tmp_path_factory.mktemp("docs")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    model = tiny.llama(vocab_size=len(fast), max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROTMOLE_CACHE", str(root / "cache"))
        folders = [root / HUB_NAME, built_in_folder(SMOLLM2)]
    for folder in folders:
        model.save_pretrained(folder)
        fast.save_pretrained(folder)
    (folders[1] / "source.json").write_text('{"sizes": {}}', encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def real_sizes(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the hub's name means a model of the real sizes."""
    folder = tmp_path_factory.mktemp("sizes") / HUB_NAME
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2.architecture)).to(torch.bfloat16)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(workplace / HUB_NAME).save_pretrained(folder)
    return folder.parents[1]


def run_python(block: Block) -> None:
    code = compile("\n" * block.line + block.text, str(block.document), "exec")
    exec(code, {"__name__": "__main__"})


def run_yaml(block: Block, folder: Path) -> None:
    (folder / "block.yaml").write_text(block.text, encoding="utf-8")
    read = load_study if is_study(folder / "block.yaml") else load_run
    read(folder / "block.yaml")


def needs_shell(block: Block) -> bool:
    """Tell whether a block has pipes, commands in the background or text for a file."""
    return bool(re.search(r" \| |&$|<<|>", block.text, re.MULTILINE))


def run_in_shell(block: Block, folder: Path) -> None:
    """Run a block by bash as it stands; `rotmole` is the command of this Python."""
    command = folder / "bin" / "rotmole"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rotmole_cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-m", "-o", "pipefail", "-c", block.text + "wait\n"],
        cwd=folder, env=os.environ | {"PATH": path}, timeout=300, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def run_shell(block: Block) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.text.strip().split("\n"):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "rotmole":
            assert run(words[1:]) == 0, line
        elif words[0] == "make":
            subprocess.run(["make", "-n", "-C", ROOT, *words[1:]], check=True, capture_output=True)
        elif words[0] in {"python3", ".venv/bin/python"}:  # set-up: what make itself does
            done = re.sub(r"\$\(PYTHON\)", "python3", makefile.replace("$(BIN)", ".venv/bin"))
            assert line in done, f"{line!r} is not what make does"
        else:
            raise AssertionError(f"do not know how to run {line!r}")


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on loopback for the blocks that upload something."""
    block = request.node.callspec.params["block"]
    if not any("--push" in each.text for each in (*missing(block), block)):
        yield
        return
    with fake_hub(monkeypatch) as there:
        yield
    assert there.files


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("default")  # a reader sees warnings; they do not stop the example
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.document.name}:{b.line}")
def test_block_runs(
    block: Block,
    workplace: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ROTMOLE_CACHE", str(workplace / "cache"))
    monkeypatch.chdir(workplace)
    if block.output is not None:
        assert block.language == "python"
        monkeypatch.chdir(request.getfixturevalue("real_sizes"))
        capsys.readouterr()
        run_python(block)
        assert capsys.readouterr().out == block.output
        return
    for each in (*missing(block), block):
        execute(each, workplace)
        ran.add(each)


def missing(block: Block) -> list[Block]:
    """Return what a reader has done before a block, and this process has not.

    That is what README.md and the block's own document show before it: another process may have
    run it, in a folder of its own.
    """
    before = BLOCKS[: BLOCKS.index(block)]
    read = [b for b in before if b.document in (DOCUMENTS[0], block.document)]
    return [b for b in read if b not in ran and b.output is None]


def execute(block: Block, workplace: Path) -> None:
    """Run a block that does not say what it prints."""
    if block.language == "python":
        run_python(block)
    elif block.language == "yaml":
        run_yaml(block, workplace)
    elif block.language == "sh" and needs_shell(block):
        run_in_shell(block, workplace)
    elif block.language == "sh":
        run_shell(block)
    else:
        raise AssertionError(f"a block of language {block.language!r}: use python, yaml or sh")


def test_every_block_found_was_run(request: pytest.FixtureRequest) -> None:
    """Counts only in a run of this whole file; -k or a second worker sees a part of it."""
    selected = [item for item in request.session.items if item.fspath == request.node.fspath]
    asked = [item for item in selected if "test_block_runs" in item.name]
    assert len(BLOCKS) >= 6
    assert len(asked) == len(BLOCKS)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.name
)
def test_the_run_files_of_experiments_are_right(file: Path) -> None:
    run = load_run(file, ["data.root=somewhere"])
    assert run.data.root == "somewhere"
