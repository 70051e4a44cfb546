"""Write docs/results.md from the committed study.json files, and what README.md quotes of it.

python docs/scripts/results.py [--page FILE] [--readme FILE] [--results FOLDER]

Every study's own tables and figures, those that `rotmole compare` writes, come into a folder beside
its file: NAME.json -> NAME/study.md and NAME/figures. The page has the answer in ten sentences
(answers.py), and a table and a figure for each study. A question whose study is not there yet says
how many cells are missing and what they would cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rotmole.comparison.judgement import FEW, Judgement, read_judgement
from rotmole.comparison.pages import tables
from rotmole.comparison.pages.figures import convergence, forest
from rotmole.comparison.pages.page import drawn, write_text
from rotmole.comparison.results import NLL
from rotmole.comparison.scores import HELD_OUT, OWN
from rotmole.drawing import standalone
from rotmole.units import count_word

sys.path.insert(0, str(Path(__file__).parent))
from answers import answers
from result_parts import few_experts, forgetting, look_inside, price

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "experiments" / "study"
RESULTS = STUDIES / "results"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "pictures"
README = ROOT / "README.md"
QUOTED = (0, 1, 6)
"""Places of the sentences of the answer that README.md quotes."""
CONVERGENCE = ("q2_glue", "q2_qa", "q2_titles")
"""Studies whose validation loss while training is drawn too, as in RotMoLE's figures 3, 5 and 6."""
GROWN = ROOT / "experiments" / "grow" / "results.json"


class Study(NamedTuple):
    """One study file of a question, and the minutes that one of its cells takes.

    Attributes:
        name: of the file in experiments/study.
        what: it does, in a few words.
        minutes: of one core beside another cell, where it has bfloat16 instructions; of titles by
            chrF without.
        tuned_by: the study file that tuned the rates, where it is another one.
        drawn: the measure of its figure of differences.
    """

    name: str
    what: str
    minutes: float
    tuned_by: str = ""
    drawn: str = NLL


QUESTIONS = {
    "q1": [
        Study("q1_screen", "the screen", 1.2),
        Study("q1", "the finalists", 1.7),
        Study("locale_match", "by the tasks' own metric", 1.7, "the studies above, Q3 and Q7", OWN),
    ],
    "q2": [
        Study("q2_glue", "mixed GLUE", 4),
        Study("q2_qa", "mixed QA", 4),
        Study("q2_qa_again", "mixed QA again, with new seeds", 4, "q2_qa.yaml", HELD_OUT),
        Study("q2_titles", "titles in nine languages", 4),
        Study("q2_titles_chrf", "titles again, by chrF", 20, "q2_titles.yaml", OWN),
    ],
    "q3": [Study("q3", "few experts", 1.6)],
    "q4": [Study("q4_gates", "rates of the gates and the balance loss", 1.6)],
    "q6": [Study("q6_length", "four times the updates", 4.5)],
    "q7": [
        Study("q7a_tiny", "(a) many tasks, few parameters", 1.6),
        Study("q7a_match", "(a) by the tasks' own metric", 1.6, "q7a_tiny.yaml", OWN),
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


def missing(study: Study, judgement: Judgement | None = None) -> str:
    """Say what a study that was not run would take, or the cells of it that were not.

    Args:
        study: with the minutes of a cell.
        judgement: of the cells that were run; None where there are none.

    Returns:
        A sentence; "" where no cell is missing.
    """
    if judgement is None:
        content = yaml.safe_load((STUDIES / f"{study.name}.yaml").read_text(encoding="utf-8"))
        count = cells(content)
        which = f"{count} cells"
    else:
        count = len(judgement.missing)
        methods = dict.fromkeys(name.split("/")[2] for name in judgement.missing)
        which = f"{count} cells left ({', '.join(methods)})"
    if not count:
        return ""
    hours = count * study.minutes / 60
    return (
        f"**Not run yet: {study.what}.** `rotmole compare experiments/study/{study.name}.yaml` "
        f"has {which}, about {hours:.1f} hours of one core."
    )


def table(judgement: Judgement) -> str:
    """Return scores, and the difference of each method to the baseline with its verdict."""
    nll = judgement.measures[0]
    lines = tables.overview(judgement)
    if not judgement.seeds:  # a screen: no interval and no verdict
        return tables.markdown([lines[0], *sorted(lines[1:], key=lambda line: line[-1])])
    found = {line[0]: line[1:] for line in tables.differences(judgement, nll)[1:]}
    header = tables.differences(judgement, nll)[0][1:]
    joined = [[*lines[0], *header]]
    for line in lines[1:]:
        own = ["baseline" if title == "difference" else "" for title in header]
        joined.append([*line, *found.get(line[0], own)])
    for measure in judgement.measures[1:]:
        head, *body = tables.differences(judgement, measure)
        apart = {line[0]: line[head.index("difference")] for line in body}
        what = "held-out tasks" if measure.name == HELD_OUT else measure.label
        joined[0].append(f"difference, {what}")
        for line in joined[1:]:
            line.append(apart.get(line[0], ""))
    return tables.markdown(joined)


def shown(study: Study, results: Path, pictures: Path) -> str:
    """Return a study's table and figure, and what is missing."""
    path = results / f"{study.name}.json"
    if not path.is_file():
        return missing(study)
    judgement = read_judgement(path)
    headline = judgement.headline[0].upper() + judgement.headline[1:]
    if study.tuned_by:
        few = any(d.verdict == FEW for d in judgement.differences)
        claims = ": intervals, no claims" if few else f", {judgement.claims} claims"
        seeds = count_word(len(judgement.seeds))
        headline = f"Rates tuned by {study.tuned_by}, {seeds} seeds{claims}"
    parts = [f"**{study.what[0].upper()}{study.what[1:]}.** {headline}.", table(judgement)]
    (judged,) = (measure for measure in judgement.measures if measure.name == study.drawn)
    drawings = {"": forest(judgement, judged)}
    if study.name in CONVERGENCE:
        drawings["-convergence"] = convergence(judgement, "update")
    for ending, drawing in drawings.items():
        if drawing is None:
            continue
        picture = f"results-{study.name}{ending}.svg"
        (pictures / picture).write_text(standalone(drawing.svg) + "\n", encoding="utf-8")
        parts.append(f"![{drawing.name}](pictures/{picture})\n\n{drawing.caption}")
    parts.append("\n".join(f"- {remark}" for remark in tables.remarks(judgement)))
    parts.append(tables.facts(judgement.facts))
    return "\n\n".join(part for part in [*parts, missing(study, judgement)] if part)


def known(results: Path) -> dict[str, Judgement]:
    """Return the finished studies: name of the study file -> its judgement."""
    return {
        study.name: read_judgement(path)
        for group in QUESTIONS.values()
        for study in group
        if (path := results / f"{study.name}.json").is_file()
    }


def inside(results: Path) -> dict[str, Any] | None:
    """Read what experiments/study/q4_inside.py has measured."""
    path = results / "q4_inside.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def grown() -> list[dict[str, Any]]:
    """Read the cells of experiments/grow."""
    cells: list[dict[str, Any]] = json.loads(GROWN.read_text(encoding="utf-8"))["cells"]
    return cells


def sentences(results: Path = RESULTS) -> list[str]:
    """Return the ten sentences of the answer."""
    return answers(known(results), inside(results), grown())


def filled(text: str, parts: dict[str, str]) -> str:
    """Put each part between its two markers.

    Raises:
        SystemExit: a marker is missing.
    """
    for name, body in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise SystemExit(f"the page has no {start} ... {end}")
        text = f"{before}{start}\n{body}\n{end}{after}"
    return text


def page(text: str, results: Path = RESULTS, pictures: Path = PICTURES) -> str:
    """Return the page with the answer, and every question's part between its two markers."""
    numbered = [f"{n}. {line}" for n, line in enumerate(sentences(results), start=1)]
    parts = {"answer": "\n".join(numbered)}
    for name, files in QUESTIONS.items():
        parts[name] = "\n\n".join(shown(study, results, pictures) for study in files)
    studies = known(results)
    if "q3" in studies:
        again = studies.get("locale_match")
        parts["q3"] += f"\n\n{few_experts(studies['q3'], again, pictures)}"
    parts["q4"] += f"\n\n{look_inside(inside(results), pictures)}"
    parts |= {"q5": forgetting(grown(), pictures), "price": price(studies)}
    return filled(text, parts)


def write_studies(results: Path = RESULTS, to: Path = RESULTS) -> None:
    """Write the tables and figures of every finished study, and those of Q4 and Q5 that have none.

    Args:
        results: folder of the studies' files.
        to: folder that gets a folder for each.
    """
    studies = known(results)
    for name, judgement in studies.items():
        write_text(judgement, to / name, name, drawn(judgement))
    others = {
        "q4_inside": partial(look_inside, inside(results)),
        "q5": partial(forgetting, grown()),
    }
    if "q3" in studies:
        others["q3_experts"] = partial(few_experts, studies["q3"], studies.get("locale_match"))
    for name, written in others.items():
        pictures = to / name / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        text = f"# {name}\n\n{written(pictures)}\n"
        (to / name / "study.md").write_text(text, encoding="utf-8")


def quoted(readme: str, results: Path = RESULTS) -> str:
    """Return README.md with sentences of the answer between its two markers."""
    said = sentences(results)
    return filled(readme, {"results": "\n".join(f"- {said[n]}" for n in QUOTED)})


def main() -> None:
    """Write the page and its pictures, README.md's quotation, and the studies' own folders."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--page", type=Path, default=PAGE)
    options.add_argument("--readme", type=Path, default=README)
    options.add_argument("--results", type=Path, default=RESULTS)
    given = options.parse_args()
    for path, write in ((given.page, page), (given.readme, quoted)):
        text = path.read_text(encoding="utf-8")
        path.write_text(write(text, given.results), encoding="utf-8")
    write_studies(given.results, given.results)


if __name__ == "__main__":
    main()
