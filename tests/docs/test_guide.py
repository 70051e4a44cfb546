"""docs/guide.md: the templates follow it, its names exist in the code, its sources are listed."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml

import rotmole.config
from rotmole.config.training import training_hints
from rotmole.tuner.settings.settings import Settings

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
TEMPLATES = sorted(Path(rotmole.config.__file__).parent.glob("templates/*.yaml"))
RATES = {
    size: float(rate)
    for size, rate in re.findall(r"^\| (\d+[MB]) \| (\S+) \|", GUIDE, re.MULTILINE)
}
SIZES = {"smollm2-135m": "135M", "HuggingFaceTB/SmolLM2-1.7B-Instruct": "1B"}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_has_the_guides_learning_rate_and_names_those_of_other_sizes(
    template: Path,
) -> None:
    run = yaml.safe_load(template.read_text(encoding="utf-8"))
    rate = float(run["training"]["learning_rate"])
    adapter = run["adapter"]
    sums_to_one = "preset" not in adapter and "routed_scaling_factor" not in adapter
    assert rate == RATES[SIZES[run["model"]["name"]]] * (adapter["top_k"] if sums_to_one else 1)
    line = next(
        line for line in template.read_text("utf-8").splitlines() if "learning_rate" in line
    )
    named = {float(number) for number in re.findall(r"\de-\d", line)}
    assert named == {rate, *RATES.values()}


def test_the_measures_that_the_guide_names_are_logged() -> None:
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    for name in ("largest_expert_share", "experts_unused", "failure.json"):
        assert name in GUIDE
        assert name in code
    assert "experts have collapsed" in code
    assert "experts have collapsed" in GUIDE


def test_the_settings_that_the_guide_names_exist() -> None:
    known = {*training_hints(), *vars(Settings())}
    for line in re.findall(r"`([a-z_]+: [^`]+)`", GUIDE):
        for name in yaml.safe_load("{" + line + "}"):
            others = {"adapter", "loss_on", "long_rows"}
            assert name in known | others, line
    for name in ("lora_alpha", "use_rslora", "router_aux_loss_coef", "top_k"):
        assert name in vars(Settings())


def test_the_times_that_the_guide_gives_are_the_committed_ones() -> None:
    def figure(file: str, case: str, mode: str, measure: str) -> str:
        with (ROOT / "benchmarks" / "results" / file).open(encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            found = [
                r for r in rows if (r["case"], r["mode"], r["measure"]) == (case, mode, measure)
            ]
        return f"{float(found[0]['value']):.2f}".removeprefix("0")

    step = figure("step.csv", "q,k,v,o 4 x 128 float32 E=4 R=6 K=2", "tangent", "training step")
    case = "q,k,v,o batch 1 float32 E=4 R=6 K=2"
    slow, fast = (figure("decode.csv", case, m, "tokens per second") for m in ("tangent", "none"))
    assert f"takes {step} times LoRA's" in GUIDE
    assert f"{slow} (tangent) to {fast} (none)" in GUIDE


def test_every_source_is_listed() -> None:
    text, listed = GUIDE.split("## Sources")
    names = {
        n
        for group in re.findall(r"\[([a-z]+(?:, [a-z]+)*)\](?!\()", text)
        for n in group.split(", ")
    }
    assert len(names) >= 10
    rows = {
        n for row in re.findall(r"^\| ([\w, -]+) \|", listed, re.MULTILINE) for n in row.split(", ")
    }
    assert names <= rows
