"""lm_eval's figures on a loaded model are ours, with the adapter and without."""

from __future__ import annotations

import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rotmole.config.schema import EvaluationSection
from rotmole.data.examples import Example
from rotmole.errors import ConfigError, InputError
from rotmole.evaluation import measure
from rotmole.evaluation.harness import check_harness, run_harness

ROWS = [
    {"question": "the film is", "choices": ["good", "bad", "so good"], "answer": 0},
    {"question": "is it", "choices": ["bad", "good", "not"], "answer": 1},
    {"question": "a film that", "choices": ["is not bad", "is bad"], "answer": 1},
]
TASK = """\
task: films
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_bytes
"""


@pytest.fixture
def tasks(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "films.yaml").write_text(TASK.format(path=rows), encoding="utf-8")
    return tmp_path


def ours(model, tokenizer):
    examples = [
        Example(
            task="films", group="", id=str(index), prompt=row["question"],
            completion=" " + row["choices"][row["answer"]],
            choices=tuple(" " + choice for choice in row["choices"]), answer=row["answer"],
        )
        for index, row in enumerate(ROWS)
    ]  # fmt: skip
    metrics = {"films": ["choice_accuracy", "choice_accuracy_norm"]}
    system = measure(
        model, tokenizer, {"films": examples}, EvaluationSection(), metrics_by_task=metrics
    )
    figures = {name: measured.value for name, measured in system.cells[0].metrics.items()}
    return figures, [answer.log_likelihoods for answer in system.answers["films"]]


@pytest.mark.slow
def test_figures_and_log_likelihoods_are_ours(model, tokenizer, tasks):
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    manager = check_harness(["films"], tasks)
    state = torch.get_rng_state(), random.getstate()
    figures, results = run_harness(adapted, tokenizer, ["films"], manager, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    by_metric = {figure.metric: figure.values for figure in figures}
    likelihoods = {}
    for system in ("base", "adapter"):
        if system == "base":
            with adapted.disable_adapter():
                expected, likelihoods[system] = ours(adapted, tokenizer)
        else:
            expected, likelihoods[system] = ours(adapted, tokenizer)
        assert by_metric["acc"][system] == expected["choice_accuracy"]
        assert by_metric["acc_bytes"][system] == expected["choice_accuracy_norm"]
        samples = sorted(results[system]["samples"]["films"], key=lambda each: each["doc_id"])
        for sample, values in zip(samples, likelihoods[system], strict=True):
            its = [float(pair[0]) for pair in sample["filtered_resps"]]
            assert its == pytest.approx(values, abs=1e-4)
    assert likelihoods["base"] != likelihoods["adapter"]


@pytest.mark.slow
def test_unknown_tasks_and_folders(tasks, monkeypatch):
    with pytest.raises(InputError, match="no task 'flims'; did you mean 'films'"):
        check_harness(["flims"], tasks)
    with pytest.raises(InputError, match=r"--harness-path .* is no folder"):
        check_harness(["films"], tasks / "none")
    monkeypatch.setattr("rotmole.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rotmole\[eval\]'"):
        check_harness(["films"], tasks)
