"""Parts of docs/results.md that the studies' own tables have not: Q3 by E and K, Q4, Q5, price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from answers import FEW_EXPERTS, OLD, difference, gap, name_of, written

from rotmole.comparison.judgement import Judgement, Measure
from rotmole.comparison.pages import tables
from rotmole.comparison.results import NLL
from rotmole.comparison.scores import OWN
from rotmole.drawing import INK, draw, legend, series, standalone

Cell = Mapping[str, Any]
RUNS = {
    "mixture": "mixture on de, fr, es",
    "grown-frozen": "then grown on pl, old experts frozen",
    "lora": "LoRA on de, fr, es",
    "lora-on": "then trained on, on pl",
    "joint-lora": "LoRA on all four",
}
DEVICES = {"cpu": "one core", "cuda": "a GPU, shared by 16"}


def forgetting(cells: Sequence[Cell], pictures: Path) -> str:
    """Return Q5's table and figure: exact match on old and new languages, by run.

    Args:
        cells: of experiments/grow/results.json.
        pictures: folder of the figure.
    """
    lines = [["", "seeds", "de, fr, es", "pl", "other text, nats"]]
    drawn: dict[str, list[list[float]]] = {"de, fr, es": [], "pl": []}
    for name, words in RUNS.items():
        rows = [cell for cell in cells if cell["cell"] == name]
        for languages, values in drawn.items():
            names = languages.split(", ")
            values.append([mean(c["scores"][n]["exact_match"] for n in names) for c in rows])
        figures = [
            f"{mean(v[-1]):.2f} ({min(v[-1]):.2f} to {max(v[-1]):.2f})" for v in drawn.values()
        ]
        text = f"{mean(cell['text_nll'] for cell in rows):.2f}"
        lines.append([words, str(len(rows)), *figures, text])

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (languages, runs) in enumerate(drawn.items()):
            style = series(index) | {"linestyle": ""}
            at = [place + 0.16 * (2 * index - 1) for place in range(len(runs))]
            for place, values in zip(at, runs, strict=True):
                axes.plot([min(values), max(values)], [place] * 2, color=style["color"], lw=1.6)
            axes.plot([mean(values) for values in runs], at, label=languages, **style)
        axes.set_yticks(range(len(RUNS)), RUNS.values())
        axes.invert_yaxis()
        axes.set(xlabel="exact match", title="Kept and learnt")
        axes.set_xlim(left=0)
        legend(figure, axes)

    label = "Exact match on the old languages and on the new one"
    _write(pictures, "results-q5", draw(paint, name="q5", label=label, height=2.9))
    caption = "Mean over seeds; line: from the lowest to the highest seed."
    beside = [["difference in exact match", "de, fr, es", "pl"]]
    for other, words in (
        ("lora-on", "LoRA that is trained on"),
        ("joint-lora", RUNS["joint-lora"]),
    ):
        gaps = [written(gap(cells, "grown-frozen", other, names)) for names in (OLD, ["pl"])]
        beside.append([f"grown mixture minus {words}", *gaps])
    note = (
        "Paired by seed, with 95 % intervals over seeds (Student's t); too few seeds for a claim."
    )
    figure = f"![{label}](pictures/results-q5.svg)\n\n{caption}"
    return f"{tables.markdown(lines)}\n\n{tables.markdown(beside)}\n\n{note}\n\n{figure}"


WAYS = ("none", "rotation gates", "RadarGate's pairs")


def _by_experts(study: Judgement, measure: Measure) -> str:
    """Return a table of the scores with and without rotation, by E and K."""
    lines = [["E, K", WAYS[0], WAYS[1], "rotation minus none", WAYS[2], "pairs minus none"]]
    for (experts, chosen), names in FEW_EXPERTS.items():
        scores = [study.score(name, measure.name) if name else None for name in names]
        if scores[:2] == [None, None]:  # the study has no such forms
            continue
        cells = ["" if s is None else tables.figure(measure, s.value) for s in scores]
        apart = (difference(study, n, names[0], measure.name) if n else None for n in names[1:])
        turned, pairs = (written(found) if found is not None else "" for found in apart)
        lines.append([f"{experts}, {chosen}", *cells[:2], turned, cells[2], pairs])
    return tables.markdown(lines)


def few_experts(study: Judgement, again: Judgement | None, pictures: Path) -> str:
    """Return Q3's tables and figure: scores with and without rotation, by E and K.

    Args:
        study: the judgement of q3.yaml.
        again: that of locale_match.yaml, which has the same methods' own metric.
        pictures: folder of the figure.
    """
    drawn: dict[str, list[tuple[int, list[float]]]] = {}
    for (experts, chosen), names in FEW_EXPERTS.items():
        for way, name in zip(WAYS, names, strict=True):
            score = study.score(name, NLL) if name and experts > 1 else None
            if score is not None:
                values = [value for value in score.by_seed.values() if value is not None]
                drawn.setdefault(f"{way}, K = {chosen}", []).append((experts, values))
    base = study.score(study.baseline, NLL)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        if base is not None and base.value is not None:
            axes.axhline(base.value, color=INK, lw=1, ls="--", label=name_of(study.baseline))
        for index, (way, points) in enumerate(drawn.items()):
            style = series(index)
            at = [experts * 1.02 ** (index - len(drawn) / 2) for experts, _ in points]
            axes.plot(at, [mean(values) for _, values in points], label=way, **style)
            for place, (_, values) in zip(at, points, strict=True):
                axes.plot([place] * 2, [min(values), max(values)], color=style["color"], lw=1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8], ["2", "4", "8"])
        axes.minorticks_off()
        axes.set(xlabel="experts", ylabel="NLL", title="Few experts")
        legend(figure, axes)

    label = "NLL by the number of experts, with and without rotation"
    _write(pictures, "results-q3-experts", draw(paint, name="q3e", label=label, height=3.6))
    caption = (
        "One expert without rotation is LoRA (dashed). Point: mean over seeds; line: from the "
        "lowest to the highest seed. Differences in the tables are paired by seed."
    )
    picture = f"![{label}](pictures/results-q3-experts.svg)"
    parts = ["**By number of experts, NLL.**", _by_experts(study, study.measures[0])]
    parts += [picture, caption]
    own = [m for m in again.measures if m.name == OWN] if again is not None else []
    if again is not None and own:
        title = f"**By number of experts, {own[0].label}, of `locale_match.yaml` (Q1).**"
        parts += [title, _by_experts(again, own[0])]
    return "\n\n".join(parts)


def look_inside(found: Mapping[str, Cell] | None, pictures: Path) -> str:
    """Return the table and the figure of what experiments/study/q4_inside.py has measured.

    Args:
        found: "METHOD/seed-N" -> figures; None if it was not run.
        pictures: folder of the figure.
    """
    if found is None:
        return (
            "**Not run yet: inside the finalists.** `python experiments/study/q4_inside.py` reads "
            "the finished adapters of `experiments/study/q4_inside.yaml`, which are cells of Q1."
        )
    by_method: dict[str, list[Cell]] = {}
    for name, cell in found.items():
        by_method.setdefault(name.partition("/")[0], []).append(cell)
    lines = [[
        "", "seeds", "answers, NLL", "rotation off", "routing uniform", "no adapter",
        "static, rank 8", "static, rank 16", "mean angle by task",
    ]]  # fmt: skip
    for method, cells in by_method.items():
        answers = [cell["answers"] for cell in cells]
        added = [
            f"{mean(a[part] - a['trained'] for a in answers):+.3f}"
            if all(a[part] is not None for a in answers)
            else ""
            for part in ("rotation_off", "uniform", "base")
        ]
        shares = [f"{mean(cell['static'][rank] for cell in cells):.1%}" for rank in ("8", "16")]
        trained = f"{mean(a['trained'] for a in answers):.3f}"
        lines.append([name_of(method), str(len(cells)), trained, *added, *shares, _angles(cells)])

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        for index, (method, cells) in enumerate(by_method.items()):
            ranks = [int(rank) for rank in cells[0]["static"]]
            shares = [[cell["static"][str(rank)] for cell in cells] for rank in ranks]
            style = series(index)
            axes.plot(ranks, list(map(mean, shares)), label=name_of(method), **style)
            low, high = list(map(min, shares)), list(map(max, shares))
            axes.fill_between(ranks, low, high, color=style["color"], alpha=0.18, lw=0)
        axes.set_xticks(ranks, list(map(str, ranks)))
        axes.minorticks_off()
        axes.set(xlabel="rank of the static map", ylabel="share", title="What is static")
        legend(figure, axes)

    label = "Share of what the adapter adds that a static LoRA explains, by rank"
    _write(pictures, "results-q4_inside", draw(paint, name="q4i", label=label, height=3.3))
    caption = (
        "Static: share of the added power that the best static LoRA of a rank explains on test "
        "rows. Line: mean over seeds; band: from the lowest to the highest seed."
    )
    note = (
        'Columns "off", "uniform" and "no adapter": what the answers\' NLL rises by. Angle: mean '
        "absolute angle in radians, from the least to the most turned task and language."
    )
    picture = f"![{label}](pictures/results-q4_inside.svg)"
    made = tables.facts(next(iter(found.values()))["made"])
    parts = ["**Inside the finalists.**", tables.markdown(lines), note, picture, caption, made]
    return "\n\n".join(parts)


def _angles(cells: Sequence[Cell]) -> str:
    """Return the least and the largest mean angle of a task, the mean over the seeds."""
    tasks = [task for task in cells[0]["angles"] if task != "all"]
    angles = [
        mean(cell["angles"][task] for cell in cells)
        for task in tasks
        if all(cell["angles"][task] is not None for cell in cells)
    ]
    return f"{min(angles):.2f} to {max(angles):.2f}" if angles else ""


def price(studies: Mapping[str, Judgement]) -> str:
    """Return what the finished studies took, by the clock of their training.

    Args:
        studies: name of the study file -> its judgement.
    """
    lines = [["study", "cells", "device", "minutes of training a cell", "hours, one by one"]]
    whole: dict[str, float] = {}
    for name, study in studies.items():
        seconds = [s for by_seed in study.clock.seconds.values() for s in by_seed.values()]
        final = sum(len(method.seeds) for method in study.methods) if study.seeds else 0
        count = len(study.trials) + final
        hours = count * median(seconds) / 3600
        device = DEVICES[str(study.facts["device"])]
        whole[device] = whole.get(device, 0.0) + hours
        minutes = f"{median(seconds) / 60:.1f}"
        lines.append([f"{name}.yaml", str(count), device, minutes, f"{hours:.1f}"])
    lines += [["together", "", device, "", f"{hours:.1f}"] for device, hours in whole.items()]
    return (
        f"{tables.markdown(lines)}\n\nCells that a study shares with another are counted in both. "
        "Hours: the median of the judged cells times all cells, if one ran after the other; "
        "loading and scoring come on top, about a third. Nothing here is a measure of speed: two "
        "cells ran side by side on two cores, which did other work as well, and sixteen on a card."
    )


def _write(pictures: Path, name: str, svg: str) -> None:
    (pictures / f"{name}.svg").write_text(standalone(svg) + "\n", encoding="utf-8")
