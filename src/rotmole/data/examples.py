"""The one record that data hands to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One row of one task, already rendered to text.

    The text is `prompt + completion`, tokenised as one; spaces at the end of a prompt template
    are kept at the start of the completion, where byte-pair tokenizers expect them.

    Attributes:
        task: the task's name in the run file; kept to the end (batches, metrics, recording).
        group: what the report splits a task by, such as a language; "" where a task has one group.
        id: stable within task and split.
        prompt: text before the answer ("" for format text).
        completion: the right answer's text, without the end-of-sequence token.
        loss_on: "completion" or "all"; which tokens training learns from.
        choices: candidate completions for scoring by log-likelihood, () where there are none.
        answer: index of the right choice, None where there is none.
        score: target of a regression task (STS-B: 0..5), None elsewhere.
        end: text that ends the answer in a chat template; "" means the tokenizer's own EOS.
        long_rows: "error", or "cut" to drop the start of a prompt that does not fit.
        origin: where the row came from, such as "train.jsonl: row 7", for error messages.
    """

    task: str
    group: str
    id: str
    prompt: str
    completion: str
    loss_on: str = "completion"
    choices: tuple[str, ...] = ()
    answer: int | None = None
    score: float | None = None
    end: str = ""
    long_rows: str = "error"
    origin: str = ""
