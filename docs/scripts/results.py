"""Write the tables and figures of docs/results.md from the committed study.json files.

python docs/scripts/results.py [--page FILE] [--results FOLDER]

A question whose study is not there yet says how many cells are missing and what they would cost.
"""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import yaml

from rotmole.comparison.judgement import Judgement, read_judgement
from rotmole.comparison.pages import tables
from rotmole.comparison.pages.figures import forest
from rotmole.drawing import standalone

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "experiments" / "study"
RESULTS = STUDIES / "results"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "pictures"
GROWN = ROOT / "experiments" / "grow" / "results.json"


class Study(NamedTuple):
    """One study file of a question, and the minutes that one of its cells takes.

    Attributes:
        name: of the file in experiments/study.
        what: it does, in a few words.
        minutes: of one core with bfloat16 instructions, beside another cell.
    """

    name: str
    what: str
    minutes: float


QUESTIONS = {
    "q1": [Study("q1_screen", "the screen", 1.6)],
    "q2": [
        Study("q2_glue", "mixed GLUE", 8),
        Study("q2_qa", "mixed QA", 8),
        Study("q2_titles", "titles in ten languages", 8),
    ],
    "q3": [Study("q3", "few experts", 1.6)],
    "q4": [Study("q4_gates", "rates of the gates and the balance loss", 1.6)],
    "q6": [Study("q6_length", "four times the updates", 4.5)],
    "q7": [
        Study("q7a_tiny", "(a) many tasks, few parameters", 1.6),
        Study("q7b_contradictions", "(b) tasks that contradict each other", 1.6),
        Study("q7e_down", "(e) down_proj in place of attention", 1.6),
        Study("q7g_dense", "(g) dense gates around a LoRA", 1.6),
        Study("q7h_always_on", "(h) rotation on the always-on expert", 1.6),
    ],
}


def cells(study: dict[str, Any]) -> int:
    """Count the cells of a study file: tuning and final ones, the grid as it is before it grows."""
    tune = study.get("tune") or {}
    trials = prod(len(values) for values in (tune.get("grid") or {}).values()) if tune else 0
    return len(study["methods"]) * (trials * len(tune.get("seeds", [])) + len(study["seeds"]))


def missing(study: Study) -> str:
    """Say what a study that was not run would take."""
    content = yaml.safe_load((STUDIES / f"{study.name}.yaml").read_text(encoding="utf-8"))
    count = cells(content)
    hours = count * study.minutes / 60
    return (
        f"**Not run yet: {study.what}.** `rotmole compare experiments/study/{study.name}.yaml` has "
        f"{count} cells, about {hours:.1f} hours of one core."
    )


def table(judgement: Judgement) -> str:
    """Return scores, and the difference of each method to the baseline with its verdict."""
    nll = judgement.measures[0]
    lines = tables.overview(judgement)
    found = {line[0]: line[1:] for line in tables.differences(judgement, nll)[1:]}
    header = tables.differences(judgement, nll)[0][1:]
    joined = [[*lines[0], *header]]
    for line in lines[1:]:
        joined.append([*line, *found.get(line[0], ["baseline", *[""] * (len(header) - 1)])])
    return tables.markdown(joined)


def shown(study: Study, results: Path, pictures: Path) -> str:
    """Return a study's table and figure, or what is missing."""
    path = results / f"{study.name}.json"
    if not path.is_file():
        return missing(study)
    judgement = read_judgement(path)
    parts = [f"**{study.what.capitalize()}.** {judgement.headline}", table(judgement)]
    drawing = forest(judgement, judgement.measures[0])
    if drawing is not None:
        picture = f"results-{study.name}.svg"
        (pictures / picture).write_text(standalone(drawing.svg) + "\n", encoding="utf-8")
        parts.append(f"![{drawing.name}](pictures/{picture})\n\n{drawing.caption}")
    parts += [f"- {remark}" for remark in tables.remarks(judgement)]
    return "\n\n".join([*parts, tables.facts(judgement.facts)])


def forgetting() -> str:
    """Return Q5's table: exact match on old and new languages, mean over the seeds."""
    found = json.loads(GROWN.read_text(encoding="utf-8"))["cells"]
    names = {
        "mixture": "mixture on de, fr, es",
        "grown-frozen": "then grown on pl, old experts frozen",
        "lora": "LoRA on de, fr, es",
        "lora-on": "then trained on, on pl",
        "joint-lora": "LoRA on all four",
    }
    lines = [["", "seeds", "de, fr, es", "pl", "other text, nats"]]
    for name, words in names.items():
        rows = [cell for cell in found if cell["cell"] == name]
        old, new = (
            [
                mean(cell["scores"][language]["exact_match"] for language in languages)
                for cell in rows
            ]
            for languages in (("de", "fr", "es"), ("pl",))
        )
        figures = [f"{mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (old, new)]
        text = f"{mean(cell['text_nll'] for cell in rows):.2f}"
        lines.append([words, str(len(rows)), *figures, text])
    return tables.markdown(lines)


def page(text: str, results: Path = RESULTS, pictures: Path = PICTURES) -> str:
    """Return the page with every question's part between its two markers."""
    parts = {
        name: "\n\n".join(shown(study, results, pictures) for study in studies)
        for name, studies in QUESTIONS.items()
    }
    for name, body in (parts | {"q5": forgetting()}).items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise SystemExit(f"the page has no {start} ... {end}")
        text = f"{before}{start}\n{body}\n{end}{after}"
    return text


def main() -> None:
    """Write the page and its pictures."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--page", type=Path, default=PAGE)
    options.add_argument("--results", type=Path, default=RESULTS)
    given = options.parse_args()
    text = given.page.read_text(encoding="utf-8")
    given.page.write_text(page(text, given.results), encoding="utf-8")


if __name__ == "__main__":
    main()
