from __future__ import annotations

import io

import pytest
from evaluation_cases import choice_rows, text_rows
from rich.console import Console

from rotmole.evaluation.metrics import Answer
from rotmole.evaluation.render import (
    footnotes,
    format_measure,
    plain_text,
    print_lines,
    print_table,
    rich_table,
    rows,
)
from rotmole.evaluation.report import Measure, compare, summarise

METRICS = {"film": ["exact_match"], "animals": ["choice_accuracy"]}
EXAMPLES = {"film": text_rows(4), "animals": choice_rows(4)}


def system(texts: str, seconds: float = 1.0):
    answers = {
        "film": [Answer(text="good" if letter == "+" else "bad") for letter in texts],
        "animals": [Answer(log_likelihoods=(0.0, -1.0, -1.0, -1.0))] * 4,
    }
    return summarise(EXAMPLES, answers, METRICS, seconds=seconds, seed=0)


def test_before_beside_after():
    report = compare({"before": system("+---"), "after": system("+++-", 2.0)}, {"split": "test"})
    lines = rows(report)
    assert lines[0] == ["task", "group", "metric", "rows", "before", "after", "difference"]
    assert [line[:4] for line in lines[1:]] == [
        ["film", "", "exact_match", "4"],
        ["animals", "", "choice_accuracy", "4"],
        ["animals", "even", "choice_accuracy", "2"],
        ["animals", "odd", "choice_accuracy", "2"],
        ["overall", "", "exact_match", "4"],
        ["overall", "", "choice_accuracy", "4"],
    ]
    assert lines[1][4].startswith("0.250 [0.046, ")
    assert lines[1][6].startswith("+0.500 [+0.000, ")
    assert lines[3][6] == "+0.000 [+0.000, +0.000]"
    text = "\n".join(footnotes(report))
    assert "before 1.0 s, after 2.0 s" in text
    assert "split test" in text


def test_many_systems_and_chosen_metrics():
    report = compare({"a": system("+---"), "b": system("++--"), "c": system("+++-")})
    lines = rows(report, metrics=["exact_match"])
    assert lines[0] == ["task", "group", "metric", "rows", "a", "b", "c"]
    assert {line[2] for line in lines[1:]} == {"exact_match"}
    assert list(report.differences) == ["b", "c"]


def test_plain_columns_line_up():
    text = plain_text(rows(compare({"base": system("+++-")})))
    assert len({line.index("0.") for line in text.splitlines()[1:]}) == 1
    assert "\x1b" not in text


def test_brackets_survive_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    console.print(rich_table(rows(compare({"base": system("+++-")})), title="t"))
    assert "0.750 [0.301, 0.954]" in console.file.getvalue()


def test_figures_that_are_not_finite_are_a_dash():
    measure = Measure(float("nan"), 1.0, float("inf"), 3)
    assert format_measure("perplexity", measure) == "- [1.00, -]"
    assert format_measure("chrf", Measure(41.25, 40.0, 43.0, 3)) == "41.2 [40.0, 43.0]"
    signed = format_measure("pearson", Measure(0.5, -0.25, 1.0, 3), signed=True)
    assert signed == "+0.500 [-0.250, +1.000]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that returns what `show` prints on a terminal of some width, in lines."""

    def call(show, width: int) -> list[str]:
        screen = Terminal()
        monkeypatch.setattr("sys.stdout", screen)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
        show()
        return screen.getvalue().splitlines()

    return call


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_broken(terminal, width):
    lines = rows(compare({"before": system("+---"), "after": system("+++-")}))
    printed = terminal(lambda: print_table(lines, title="figures"), width)
    assert max(map(len, printed)) <= width
    text = "\n".join(printed)
    figures = [part for line in lines[1:] for cell in line[4:] for part in cell.split(" ", 1)]
    assert all(figure in text for figure in figures)
    assert "choice_accuracy" in text
    assert "\x1b" not in text
    if width >= 120:  # a line for each line, and the header and borders
        assert all("".join(cell.strip() for cell in line.split("\u2502")) for line in printed)


def test_a_pipe_gets_one_line_for_each_line(capsys):
    lines = rows(compare({"before": system("+---"), "after": system("+++-")}))
    print_table(lines)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)


def test_sentences_are_wrapped_at_words(terminal):
    sentence = "settings: " + ", ".join(f"setting_{i} {i}" for i in range(20))
    printed = terminal(lambda: print_lines([sentence]), 80)
    assert max(map(len, printed)) <= 80
    assert " ".join(line.strip() for line in printed) == sentence
