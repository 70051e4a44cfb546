from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from evaluation_cases import choice_rows, make_model, score_rows, text_rows
from peft import LoraConfig, get_peft_model

from rotmole import RotMoleConfig
from rotmole.config.schema import EvaluationSection
from rotmole.errors import ConfigError
from rotmole.evaluation import compare, evaluate, limit_rows, measure, to_json
from rotmole.evaluation.evaluate import task_metrics
from rotmole.evaluation.report import prediction_rows

SECTION = EvaluationSection(max_new_tokens=4, batch_size=4)
TASKS = {"animals": choice_rows(), "film": text_rows(), "similar": score_rows()}


LORA = LoraConfig(target_modules=["q_proj", "v_proj"])
MIXTURE = RotMoleConfig(target_modules=["q_proj", "v_proj"], r=4)


def adapted(tokenizer, *, perturb: float, config=LORA):
    torch.manual_seed(1)
    model = get_peft_model(make_model(tokenizer), config).double().eval()
    if perturb:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, perturb)
    return model


def without_time(report) -> dict:
    result = to_json(report) | {"predictions": list(prediction_rows(report))}
    for system in result["systems"].values():
        del system["seconds"]
    return result


@pytest.mark.parametrize("config", [LORA, MIXTURE], ids=["lora", "rotmole"])
def test_an_untrained_adapter_changes_nothing(tokenizer, config):
    model = adapted(tokenizer, perturb=0.0, config=config)
    report = evaluate(model, tokenizer, TASKS, SECTION)
    assert list(report.systems) == ["before", "after"]
    result = without_time(report)
    assert result["systems"]["before"] == result["systems"]["after"]
    for row in result["predictions"]:
        assert row["systems"]["before"] == row["systems"]["after"]
    for cell in report.differences["after"]:
        for measured in cell.metrics.values():
            assert (measured.value, measured.low, measured.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("config", [LORA, MIXTURE], ids=["lora", "rotmole"])
def test_a_trained_adapter_changes_after_and_not_before(tokenizer, config):
    base = evaluate(make_model(tokenizer), tokenizer, TASKS, SECTION)
    assert list(base.systems) == ["base"]
    model = adapted(tokenizer, perturb=0.5, config=config)
    report = evaluate(model, tokenizer, TASKS, SECTION)
    result, plain = without_time(report), without_time(base)
    assert result["systems"]["before"] == plain["systems"]["base"]
    assert result["systems"]["after"] != result["systems"]["before"]
    film = result["differences"]["after"]["tasks"]["film"]["metrics"]["perplexity"]
    assert film["value"] != 0


def test_before_can_be_left_out(tokenizer):
    section = SECTION.model_copy(update={"before": False})
    report = evaluate(adapted(tokenizer, perturb=0.5), tokenizer, TASKS, section)
    assert list(report.systems) == ["after"]
    assert report.differences == {}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_no_figure(model, tokenizer, batch_size):
    section = SECTION.model_copy(update={"batch_size": batch_size})
    one = without_time(evaluate(model, tokenizer, TASKS, section))
    other = without_time(evaluate(model, tokenizer, TASKS, SECTION))
    for result in (one, other):
        del result["settings"]

    def flat(value, path=""):
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {k: v for key, part in items for k, v in flat(part, f"{path}/{key}").items()}
        return {path: value}

    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    for path, value in first.items():
        if isinstance(value, float):
            assert value == pytest.approx(second[path], rel=1e-9), path
        else:
            assert value == second[path], path


def test_figures_by_task_group_and_overall(model, tokenizer):
    report = evaluate(model, tokenizer, TASKS, SECTION)
    (system,) = report.systems.values()
    cells = {(cell.task, cell.group): cell.metrics for cell in system.cells}
    assert list(cells) == [
        ("animals", ""), ("animals", "even"), ("animals", "odd"), ("film", ""), ("similar", ""),
    ]  # fmt: skip
    assert list(cells["animals", ""]) == ["accuracy", "macro_f1", "perplexity"]
    assert list(cells["similar", ""]) == ["pearson", "spearman", "perplexity"]
    assert [cells["animals", group]["accuracy"].n for group in ("", "even", "odd")] == [6, 3, 3]
    pooled = sum(cells["animals", group]["accuracy"].value for group in ("even", "odd")) / 2
    assert cells["animals", ""]["accuracy"].value == pytest.approx(pooled)
    assert set(system.overall) == {"accuracy", "exact_match", "perplexity"}
    assert system.overall["perplexity"].n == 17
    for measures in cells.values():
        for measured in measures.values():
            assert measured.low <= measured.high


def test_perplexity_is_the_training_loss(model, tokenizer):
    from rotmole.data.encode import Collator, encode

    report = evaluate(model, tokenizer, {"film": text_rows()}, SECTION)
    batch = Collator(tokenizer)([encode(r, tokenizer, max_length=99) for r in text_rows()])
    with torch.no_grad():
        loss = float(model(**batch).loss)
    measured = report.systems["base"].cells[0].metrics["perplexity"]
    assert math.log(measured.value) == pytest.approx(loss, rel=1e-6)


def test_a_uniform_model_scores_chance(model, tokenizer):
    torch.nn.init.zeros_(model.lm_head.weight)
    report = evaluate(model, tokenizer, {"similar": score_rows(12)}, SECTION)
    predictions = [row["systems"]["base"] for row in prediction_rows(report)]
    assert [row["score"] for row in predictions] == pytest.approx([2.5] * 12)
    metrics = report.systems["base"].cells[0].metrics
    assert metrics["pearson"].value == 0.0
    assert metrics["perplexity"].value == pytest.approx(len(tokenizer))
    wanted = {"similar": ["accuracy"]}
    accuracy = measure(
        model,
        tokenizer,
        {"similar": score_rows(12)},
        SECTION,
        metrics_by_task=wanted,
    )
    assert accuracy.cells[0].metrics["accuracy"].value == pytest.approx(1 / 6)


def test_worked_examples_change_prompts_only_of_what_is_asked(model, tokenizer):
    train = {"film": [replace(r, id="train" + r.id, prompt=r.prompt + "!") for r in text_rows()]}
    section = SECTION.model_copy(update={"examples_in_prompt": 2})
    tasks = {"film": text_rows()}
    shown = evaluate(model, tokenizer, tasks, section, demonstrations=train)
    plain = evaluate(model, tokenizer, tasks, SECTION)
    assert without_time(shown)["systems"] != without_time(plain)["systems"]
    together = compare({"0": plain.systems["base"], "2": shown.systems["base"]})
    assert list(together.differences) == ["2"]
    with pytest.raises(ConfigError, match="has only 0 training rows"):
        evaluate(model, tokenizer, tasks, section)


def test_answers_of_several_lines_are_not_cut(model, tokenizer):
    (newline,) = tokenizer("\n")["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[newline] *= 3
    lines = [replace(row, task="lines", completion=" a\nb") for row in text_rows()]
    report = evaluate(model, tokenizer, {"film": text_rows(), "lines": lines}, SECTION)
    texts: dict[str, list[str]] = {"film": [], "lines": []}
    for row in prediction_rows(report):
        texts[row["task"]].append(row["systems"]["base"]["prediction"])
    assert any("\n" in text for text in texts["lines"])
    assert texts["film"] == [text.split("\n")[0].strip() for text in texts["lines"]]


def test_limit_is_per_group_and_seeded():
    rows = {"animals": choice_rows(20)}
    chosen = limit_rows(rows, 3, seed=0)["animals"]
    assert [row.group for row in chosen].count("even") == 3
    assert len(chosen) == 6
    assert [int(row.id) for row in chosen] == sorted(int(row.id) for row in chosen)
    assert chosen == limit_rows(rows, 3, seed=0)["animals"]
    assert chosen != limit_rows(rows, 3, seed=1)["animals"]
    assert limit_rows(rows, None, seed=0) == rows
    assert limit_rows(rows, 50, seed=0) == rows


def test_every_problem_with_metrics_is_told_at_once():
    wanted = {"film": ["exact_mach", "matthews"], "animals": ["pearson"], "similar": ["chrf"]}
    with pytest.raises(ConfigError) as caught:
        task_metrics({**TASKS, "empty": []}, wanted)
    text = str(caught.value)
    assert "'exact_mach'; did you mean 'exact_match'?" in text
    assert "'matthews' needs choices" in text
    assert "'pearson' needs a score" in text
    assert "'empty' has no rows" in text
    assert len(caught.value.problems) == 4


def test_no_task_is_an_error():
    with pytest.raises(ConfigError, match="no task"):
        task_metrics({}, {})


def test_different_rows_are_not_compared(model, tokenizer):
    system = measure(model, tokenizer, {"film": text_rows(3)}, SECTION)
    other = measure(model, tokenizer, {"film": text_rows(4)}, SECTION)
    with pytest.raises(ValueError, match="did not answer the same rows"):
        compare({"a": system, "b": other})


def test_progress_reaches_its_total(tokenizer):
    seen: dict[str, tuple[int, int]] = {}
    evaluate(
        adapted(tokenizer, perturb=0.1),
        tokenizer,
        TASKS,
        SECTION,
        progress=lambda what, done, total: seen.__setitem__(what, (done, total)),
    )
    assert list(seen) == [
        "tokenising",
        *("before: likelihoods", "before: answers", "after: likelihoods", "after: answers"),
    ]
    assert all(done == total for done, total in seen.values())


def test_the_report_is_plain_json(model, tokenizer):
    report = evaluate(model, tokenizer, TASKS, SECTION)
    result = [to_json(report), *prediction_rows(report)]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_predictions_add_up_to_the_figures(tokenizer):
    report = evaluate(adapted(tokenizer, perturb=0.5), tokenizer, TASKS, SECTION)
    rows = list(prediction_rows(report))
    keys = ["task", "group", "id", "origin", "prompt", "reference"]
    assert [list(row)[:6] for row in rows] == [keys] * 17
    for name, system in report.systems.items():
        cells = {cell.task: cell.metrics for cell in system.cells if not cell.group}
        of = {task: [r for r in rows if r["task"] == task] for task in TASKS}
        for task, metric in (("film", "exact_match"), ("animals", "accuracy")):
            values = [row["systems"][name]["metrics"][metric] for row in of[task]]
            assert sum(values) / len(values) == cells[task][metric].value
        for task, measures in cells.items():
            answers = [row["systems"][name] for row in of[task]]
            loss = sum(a["loss"] for a in answers) / sum(a["tokens"] for a in answers)
            assert math.exp(loss) == pytest.approx(measures["perplexity"].value)
        assert list(of["animals"][0]["systems"][name]["metrics"]) == ["accuracy", "perplexity"]
        assert list(of["similar"][0]["systems"][name]["metrics"]) == ["perplexity"]
    assert of["similar"][1]["right_score"] == 1.0
    assert of["animals"][1]["choices"][of["animals"][1]["right_choice"]] == " a bird or a bat"
