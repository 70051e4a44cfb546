"""Metrics, each computed by the library that defines it.

Every metric is an entry of the table METRICS. `columns` turns examples and answers into numbers,
one line per row of data ([N, k]); `value` turns all lines into the figure. So one bootstrap over
lines works for every metric, and two systems on the same rows can be compared line by line.

greedy_match is the share of rows whose every token, the end of sequence included, is the likeliest
one after the true tokens before it: where it is, greedy decoding writes exactly the correct answer.
It costs nothing beyond the loss (`is_greedy` of the language model evaluation harness, which leaves
the end out).

Degenerate input: constant predictions give matthews 0, as in scikit-learn. pearson and spearman
are 0 if either side is constant or there are fewer than two rows; the libraries give NaN, which
the report would show as a missing figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from rotmole.data.examples import Example
from rotmole.evaluation.statistics import resampled
from rotmole.evaluation.statistics.resampled import Columns
from rotmole.evaluation.text import exact_match, rouge_l

Need = Literal["text", "choices", "score", "loss"]


@dataclass(frozen=True)
class Answer:
    """A system's answer to one example; a field is None if no metric needs it.

    Attributes:
        text: the generated answer, after `cut_answer`.
        log_likelihoods: natural log-likelihood of each of the example's choices.
        loss: negative log-likelihood of the correct answer, summed over `tokens`, in nats.
        tokens: number of scored tokens of the correct answer, end of sequence included.
        greedy: each of these tokens is the likeliest one after those before it.
    """

    text: str | None = None
    log_likelihoods: tuple[float, ...] | None = None
    loss: float | None = None
    tokens: int | None = None
    greedy: bool | None = None


@dataclass(frozen=True)
class Metric:
    """One entry of METRICS.

    Attributes:
        needs: what must be computed for it: generated "text", log-likelihoods of the "choices",
            choices with a "score", or the "loss" of the correct answer.
        columns: examples and answers -> [N, k] numbers.
        value: [N, k] numbers -> the figure, from the library.
        resampled: [N, k] numbers and rows [B, N] -> the figure of each of B resamples.
        proportion: the figure is a share of rows, so its interval is Wilson's.
        pooled: rows of different tasks may be pooled into one overall figure.
        by_row: the figure of a single row says something about that row.
        higher_is_better: False if a lower figure is better.
    """

    needs: Need
    columns: Callable[[Sequence[Example], Sequence[Answer]], Columns]
    value: Callable[[Columns], float]
    resampled: Callable[[Columns, resampled.Rows], Columns]
    proportion: bool = False
    pooled: bool = False
    by_row: bool = False
    higher_is_better: bool = True


def choose(log_likelihoods: Sequence[float], choices: Sequence[str], *, per_byte: bool) -> int:
    """Return the index of the most likely choice: argmax_c l_c, or argmax_c l_c / bytes_c.

    Of equal choices the first one is returned.

    Args:
        log_likelihoods: natural log-likelihood of each choice.
        choices: the choices' texts; bytes_c is the length of the stripped text in UTF-8, so a
            template's leading space does not count.
        per_byte: divide by bytes_c.

    Source: `acc` and `acc_bytes` of the language model evaluation harness.
    """
    scores = np.asarray(log_likelihoods, dtype=np.float64)
    if per_byte:
        scores = scores / [max(1, len(choice.strip().encode("utf-8"))) for choice in choices]
    return int(np.argmax(scores))


def expected_score(log_likelihoods: Sequence[float]) -> float:
    """Return the expected value over number words: sum_c p_c c, p = softmax(log_likelihoods).

    Args:
        log_likelihoods: natural log-likelihood of the words "0", "1", ..., in that order.
    """
    from scipy.special import softmax

    share = softmax(np.asarray(log_likelihoods, dtype=np.float64))
    return float(np.dot(share, np.arange(len(share))))


def _per_row(score: Callable[[str, str], float]) -> Callable[..., Columns]:
    def columns(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
        pairs = zip(examples, answers, strict=True)
        values = [float(score(answer.text or "", example.completion)) for example, answer in pairs]
        return np.array(values, dtype=np.float64)[:, None]

    return columns


def _choices(examples: Sequence[Example], answers: Sequence[Answer], per_byte: bool) -> Columns:
    """Return [N, 2]: index of the correct and of the chosen choice."""
    pairs = zip(examples, answers, strict=True)
    return np.array(
        [
            (e.answer, choose(a.log_likelihoods or (), e.choices, per_byte=per_byte))
            for e, a in pairs
        ],
        dtype=np.float64,
    )


def _hits(per_byte: bool) -> Callable[..., Columns]:
    def columns(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
        index_N2 = _choices(examples, answers, per_byte)
        return (index_N2[:, :1] == index_N2[:, 1:]).astype(np.float64)

    return columns


def _labels(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
    return _choices(examples, answers, per_byte=False)


def _scores(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
    pairs = zip(examples, answers, strict=True)
    return np.array(
        [(e.score, expected_score(a.log_likelihoods or ())) for e, a in pairs],
        dtype=np.float64,
    )


def _losses(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
    return np.array([(answer.loss, answer.tokens) for answer in answers], dtype=np.float64)


def _greedy(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
    return np.array([[answer.greedy] for answer in answers], dtype=np.float64)


def _chrf_counts(examples: Sequence[Example], answers: Sequence[Answer]) -> Columns:
    # The counts that sacrebleu's corpus_score and its bootstrap add up.
    texts = [answer.text or "" for answer in answers]
    references = [[example.completion for example in examples]]
    counts = _chrf_scorer()._extract_corpus_statistics(texts, references)
    return np.array(counts, dtype=np.float64)


def _mean(columns: Columns) -> float:
    return float(columns.mean())


def _macro_f1(columns: Columns) -> float:
    from sklearn.metrics import f1_score

    right, chosen = columns.astype(np.int64).T
    return float(f1_score(right, chosen, average="macro", zero_division=0.0))


def _matthews(columns: Columns) -> float:
    from sklearn.metrics import matthews_corrcoef

    right, chosen = columns.astype(np.int64).T
    if len(np.unique(right)) < 2 or len(np.unique(chosen)) < 2:
        return 0.0  # scikit-learn's value as well, but it warns if there is a single label
    return float(matthews_corrcoef(right, chosen))


def _pearson(columns: Columns) -> float:
    from scipy.stats import pearsonr

    return 0.0 if _is_degenerate(columns) else float(pearsonr(*columns.T).statistic)


def _spearman(columns: Columns) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _is_degenerate(columns) else float(spearmanr(*columns.T).statistic)


def _is_degenerate(columns: Columns) -> bool:
    return len(columns) < 2 or bool(resampled.is_constant(columns.T).any())


def _perplexity(columns: Columns) -> float:
    loss, tokens = columns.sum(0)
    with np.errstate(over="ignore"):  # of one row, which may be infinite
        return float(np.exp(loss / tokens))


@lru_cache(maxsize=1)
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def _chrf(columns: Columns) -> float:
    return float(_chrf_scorer()._compute_score_from_stats(columns.sum(0).tolist()).score)


def _chrf_resampled(columns: Columns, rows_BN: resampled.Rows) -> Columns:
    return np.array([_chrf(columns[rows]) for rows in rows_BN])


def _share(needs: Need, columns: Callable[..., Columns]) -> Metric:
    return Metric(needs, columns, _mean, resampled.mean, proportion=True, pooled=True, by_row=True)


METRICS: dict[str, Metric] = {
    "exact_match": _share("text", _per_row(exact_match)),
    "choice_accuracy": _share("choices", _hits(False)),
    "choice_accuracy_norm": _share("choices", _hits(True)),
    "accuracy": _share("choices", _hits(False)),
    "macro_f1": Metric("choices", _labels, _macro_f1, resampled.macro_f1),
    "matthews": Metric("choices", _labels, _matthews, resampled.matthews),
    "pearson": Metric("score", _scores, _pearson, resampled.pearson),
    "spearman": Metric("score", _scores, _spearman, resampled.spearman),
    "rouge_l": Metric("text", _per_row(rouge_l), _mean, resampled.mean, pooled=True, by_row=True),
    "greedy_match": _share("loss", _greedy),
    "chrf": Metric("text", _chrf_counts, _chrf, _chrf_resampled, by_row=True),
    "perplexity": Metric(
        "loss",
        _losses,
        _perplexity,
        resampled.perplexity,
        pooled=True,
        by_row=True,
        higher_is_better=False,
    ),
}


def default_metrics(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the names of the metrics for a task that does not name any.

    Rows with a score: pearson, spearman. The same choices in every row (label words): accuracy,
    macro_f1. Other choices: choice_accuracy, choice_accuracy_norm. No prompt (plain text): none of
    these. All other rows: exact_match. Perplexity of the correct answer is always added.
    """
    if all(example.score is not None and example.choices for example in examples):
        return ("pearson", "spearman", "perplexity")
    if all(example.choices and example.answer is not None for example in examples):
        if len(examples) > 1 and len({example.choices for example in examples}) == 1:
            return ("accuracy", "macro_f1", "perplexity")
        return ("choice_accuracy", "choice_accuracy_norm", "perplexity")
    if not any(example.prompt for example in examples):
        return ("perplexity",)
    return ("exact_match", "perplexity")
