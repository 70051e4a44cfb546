"""Evaluation: a model's answers on named tasks, the metrics of these answers, and reports."""

from __future__ import annotations

from rotmole.evaluation.evaluate import evaluate, limit_rows, measure
from rotmole.evaluation.generation import answers, generate_text
from rotmole.evaluation.report import Report, System, compare, to_json

__all__ = [
    "Report",
    "System",
    "answers",
    "compare",
    "evaluate",
    "generate_text",
    "limit_rows",
    "measure",
    "to_json",
]
