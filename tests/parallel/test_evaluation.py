"""`rotmole eval` in several processes: shared rows, one voice, one process's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import warm
from rotmole import RotMoleConfig
from training_cases import COLOURS, settings, task_rows, write_data, write_model

pytestmark = pytest.mark.slow

METRICS = ["exact_match", "chrf", "perplexity"]
WAYS: dict[str, tuple[int, list[str]]] = {
    "one": (1, ["--limit", "5", "evaluation.batch_size=1"]),
    "three": (3, ["--limit", "5", "evaluation.batch_size=1"]),
    "one, a row each": (1, ["--limit", "1"]),
    "fewer batches than ranks": (2, ["--limit", "1"]),
}


def write_case(root: Path) -> dict[str, Any]:
    """Write a base, an adapter that changes it, tasks of three kinds; return the run file."""
    (root / "data").mkdir()
    content = settings(write_model(root / "model"), write_data(root / "data"), root / "run")
    content["evaluation"] = {"max_new_tokens": 4}
    tasks = content["data"]["tasks"]
    for task in tasks.values():
        task["metrics"] = METRICS
    rows = [
        {"question": row["prompt"], "choices": COLOURS[:3], "answer": i % 3}
        for i, row in enumerate(task_rows("colours", 0, 7))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "data" / "choice.jsonl").write_text(text, encoding="utf-8")
    tasks["choice"] = {
        "source": "jsonl", "files": {"validation": str(root / "data" / "choice.jsonl")},
        "format": "multiple_choice", "prompt": "{question}",
        "completion": "{choice}",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    config = RotMoleConfig(
        task_type="CAUSAL_LM", r=4, num_experts=3, target_modules=["q_proj", "v_proj"],
        init_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    return content


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    content = write_case(root)
    for name in WAYS:
        folder = root / name
        folder.mkdir()
        (folder / "adapter").symlink_to(root / "adapter")
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(content | {"output_dir": str(folder)}), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def runs(case) -> dict[str, list[warm.Rank]]:
    jobs: dict[str, Any] = {}
    for name, (processes, words) in WAYS.items():
        arguments = {"words": ["eval", str(case / name), *words], "file": str(case / name / "rows")}
        jobs[name] = {
            "call": "warm:counted_command", "arguments": arguments, "processes": processes,
        }  # fmt: skip
    words = ["eval", str(case / "one"), "model.dtype=auto", "--limit", "1"]
    jobs["divided"] = {"call": "warm:divided_command", "arguments": {"words": words}}
    jobs["divided"]["processes"] = 2
    done = warm.run(list(jobs.values()), case / "streams")
    return dict(zip(jobs, done, strict=True))


def figures(case: Path, name: str) -> dict[str, Any]:
    found = json.loads((case / name / "eval.json").read_text(encoding="utf-8"))
    for system in found["systems"].values():
        del system["seconds"]
    return {key: value for key, value in found.items() if key != "adapter"}


@pytest.mark.parametrize(
    ("name", "alone"),
    [("three", "one"), ("fewer batches than ranks", "one, a row each")],
)
def test_any_number_of_processes_finds_the_same_figures(case, runs, name, alone):
    said = "\n".join(rank.out + rank.err for rank in runs[name])
    assert [rank.code for rank in runs[name]] == [0] * WAYS[name][0], said
    assert figures(case, name) == figures(case, alone)  # to the last bit
    before, after = figures(case, name)["systems"].values()
    assert before["tasks"] != after["tasks"]
    assert set(before["overall"]) >= {"exact_match", "perplexity"}
    assert set(before["tasks"]["colours"]["metrics"]) == set(METRICS)
    assert "perplexity" in before["tasks"]["choice"]["metrics"]


def test_the_ranks_share_the_rows(case, runs):
    alone = json.loads((case / "one" / "rows.0").read_text(encoding="utf-8"))
    parts = [
        json.loads((case / "three" / f"rows.{rank}").read_text(encoding="utf-8"))
        for rank in range(3)
    ]
    for what, count in alone.items():
        assert count > 0
        assert sum(part[what] for part in parts) == count
        assert all(part[what] >= count // (2 * len(parts)) for part in parts), (what, parts)
    idle = json.loads((case / "fewer batches than ranks" / "rows.1").read_text(encoding="utf-8"))
    assert idle["answered"] == 0


def test_the_first_rank_alone_speaks_and_writes(case, runs):
    first, *others = runs["three"]
    assert "exact_match" in first.out
    assert first.out.count("written: ") == 1
    assert "after: answers 10/10" in first.err
    assert all((rank.out, rank.err) == ("", "") for rank in others)
    assert len(list((case / "three").glob("*eval.json*"))) == 1


def test_ranks_that_would_compute_in_other_formats_are_told_to_agree(runs):
    for rank in runs["divided"]:
        assert rank.code == 2, rank.err
        assert "torch.float32, torch.bfloat16" in rank.err
        assert "set model.dtype" in rank.err
