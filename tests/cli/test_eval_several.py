"""`rotmole eval A B ...` on a tiny model: one table, paired differences, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rotmole_cli import main
from tiny_folders import write_base_model

RUN = """\
output_dir: {folder}/{name}
seed: {seed}
model: {{name: {folder}/model, dtype: float32, device: cpu}}
adapter: {{r: {r}, num_experts: 2, top_k: 2}}
data:
  root: {folder}
  tasks:
    film:
      source: jsonl
      files: {{train: film.jsonl, validation: film.jsonl, test: {test}}}
evaluation: {{max_new_tokens: 2, split: test}}
"""


def write_run(
    folder: Path, name: str, *, seed: int = 0, r: int = 4, test: str = "film.jsonl"
) -> Path:
    """A run folder as training leaves it."""
    run = folder / name
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    model = get_peft_model(model, LoraConfig(r=r, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(seed + 10 * r)
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            if "lora_B" in weight:
                parameter.normal_(0, 0.5)
    model.save_pretrained(run / "adapter")
    text = RUN.format(folder=folder, name=name, seed=seed, r=r, test=test)
    (run / "run.yaml").write_text(text, encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A model, rows, and runs: two methods by two seeds, and one with other rows."""
    folder = tmp_path_factory.mktemp("several")
    write_base_model(folder / "model")
    rows = [{"prompt": f"film {i} is", "completion": " good"} for i in range(6)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "film.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "fewer.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    for r in (2, 4):
        for seed in (0, 1):
            write_run(folder, f"r{r}-{seed}", seed=seed, r=r)
    write_run(folder, "other", r=8, test="fewer.jsonl")
    return folder


def run(shared: Path, *words: str) -> int:
    return main(["eval", *(str(shared / w) if (shared / w).exists() else w for w in words)])


def test_two_runs_by_row(shared, capsys):
    assert run(shared, "r2-0", "r4-0", "--limit", "5") == 0
    printed = capsys.readouterr().out
    assert "NLL minus that of" in printed
    assert "too few rows for a claim" in printed  # 2 / 2^5 is above .05 / 2
    assert "nothing is said of that" in " ".join(printed.split())
    line = next(line for line in printed.splitlines() if "r4-0" in line and "overall" in line)
    assert line.split()[2] == "5"  # rows within the limit
    assert not (shared / "r2-0" / "eval.json").exists()  # several targets leave no files
    said = " ".join(printed.split())
    config = LlamaConfig.from_pretrained(shared / "model")
    kept = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    each = 3 * config.hidden_size + kept  # q and v, in and out
    assert f"r2-0 {2 * each * config.num_hidden_layers:,}; " in said  # counted in the file
    assert "r4-0 has +100.0 % trainable parameters beside" in said


def test_two_methods_by_seed_as_json_and_in_files(shared, tmp_path, capsys):
    words = ("r2-0", "r2-1", "r4-0", "r4-1", "--json", "--output", str(tmp_path))
    assert run(shared, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert printed["paired"]["unit"] == "seed"
    (members, others) = printed["paired"]["members"].values()
    assert [Path(name).name for name in (*members, *others)] == ["r2-0", "r2-1", "r4-0", "r4-1"]
    nll = {}
    for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        for name, answer in json.loads(line)["systems"].items():
            nll.setdefault(Path(name).name, []).append(answer["loss"] / answer["tokens"])
    mean = {name: sum(values) / len(values) for name, values in nll.items()}
    expected = (mean["r4-0"] - mean["r2-0"] + mean["r4-1"] - mean["r2-1"]) / 2
    overall = printed["paired"]["differences"][0]
    assert (overall["measure"], overall["task"]) == ("nll", "")
    assert overall["estimate"]["value"] == pytest.approx(expected)


def test_runs_of_several_seeds_stand_beside_the_baselines_of_their_seed(shared, capsys):
    assert run(shared, "r2-0", "r2-1", "r4-0", "r4-1") == 0
    said = " ".join(capsys.readouterr().out.split())
    for seed in (0, 1):
        assert f"r4-{seed} has +100.0 % trainable parameters beside {shared}/r2-{seed}:" in said
    assert said.count("trainable parameters beside") == 2


def test_a_run_scores_as_it_does_alone(shared, tmp_path, capsys):
    assert run(shared, "r2-0", "r4-1", "--json", "--output", str(tmp_path / "both")) == 0
    both = json.loads(capsys.readouterr().out)["systems"]
    assert run(shared, "r4-1", "--json", "--output", str(tmp_path / "one")) == 0
    alone = json.loads(capsys.readouterr().out)["systems"]["after"]
    (name,) = [name for name in both if name.endswith("r4-1")]
    values = [system["tasks"]["film"]["metrics"]["perplexity"]["value"]
              for system in (both[name], alone)]  # fmt: skip
    assert values[0] == values[1]


def test_an_adapter_alone_and_a_base_model_with_one_run_file(shared, tmp_path, capsys):
    adapter = tmp_path / "lone"
    adapter.symlink_to(shared / "r4-0" / "adapter")
    text = RUN.format(folder=shared, name="untrained", seed=0, r=4, test="film.jsonl")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    words = [str(tmp_path / "run.yaml"), str(shared / "r2-0")]
    assert main(["eval", *words, "evaluation.max_new_tokens=3"]) == 0
    printed = capsys.readouterr().out
    assert "max_new_tokens 3" in printed
    assert main(["eval", str(shared / "r2-0"), str(adapter), "--config", words[0]]) == 0


def test_rows_that_chose_a_checkpoint_are_told(shared, capsys):
    assert run(shared, "r2-0", "r4-0", "--split", "validation") == 0
    said = capsys.readouterr().out
    assert said.count("chose the checkpoint of") == 2
    assert run(shared, "r2-0", "r4-0") == 0
    assert "chose the checkpoint" not in capsys.readouterr().out


def test_other_rows_are_refused_before_anything_is_scored(shared, capsys):
    assert run(shared, "r2-0", "other") == 2
    said = capsys.readouterr().err
    assert "other rows than" in said
    assert "(4 and 6 rows)" in said
    assert "likelihoods" not in said
    config = str(shared / "r2-0" / "run.yaml")
    assert run(shared, "r2-0", "other", "--config", config) == 0


def test_one_run_twice_and_words_that_are_nothing(shared, capsys):
    assert run(shared, "r2-0", "r2-0") == 2
    assert "given twice" in capsys.readouterr().err
    assert run(shared, "r2-0", "r3-0") == 2
    assert "there is no file or folder r3-0" in capsys.readouterr().err
