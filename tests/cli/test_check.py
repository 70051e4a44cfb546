from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from rich.cells import cell_len
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import rotmole.config
import tiny_folders
from lanes import first_then_slow
from rotmole_cli import main

TEMPLATES = sorted(Path(rotmole.config.__file__).parent.glob("templates/*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and two files of rows; tests only read them."""
    folder = tmp_path_factory.mktemp("check")
    tiny_folders.write_model(folder / "model")
    for split, count in (("train", 12), ("validation", 3)):
        rows = [{"prompt": f"the film {i} is ", "completion": "good"} for i in range(count)]
        tiny_folders.write_rows(folder / f"{split}.jsonl", rows)
    return folder


def run_file(path, folder, **sections):
    settings = {
        "output_dir": str(path.parent / "run"),
        "model": {"name": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "adapter": {"r": 4, "num_experts": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "root": str(folder),
            "tasks": {
                "films": {
                    "source": "jsonl",
                    "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
                }
            },
        },
        "training": {"max_steps": 6, "per_device_train_batch_size": 4},
    }
    path.write_text(yaml.safe_dump(settings | sections))
    return str(path)


def test_what_it_shows(folder, tmp_path, capsys):
    path = run_file(tmp_path / "run.yaml", folder)
    assert main(["check", path]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"no mistakes found in {path}"
    assert all(len(line) <= 80 for line in shown[:-1] if not line.startswith("model"))
    lines = [line.split() for line in shown]
    assert ["modules", "2", "x", "q_proj", "[32", "->", "32]"] in lines
    assert "twice       films: 3 of 3 validation rows are training rows too" in shown
    assert ["modules", "2", "x", "v_proj", "[32", "->", "16]"] in lines
    experts = 2 * 2 * 4 * (32 + 32 + 32 + 16)  # layers, experts, rank, widths
    scaling, rotation = 2 * 2 * 2 * 32, 2 * 2 * 2 * 4 * 32
    trainable = f"{experts + scaling + rotation:,}"
    assert any(line[:3] == ["parameters", trainable, "trainable"] for line in lines)
    assert [f"{rotation:,}", "rotation", "gate"] in lines
    films = [line for line in lines if line[:1] == ["films"]]
    assert [line[:3] for line in films] == [["films", "train", "12"], ["films", "validation", "3"]]
    words = tiny_folders.tokenizer()
    counted = sum(len(words(f"the film {i} is good").input_ids) + 1 for i in range(12))
    assert [int(n) for n in films[0][3:6]] == [counted, 12 * 2, 12]  # answer and its end
    assert "   prompt   the film 0 is" in shown
    assert "   answer >  good<|end|>" in shown
    assert any(line.startswith("training    6 updates of 4 rows, 2 epochs") for line in shown)
    assert any(re.match(r"time        about \d+ s in one process", line) for line in shown)
    assert any(line[:2] == ["memory", "about"] for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({}, r"padding     (\d+)% of a batch"),
        ({"train_sampling_strategy": "group_by_length"}, r"padding     0% of a batch \((\d+)%"),
        ({"padding_free": True}, r"padding     0% of a batch \((\d+)% with rows as they come"),
        ({"packing": True, "max_length": 60}, r"padding     0% of a batch \((\d+)% with rows"),
    ],
)
def test_the_padding_that_is_saved(folder, tmp_path, capsys, training, told):
    rows = [4, 20] * 8  # words in a row; a batch of two is a quarter and more padding
    words = "the film is good " * 5
    lines = [{"prompt": " ".join(words.split()[: n - 1]), "completion": " good"} for n in rows]
    tiny_folders.write_rows(tmp_path / "rows.jsonl", lines)
    task = {"source": "jsonl", "files": {"train": str(tmp_path / "rows.jsonl")}}
    path = run_file(
        tmp_path / "run.yaml",
        folder,
        data={"tasks": {"films": task}},
        training={"max_steps": 6, "per_device_train_batch_size": 2, **training},
    )
    assert main(["check", path]) == 0
    shown = capsys.readouterr().out
    assert int(re.search(told, shown)[1]) > 20
    if training.get("packing"):
        assert "training    6 updates of 2 packs" in shown
        assert re.search(r"\n +16 rows in 4 packs of up to 60 tokens\n", shown)
    joined = "packing" in training or "padding_free" in training
    assert ("packing     the model keeps rows of one sequence apart" in shown) == joined


def test_a_model_that_mixes_the_rows_of_a_sequence(folder, tmp_path, capsys):
    words = AutoTokenizer.from_pretrained(folder / "model")
    sizes = dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 32)
    config = OPTConfig(
        **sizes, vocab_size=len(words), num_hidden_layers=2, num_attention_heads=4, ffn_dim=48
    )
    opt = tiny_folders.write_pair(words, OPTForCausalLM(config), tmp_path / "opt")
    path = run_file(
        tmp_path / "run.yaml", folder, model={"name": str(opt)}, training={"padding_free": True}
    )
    assert main(["check", path]) != 0
    assert "opt with attention 'sdpa' lets them see each other" in capsys.readouterr().err


def test_every_mistake_at_once_before_anything_loads(folder, tmp_path, capsys, monkeypatch):
    for name in ("load_tokenizer", "load_rows", "preview"):
        monkeypatch.setattr(f"rotmole.cli.check.{name}", None)  # calling it would fail
    path = run_file(
        tmp_path / "run.yaml",
        folder,
        adapter={"target_modules": ["q_porj", "xyz"]},
        data={
            "tasks": {
                "films": {"source": "jsonl", "files": {"train": str(folder / "trian.jsonl")}},
                "units": {"source": "locale", "kind": "unit"},
            }
        },
        training={"lerning_rate": 1},
        sed=1,
    )
    assert main(["check", path]) == 2
    shown = capsys.readouterr().err
    for words in (
        "6 problems",
        "did you mean 'q_proj'?",
        "'xyz' matches no module",
        "did you mean 'train.jsonl'?",
        "did you mean 'units'?",
        "did you mean 'learning_rate'?",
        "did you mean 'seed'?",
    ):
        assert words in shown


HUB = {  # data set, configuration -> splits, columns
    ("openai/gsm8k", "main"): (["train", "test"], ["question", "answer"]),
    ("fancyzhx/ag_news", None): (["train", "test"], ["text", "label"]),
    ("HuggingFaceTB/everyday-conversations-llama3.1-2k", None): (
        ["train_sft", "test_sft"], ["full_topic", "messages"],
    ),
}  # fmt: skip


def hub(rows):
    """A load_dataset without network: the hub's names, splits and columns, rows of our own."""

    def load_dataset(name, config=None, *, split):
        splits, columns = HUB[name, config]
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}. Should be one of {splits}.")
        table = [row | {"answer": "so it is 18\n#### 18", "full_topic": "a film"} for row in rows]
        return datasets.Dataset.from_list([{name: row[name] for name in columns} for row in table])

    return load_dataset


def tasks_of(folder, **tasks):
    """One jsonl task for each list of rows, written as its train split."""
    for name, rows in tasks.items():
        tiny_folders.write_rows(folder / f"{name}.jsonl", rows)
    return {name: {"source": "jsonl", "files": {"train": f"{name}.jsonl"}} for name in tasks}


def test_every_fault_of_every_task_and_split_at_once(folder, tmp_path, capsys):
    good, long = {"prompt": "a", "completion": "b"}, {"prompt": "red " * 60, "completion": "b"}
    tasks = tasks_of(tmp_path, fine=[good] * 3, long=[good] + [long] * 9, other=[{"prompt": "a"}])
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt":\n')
    tasks["fine"]["files"]["test"] = "broken.jsonl"
    path = run_file(
        tmp_path / "run.yaml", folder, data={"root": str(tmp_path), "tasks": tasks},
        training={"max_length": 32},
    )  # fmt: skip
    assert main(["check", path]) == 2
    shown = capsys.readouterr()
    assert "no mistakes" not in shown.out
    assert "   answer > b<|end|>" in shown.out  # what can be shown is
    for words in (
        "long.jsonl: row 2", "more than training.max_length 32", "broken.jsonl: row 2",
        "(and 8 more rows like it)",
        "other.jsonl: row 1", "completion",
    ):  # fmt: skip
        assert words in shown.err
    assert "long.jsonl: row 7" not in shown.err


def test_rows_that_are_cut_are_counted(folder, tmp_path, capsys):
    rows = [{"prompt": "red " * n, "completion": "b"} for n in (2, 60, 61)]
    tasks = tasks_of(tmp_path, a_task_with_a_name_that_is_longer_than_its_column=rows)
    for task in tasks.values():
        task["long_rows"] = "cut"
    path = run_file(
        tmp_path / "run.yaml", folder, data={"root": str(tmp_path), "tasks": tasks},
        training={"max_length": 32},
    )  # fmt: skip
    assert main(["check", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    (table,) = [line for line in lines if " train " in line]
    assert len(table) <= 80
    assert table.split()[-2:] == ["32", "2"]


@pytest.mark.parametrize(
    ("row", "task", "expected"),
    [
        ({"prompt": "a", "completion": " b"}, {"loss_on": "all"}, ["prompt > a", "answer >  b"]),
        ({"text": "a b"}, {"format": "text"}, ["answer > a b<|end|>"]),
        ({"prompt": "a\x1b[2J\nc", "completion": "b"}, {}, ["prompt   a\\x1b[2J", "c"]),
        ({"prompt": "red " * 900, "completion": "b"}, {}, ["more lines ..."]),
        ({"prompt": "電影" * 40, "completion": "b"}, {}, ["prompt   " + "電影" * 17]),
    ],
    ids=["all", "text", "escape", "long", "wide"],
)
def test_a_row_is_shown_as_it_is_learnt(row, task, expected, folder, tmp_path, capsys):
    tasks = tasks_of(tmp_path, rows=[row] * 4)
    tasks["rows"] |= task
    path = run_file(
        tmp_path / "run.yaml", folder, data={"root": str(tmp_path), "tasks": tasks},
        training={"max_length": 4096, "per_device_train_batch_size": 1},
    )  # fmt: skip
    assert main(["check", path]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown  # neither the data's nor colours, since this is no terminal
    lines = [line.strip() for line in shown.splitlines()]
    for words in expected:
        assert any(words in line for line in lines), shown
    start = next(i for i, line in enumerate(lines) if line.startswith("example"))
    assert all(cell_len(line) <= 80 for line in shown.splitlines()[start + 1 : -1])


def test_a_run_without_a_row_to_train_on(folder, tmp_path, capsys):
    tasks = {"films": {"source": "jsonl", "files": {"test": "train.jsonl"}}}
    path = run_file(tmp_path / "run.yaml", folder, data={"root": str(folder), "tasks": tasks})
    assert main(["check", path]) == 2
    assert "no task has a row in its train split" in capsys.readouterr().err


@pytest.mark.parametrize("template", first_then_slow(TEMPLATES), ids=lambda path: path.stem)
def test_every_template_passes(template, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(template.read_text())
    row = {
        "text": "the film", "label": 0, "question": "the film", "choices": ["good", "bad"],
        "answer": 1, "body": "the film is", "title": "good", "lang": "de",
        "messages": [
            {"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"},
        ],
    }  # fmt: skip
    rows = [row | {"text": f"the film {i}", "body": str(i)} for i in range(40)]
    overrides = [f"model.name={folder / 'model'}", "model.dtype=float32", "model.device=cpu"]
    monkeypatch.setattr(datasets, "load_dataset", hub(rows))
    for name, task in raw["data"]["tasks"].items():
        for file in task.get("files", {}).values():
            path = Path(raw["data"].get("root", "."), file)
            if path.suffix == ".csv":
                lines = ["question,answer", *(f"film {i}?,good" for i in range(40))]
                path.write_text("\n".join(lines))
            else:
                tiny_folders.write_rows(path, rows)
        if task["source"] == "locale":
            overrides.append(f"data.tasks.{name}.languages=[de]")
            overrides.append(f"data.tasks.{name}.limit={json.dumps({'train': 5, 'validation': 2})}")
    Path("run.yaml").write_text(template.read_text())
    assert main(["check", "run.yaml", *overrides]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert shown.endswith("no mistakes found in run.yaml\n")
    assert "note: training needs" not in shown  # all packages are installed here


@pytest.mark.parametrize(
    ("kind", "package"), [("bnb-4bit-nf4", "bitsandbytes"), ("torchao-int8", "torchao")]
)
def test_a_package_that_only_training_needs_is_named(
    kind, package, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    path = run_file(tmp_path / "run.yaml", folder)
    assert main(["check", path, f"model.quantization={kind}"]) == 0
    shown = capsys.readouterr().out
    assert (
        f"note: training needs the package {package}, which is not installed:\n      pip install"
        in shown
    )
    assert f"no mistakes found in {path}" in shown


RUNS = {
    "small": ({}, 4, 4),
    "wide": ({"hidden_size": 256, "intermediate_size": 512, "vocab_size": 8000}, 60, 8),
    "deep": ({"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}, 80, 16),
}


@pytest.mark.parametrize(
    "setting",
    [
        {"evaluation": {"early_stopping_patience": 2}},
        {"training": {"max_steps": 1, "eval_on_start": True}},
        {"training": {"max_steps": 1, "metric_for_best_model": "eval_few_loss"}},
    ],
    ids=["early stopping", "eval_on_start", "metric"],
)
def test_what_needs_validation_rows_is_refused_where_a_fraction_gives_none(
    setting, folder, tmp_path, capsys
):
    """The hash of a row decides, so only the rows tell; training says the same sentence."""
    tasks = {"few": {"files": {"train": "train.jsonl"}, "validation_fraction": 0.001}}
    if "metric_for_best_model" in setting.get("training", {}):
        tasks["more"] = {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}}
    data = {"root": str(folder), "tasks": tasks}
    path = run_file(tmp_path / "run.yaml", folder, data=data, **setting)
    said = []
    for verb in ("check", "train"):
        assert main([verb, path]) == 2
        shown, faults = capsys.readouterr()
        assert "no mistakes found" not in shown
        said.append([line for line in faults.splitlines() if line.startswith("rotmole:")])
    assert said[0] == said[1]
    assert len(said[0]) == 1
    name = next(iter(setting.get("evaluation", {})), None) or list(setting["training"])[1]
    assert name in said[0][0]


@pytest.mark.heavy
@pytest.mark.parametrize(("settings", "words", "batch"), RUNS.values(), ids=RUNS)
def test_the_memory_estimate_is_within_a_quarter_of_the_peak(settings, words, batch, tmp_path):
    """Check and train in one process, which counts its own peak."""
    tiny_folders.write_model(tmp_path / "model", **settings)
    rows = [{"prompt": "red blue " * words + f"{i} ", "completion": "green"} for i in range(48)]
    tiny_folders.write_rows(tmp_path / "train.jsonl", rows)
    tasks = {"colours": {"source": "jsonl", "files": {"train": "train.jsonl"}}}
    path = run_file(
        tmp_path / "run.yaml",
        tmp_path,
        data={"root": str(tmp_path), "tasks": tasks},
        training={"max_steps": 6, "per_device_train_batch_size": batch},
    )
    code = """
import sys
from rotmole_cli import main
from rotmole.models.memory import peak_rss_bytes
for verb in ("check", "train"):
    assert main([verb, sys.argv[1]]) == 0
print("PEAK", peak_rss_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    number, unit = re.search(r"memory +about ([\d.]+) (GB|MB)", done.stdout).groups()
    estimate = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    peak = int(done.stdout.split("PEAK ")[1])
    assert abs(estimate - peak) < 0.25 * peak
