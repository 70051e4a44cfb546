"""Random bytes for everything that strangers write: files, settings and names.

Each target puts them where rotmole reads them, runs the command line, and demands: exit code 0 or
2, one sentence, no traceback, nothing written outside the target's folder. tests/faults runs some
tens of examples of each, `make fuzz` (tests/fuzz.py) a minute of each.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import string
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import strategies as st
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rotmole
import tiny
from rotmole_cli import main

# ---- what is written, by this process's own Python code


@dataclass
class Writes:
    """Paths that were written while `watching`."""

    watching: bool = False
    paths: list[str] = field(default_factory=list)


WRITES = Writes()
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not WRITES.watching or (event != "open" and event not in _CHANGES):
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        WRITES.paths.append(os.fsdecode(path))
    else:
        WRITES.paths += [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, Path))]


def watch_writes() -> None:
    """Begin to see writes; an audit hook cannot be taken away again, only switched."""
    sys.addaudithook(_audit)


@contextmanager
def nothing_written_but(folder: Path) -> Iterator[None]:
    """Demand that the block writes below the folder only, in or out of Python."""
    outside = folder.parent / "sentinel"
    outside.mkdir(exist_ok=True)
    before = tree(folder.parent, folder)
    WRITES.paths, WRITES.watching = [], True
    try:
        yield
    finally:
        WRITES.watching = False
    harmless = ("/dev/", "/proc/")
    strays = [
        path
        for path in WRITES.paths
        if not Path(path).resolve().is_relative_to(folder.resolve())
        and "__pycache__" not in path
        and not path.startswith(harmless)
    ]
    assert not strays, strays
    assert tree(folder.parent, folder) == before


def tree(root: Path, but: Path) -> set[str]:
    """Name everything below a folder, except below another."""
    return {str(path) for path in root.rglob("*") if not path.is_relative_to(but)}


def run_command(*words: object) -> None:
    """Run rotmole and check the form of its end."""
    out, err = io.StringIO(), io.StringIO()
    given = [str(word) for word in words]
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        code = main(given)
    said = err.getvalue()
    assert code in (0, 2), (code, said)
    assert "Traceback" not in said, said
    assert "rotmole: unexpected" not in said, said
    assert code == 0 or said.strip(), "a refusal without a word"


# ---- one place with everything that is right


def write_base(folder: Path) -> Path:
    """Write a tiny model with a byte tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"</s>": 0} | {c: i + 1 for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = tiny.llama(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None, **sizes)
    model.save_pretrained(folder)
    return folder


class Place:
    """A folder with a base model, an adapter, a run file and its rows, all of them right."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "place"
        self.folder.mkdir(parents=True)
        base = write_base(self.folder / "base")
        self.adapter = self.folder / "adapter"
        config = rotmole.RotMoleConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
            self.adapter
        )
        rows = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"} for i in range(3)]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (self.folder / "rows.csv").write_text(
            "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
        )
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), self.folder / "rows.parquet", compression="none"
        )
        self.run = self.folder / "run.yaml"
        self.settings = {
            "output_dir": str(self.folder / "out"),
            "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
            "adapter": {"r": 2, "target_modules": ["q_proj"]},
            "data": {
                "root": str(self.folder),
                "tasks": {"sums": {"source": "jsonl", "files": {"train": "rows.jsonl"}}},
            },
            "training": {"max_steps": 1, "max_length": 64},
        }
        self.run.write_text(yaml.safe_dump(self.settings))
        self.right = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        run_command("generate", self.adapter, "1 plus", "--max-new-tokens", 1)  # imports everything
        run_command("check", self.run)

    @contextmanager
    def with_file(self, file: Path, content: bytes) -> Iterator[None]:
        """Replace a file's content for the block."""
        file.write_bytes(content)
        try:
            with nothing_written_but(self.folder):
                yield
        finally:
            file.write_bytes(self.right[file])


# ---- what may be in them


def mutations(right: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are right but for a few places."""
    edit = st.tuples(
        st.integers(0, len(right)), st.integers(0, 12), st.binary(max_size=12)
    )  # where, how much goes, what comes

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = right
        for start, gone, new in edits:
            content = content[:start] + new + content[start + gone :]
        return content

    return st.lists(edit, min_size=1, max_size=4).map(apply)


def any_bytes(right: bytes) -> st.SearchStrategy[bytes]:
    """Pure noise, a cut, or a few wrong places."""
    cuts = st.integers(0, len(right)).map(lambda end: right[:end])
    return st.one_of(mutations(right), cuts, st.binary(max_size=300))


WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "none", "true", "1e-4", "../x", "/abs", "nan", "{x}"])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


def changed(right: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of which up to three have any value, or which have an unknown key."""
    keys = st.one_of(st.sampled_from(sorted(right)), st.text(string.ascii_lowercase + "_"))
    return st.dictionaries(keys, JSON, min_size=1, max_size=3).map(lambda new: right | new)


def settings_paths(right: dict[str, Any]) -> list[str]:
    """Dotted names of all settings of a run file."""
    found = []
    for key, value in right.items():
        found.append(key)
        if isinstance(value, dict):
            found += [f"{key}.{name}" for name in settings_paths(value)]
    return found


# ---- the targets


def fuzz_adapter_config(place: Place) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """adapter_config.json."""
    file = place.adapter / "adapter_config.json"
    right = place.right[file]
    settings = changed(json.loads(right)).map(lambda saved: json.dumps(saved).encode())

    def check(content: bytes) -> None:
        with place.with_file(file, content):
            run_command("generate", place.adapter, "1 plus", "--max-new-tokens", 1)

    return st.one_of(settings, settings, any_bytes(right)), check


def fuzz_weights(place: Place) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """The header and the rest of adapter_model.safetensors."""
    file = place.adapter / "adapter_model.safetensors"
    right = place.right[file]
    length = 8 + int.from_bytes(right[:8], "little")
    header = mutations(right[:length]).map(lambda head: head + right[length:])
    entries = json.loads(right[8:length])

    def packed(wrong: dict[str, Any]) -> bytes:
        text = json.dumps(wrong).encode()
        return len(text).to_bytes(8, "little") + text + right[length:]

    def check(content: bytes) -> None:
        with place.with_file(file, content):
            run_command("generate", place.adapter, "1 plus", "--max-new-tokens", 1)

    return st.one_of(header, changed(entries).map(packed), any_bytes(right)), check


def fuzz_run_file(place: Place) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """run.yaml, and key=value over it."""
    right = place.right[place.run]
    settings = changed(place.settings).map(lambda run: (yaml.safe_dump(run).encode(), []))
    for name in ("model", "adapter", "training", "data"):
        section = changed(place.settings[name])
        settings |= section.map(
            lambda new, name=name: (yaml.safe_dump(place.settings | {name: new}).encode(), [])
        )
    names = st.one_of(st.sampled_from(settings_paths(place.settings)), st.text(max_size=12))
    words = st.tuples(names, st.one_of(WORDS, JSON.map(json.dumps))).map("=".join)
    words = words.filter(lambda word: not word.startswith("-") and "\0" not in word)
    overrides = st.lists(words, min_size=1, max_size=2).map(lambda given: (right, given))

    def check(case: tuple[bytes, list[str]]) -> None:
        content, words = case
        with place.with_file(place.run, content):
            run_command("check", place.run, *words)

    return st.one_of(settings, overrides, any_bytes(right).map(lambda raw: (raw, []))), check


def fuzz_data(place: Place) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """Files of rows: JSON lines, CSV, Parquet."""
    files = {kind: place.folder / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet")}
    rows = st.lists(JSON, max_size=4).map(lambda r: "".join(json.dumps(x) + "\n" for x in r))
    row = st.dictionaries(st.sampled_from(["prompt", "completion", "x"]), JSON, max_size=3)
    rows |= st.lists(row, max_size=3).map(lambda r: "".join(json.dumps(x) + "\n" for x in r))
    cases = rows.map(lambda text: ("jsonl", text.encode()))
    for kind, file in files.items():
        cases |= any_bytes(place.right[file]).map(lambda raw, kind=kind: (kind, raw))

    def check(case: tuple[str, bytes]) -> None:
        kind, content = case
        words = [
            f"data.tasks.sums.source={kind}",
            f"data.tasks.sums.files.train=rows.{kind}",
        ]
        with place.with_file(files[kind], content):
            run_command("check", place.run, *words)

    return cases, check


def fuzz_names(place: Place) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """Names of adapters, tasks, models and run folders."""
    parts = ["/", "..", "\\", "a", ".", " ", "\0", "é", "C:", "~", "$HOME", "\n", "\u202e", "%2f"]
    names = st.one_of(
        st.lists(st.sampled_from(parts), max_size=6).map("".join),
        st.text(max_size=20),
        st.sampled_from(["/abs", "../x", "a/b", "", "a" * 300, "rotmole_", "default", "con"]),
    )
    kinds = st.sampled_from(["adapter", "task", "model", "output"])

    def check(case: tuple[str, str]) -> None:
        kind, name = case
        if kind == "adapter":
            check_adapter_is_saved_inside(place, name)
            return
        run = json.loads(json.dumps(place.settings))
        if kind == "task":
            run["data"]["tasks"] = {name: run["data"]["tasks"]["sums"]}
        elif kind == "model":
            run["model"]["name"] = name
        else:
            run["output_dir"] = name
        with place.with_file(place.run, yaml.safe_dump(run).encode()):
            run_command("check", place.run)

    return st.tuples(kinds, names), check


def check_adapter_is_saved_inside(place: Place, name: str) -> None:
    """An adapter of that name is refused, or saved below the folder that was named."""
    target = place.folder / "saved"
    config = rotmole.RotMoleConfig(r=2, target_modules=["q_proj"])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with nothing_written_but(target), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(tiny.llama(num_hidden_layers=1, **sizes), config, name)
        except rotmole.AdapterError:
            return
        finally:
            shutil.rmtree(target, ignore_errors=True)
        model.save_pretrained(target)
        assert list(target.rglob("adapter_model.safetensors"))
    shutil.rmtree(target)


TARGETS = {
    "adapter_config": fuzz_adapter_config,
    "weights": fuzz_weights,
    "run_file": fuzz_run_file,
    "data": fuzz_data,
    "names": fuzz_names,
}


@contextmanager
def new_place() -> Iterator[Place]:
    """Make a place in a folder of its own, away from everything."""
    watch_writes()
    with tempfile.TemporaryDirectory() as root:
        yield Place(Path(root).resolve())
