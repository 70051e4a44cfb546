"""The record of one row that the data room hands to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One row of one task, already rendered to text.

    `prompt + completion` is tokenised as one text; spaces at the end of a prompt template are
    moved to the start of the completion, where byte-pair tokenizers expect them.

    Attributes:
        task: the task's name in the run file.
        group: what the report splits a task by, such as a language; "" if it is not split.
        id: unique within task and split, the same in every run.
        prompt: text before the answer ("" with format text).
        completion: text of the correct answer, without the end-of-sequence token.
        loss_on: "completion" or "all": the tokens that have labels.
        learnt: ranges of characters of prompt + completion whose tokens have labels, ascending,
            the last one to the end; () leaves it to loss_on. Chats of several turns have one for
            each answer.
        choices: candidate completions that are scored by log-likelihood; () if there are none.
        answer: index of the correct choice; None if there are no choices.
        score: target of a regression task (STS-B: 0..5); None in other tasks.
        end: text that ends the answer in a chat template; "" means the tokenizer's EOS.
        long_rows: "error", or "cut" to drop the start of a prompt that does not fit.
        origin: file and row, such as "train.jsonl: row 7", for error messages.
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
    learnt: tuple[tuple[int, int], ...] = ()

    @property
    def place(self) -> str:
        """File and row, else task and id, for error messages."""
        return self.origin or f"task '{self.task}', row {self.id}"
