from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics import CHRF
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from rotmole.config.schema import METRICS as SCHEMA_METRICS
from rotmole.data.examples import Example
from rotmole.evaluation.metrics import METRICS, Answer, choose, default_metrics, expected_score


def row(completion: str = " a", **fields) -> Example:
    return Example(task="t", group="", id="0", prompt="p", completion=completion, **fields)


def figure(name: str, examples, answers) -> float:
    return METRICS[name].value(METRICS[name].columns(examples, answers))


def test_the_table_and_the_run_file_name_the_same_metrics():
    assert tuple(METRICS) == SCHEMA_METRICS


def test_choices_raw_and_per_byte():
    choices = (" ab", " abcdef")
    assert choose((-2.0, -3.0), choices, per_byte=False) == 0
    assert choose((-2.0, -3.0), choices, per_byte=True) == 1  # -1 against -0.5
    assert choose((-1.0, -1.0), choices, per_byte=False) == 0  # first of equals
    # the leading space does not count: -1 against -2.5/3
    assert choose((-1.0, -2.5), (" a", " bbb"), per_byte=True) == 1
    # bytes, not characters: 2 characters of 3 bytes each
    assert choose((-2.9, -2.5), (" \u6c34\u706b", " abcd"), per_byte=True) == 0


def test_choice_accuracy_by_hand():
    examples = [row(choices=(" a", " bbbb"), answer=answer) for answer in (0, 1, 1, 0)]
    values = [(-1.0, -2.0), (-1.0, -2.0), (-2.0, -1.0), (-2.0, -1.0)]
    answers = [Answer(log_likelihoods=value) for value in values]
    assert figure("choice_accuracy", examples, answers) == 0.5
    assert figure("accuracy", examples, answers) == 0.5
    assert figure("choice_accuracy_norm", examples, answers) == 0.5  # always the longer one
    right, chosen = [0, 1, 1, 0], [0, 0, 1, 1]
    expected = f1_score(right, chosen, average="macro")
    assert figure("macro_f1", examples, answers) == pytest.approx(expected)
    assert figure("matthews", examples, answers) == matthews_corrcoef(right, chosen)


def test_greedy_match_is_the_share_of_answers_that_are_greedy():
    answers = [Answer(loss=1.0, tokens=2, greedy=greedy) for greedy in (True, False, True, True)]
    assert figure("greedy_match", [row()] * 4, answers) == 0.75


def test_macro_f1_of_constant_predictions():
    examples = [row(choices=(" a", " b"), answer=answer) for answer in (0, 0, 0, 1)]
    answers = [Answer(log_likelihoods=(-1.0, -2.0))] * 4
    assert figure("macro_f1", examples, answers) == pytest.approx((6 / 7 + 0) / 2)
    assert figure("matthews", examples, answers) == 0.0


def test_matthews_with_one_class_in_the_rows():
    examples = [row(choices=(" a", " b"), answer=0)] * 3
    assert figure("matthews", examples, [Answer(log_likelihoods=(-1.0, -2.0))] * 3) == 0.0


def test_expected_score_is_a_softmax_mean():
    assert expected_score((0.0,) * 6) == pytest.approx(2.5)
    assert expected_score((math.log(0.25), math.log(0.75))) == pytest.approx(0.75)
    assert expected_score((-1000.0, -2000.0, -1001.0)) == pytest.approx(2 / (1 + math.e))


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    columns = np.stack([rng.integers(0, 6, 30).astype(float), rng.normal(size=30)], axis=1)
    assert METRICS["pearson"].value(columns) == stats.pearsonr(*columns.T).statistic
    assert METRICS["spearman"].value(columns) == stats.spearmanr(*columns.T).statistic


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    "columns", [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 2.0]], [[0.0, 1.0], [0.0, 2.0]]]
)
def test_degenerate_correlations_are_zero(name, columns):
    assert METRICS[name].value(np.array(columns)) == 0.0


def test_chrf_is_sacrebleus_corpus_score():
    texts = ["the cat sat", "ein Haus", ""]
    references = [" the cat sits", " ein Haus", " x"]
    examples = [row(reference) for reference in references]
    expected = CHRF().corpus_score(texts, [references]).score
    assert figure("chrf", examples, [Answer(text=text) for text in texts]) == expected


def test_perplexity_weighs_tokens_not_rows():
    answers = [Answer(loss=2.0, tokens=1), Answer(loss=3.0, tokens=4)]
    assert figure("perplexity", [row()] * 2, answers) == pytest.approx(math.exp(5 / 5))


def test_default_metrics_follow_the_rows():
    choices = {"choices": (" a", " b"), "answer": 0}
    assert default_metrics([row(), row()]) == ("exact_match", "perplexity")
    assert default_metrics([row(**choices)] * 2) == ("accuracy", "macro_f1", "perplexity")
    other = row(choices=(" c", " d"), answer=1)
    expected = ("choice_accuracy", "choice_accuracy_norm", "perplexity")
    assert default_metrics([row(**choices), other]) == expected
    assert default_metrics([row(**choices, score=1.0)]) == ("pearson", "spearman", "perplexity")
    text = Example(task="t", group="", id="0", prompt="", completion="text", loss_on="all")
    assert default_metrics([text]) == ("perplexity",)
