"""Every code block of README and docs runs as it stands, on a tiny model in place of the real one.

The name of the hub model resolves to a local folder, and the cache of the built-in model holds a
tiny one, so no text is changed and nothing is fetched.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from rotmole.config.load import load_run
from rotmole.models.builtin import SMOLLM2, built_in_folder
from rotmole_cli.run import run

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


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document; one without a language is an error."""
    found = []
    lines = document.read_text(encoding="utf-8").split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{document.name}: an open fence"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        text = "\n".join(lines[start + 1 : end]) + "\n"
        found.append(Block(document, start + 1, lines[start].strip().strip("`"), text))
    return found


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


def run_python(block: Block) -> None:
    code = compile("\n" * block.line + block.text, str(block.document), "exec")
    exec(code, {"__name__": "__main__"})


def run_yaml(block: Block, folder: Path) -> None:
    (folder / "block.yaml").write_text(block.text, encoding="utf-8")
    load_run(folder / "block.yaml")


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


@pytest.mark.filterwarnings("default")  # a reader sees warnings; they do not stop the example
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.document.name}:{b.line}")
def test_block_runs(block: Block, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROTMOLE_CACHE", str(workplace / "cache"))
    monkeypatch.chdir(workplace)
    if block.language == "python":
        run_python(block)
    elif block.language == "yaml":
        run_yaml(block, workplace)
    elif block.language == "sh":
        run_shell(block)
    else:
        raise AssertionError(f"a block of language {block.language!r}: use python, yaml or sh")
    ran.add(block)


def test_every_block_found_was_run(request: pytest.FixtureRequest) -> None:
    """Counts only in a run of this whole file; -k or a second worker sees a part of it."""
    selected = [item for item in request.session.items if item.fspath == request.node.fspath]
    asked = [item for item in selected if "test_block_runs" in item.name]
    assert len(BLOCKS) >= 6
    assert len(asked) == len(BLOCKS)


def test_the_readme_lists_every_source_file_by_its_first_line() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    source = ROOT / "src"
    rows = []
    for path in sorted(source.rglob("*.py")):
        if path.name != "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            line = docstring.split("\n")[0].replace("``", "`")
            rows.append(f"| `{path.relative_to(source)}` | {line} |")
    missing = [row for row in rows if row not in text]
    assert not missing, "\n".join(missing)
    listed = [line for line in text.split("\n") if line.startswith("| `rotmole")]
    assert sorted(listed) == sorted(rows)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.name
)
def test_the_run_files_of_experiments_are_right(file: Path) -> None:
    run = load_run(file, ["data.root=somewhere"])
    assert run.data.root == "somewhere"
