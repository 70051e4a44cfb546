"""Every preset in processes of their own: trained by `rotmole train`, loaded by another process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml

import warm
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.tuner.settings.presets import PRESETS
from training_cases import settings, write_data, write_model

pytestmark = pytest.mark.heavy  # a minute of forks


def _adapter(name: str) -> str:
    needed = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    missing = {key: value for key, value in needed.items() if key not in PRESETS[name].fields}
    return json.dumps({"preset": name} | missing)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Train all of them, then load all of them; nothing but files passes between the processes."""
    root = tmp_path_factory.mktemp("presets")
    model, data = write_model(root / "model"), root / "data"
    data.mkdir()
    content = settings(model, write_data(data), root / "run", eval_steps=20, save_steps=20)
    (root / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    jobs = []
    for name in PRESETS:
        output = f"output_dir={root / name}"
        words = ["train", str(root / "run.yaml"), output, f"adapter={_adapter(name)}"]
        arguments = {"words": words, "out": str(root / f"{name}.trained")}
        jobs.append({"call": "preset_jobs:trained", "arguments": arguments})
    for name in PRESETS:
        paths = {"adapter": str(root / name / "adapter"), "out": str(root / f"{name}.loaded")}
        arguments = {"base": str(model)} | paths
        jobs.append({"call": "preset_jobs:loaded", "arguments": arguments})
    done = [rank for (rank,) in warm.run(jobs, root / "streams")]
    assert [rank.code for rank in done] == [0] * len(jobs), [rank.err[-2000:] for rank in done]
    return {
        name: {
            "metrics": read_metrics(root / name / "metrics.jsonl"),
            "trained": torch.load(root / f"{name}.trained", weights_only=True),
            "loaded": torch.load(root / f"{name}.loaded", weights_only=True),
        }
        for name in PRESETS
    }


@pytest.mark.parametrize("name", list(PRESETS))
def test_another_process_gets_the_very_logits_of_the_trained_model(
    name: str, runs: dict[str, dict[str, Any]]
) -> None:
    found = runs[name]
    ours, (theirs, without) = found["trained"]["logits"], found["loaded"]
    assert torch.equal(ours, theirs)
    assert (ours - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", list(PRESETS))
def test_twenty_updates_move_every_trainable_tensor_and_lower_the_loss(
    name: str, runs: dict[str, dict[str, Any]]
) -> None:
    losses = [row["loss"] for row in runs[name]["metrics"] if "loss" in row]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    start, end = runs[name]["trained"]["start"], runs[name]["trained"]["end"]
    assert start
    assert not [key for key, value in start.items() if torch.equal(end[key], value)]
