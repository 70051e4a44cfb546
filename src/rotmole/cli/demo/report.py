"""What the demo shows at its end, and demo.json."""

from __future__ import annotations

import json
from pathlib import Path

from rotmole.cli.demo.worker import Outcome
from rotmole.evaluation import Report, to_json
from rotmole.evaluation.render import print_table, rows
from rotmole.evaluation.report import prediction_rows
from rotmole.files import atomic_write_text

LORA, MIXTURE, OURS = ADAPTERS = "LoRA", "MoE-LoRA", "RotMoLE"
BEFORE, SHOWN = "before", "before, 3 examples"


def show(report: Report, outcomes: dict[str, Outcome], seconds: float) -> None:
    """Print the table, the cost, and a few answers.

    Args:
        report: of BEFORE, SHOWN and ADAPTERS.
        outcomes: by name of the adapter.
        seconds: wall time of the whole demo.
    """
    lines = rows(report, metrics=["exact_match"])
    print()
    # the title names the only metric, so its column is left out
    print_table(
        [[line[0], line[1], line[3], *line[4:]] for line in lines],
        title="exact match [95 % interval]",
    )
    print()
    for name in ADAPTERS:
        outcome = outcomes[name]
        print(
            f"{name:<9} {outcome.trainable_parameters:>9,} trainable parameters, trained in "
            f"{outcome.seconds:.0f} s, answered in {outcome.systems[name].seconds:.0f} s"
        )
    print(f"all in {seconds:.0f} s")
    mixtures = (MIXTURE, OURS)
    unused = [f"{name} {' of '.join(map(str, outcomes[name].unused))}" for name in mixtures]
    print(
        f"experts that no token of the last logged update chose: {', '.join(unused)} (there are "
        "few rows, and no balance loss is on: adapter.router_aux_loss_coef)"
    )
    print()
    show_answers(report)
    print(
        "\nOne seed decides nothing: with another seed the adapters may change places. "
        "`rotmole compare` decides by several."
    )
    for name in mixtures:
        page, words = outcomes[name].report
        print(f"\n{name}: {words}" + (f"\n  report: {page}" if page is not None else ""))


def show_answers(report: Report) -> None:
    """Print one test row of each task with the correct answer and that of each system."""
    for task, examples in report.systems[BEFORE].examples.items():
        index = len(examples) // 2
        print(f"{task}: {examples[index].prompt.strip()}")
        print(f"  {'correct answer':<20} {examples[index].completion.strip()}")
        for name, system in report.systems.items():
            print(f"  {name:<20} {(system.answers[task][index].text or '')[:100]}")


def write(path: Path, report: Report, outcomes: dict[str, Outcome], seconds: float) -> None:
    """Write demo.json: overall exact match, its rise, the cost, and the whole report.

    Args:
        report: of BEFORE, SHOWN and ADAPTERS.
        outcomes: by name of the adapter.
        seconds: wall time of the whole demo.
    """
    overall = {n: system.overall["exact_match"].value for n, system in report.systems.items()}
    content = {
        "exact_match": overall,
        "rise": {name: overall[name] - overall[BEFORE] for name in ADAPTERS},
        "trainable_parameters": {n: o.trainable_parameters for n, o in outcomes.items()},
        "training_seconds": {n: round(o.seconds, 1) for n, o in outcomes.items()},
        "seconds": round(seconds, 1),
        "report": {**to_json(report), "predictions": list(prediction_rows(report))},
    }
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
