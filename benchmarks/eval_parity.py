"""Does `rotmole eval` agree with the language model evaluation harness on multiple choice?

    pip install lm-eval
    python benchmarks/eval_parity.py --data FOLDER [--rows 100] [--model NAME | --adapter RUN]

FOLDER holds validation.jsonl with the columns question, choices (a list) and answer (an index).
Both score the same rows with the same model object; the harness reads them through a local YAML
task, so no hub is needed. Our choice_accuracy is the harness's acc, and our choice_accuracy_norm is
its acc_bytes (log-likelihood per UTF-8 byte). Its acc_norm divides by characters instead, which
is the same if a choice is ASCII.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from rotmole.config.schema import EvaluationSection, ModelSection
from rotmole.data.examples import Example
from rotmole.evaluation import measure
from rotmole.evaluation.target import find_target, load_target
from rotmole.files import atomic_write_text
from rotmole.models.load import load_model

TASK = """\
task: parity
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
PAIRS = (
    ("choice_accuracy", "acc"),
    ("choice_accuracy_norm", "acc_bytes"),
    ("choice_accuracy_norm", "acc_norm"),
)


def harness(model, tokenizer, rows: list[dict], batch_size: int):
    """The harness's figures, and its log-likelihoods row by row."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (Path(folder) / "parity.yaml").write_text(TASK.format(path=data), encoding="utf-8")
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=["parity"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    figures = {name.split(",")[0]: value for name, value in found["results"]["parity"].items()}
    samples = sorted(found["samples"]["parity"], key=lambda sample: sample["doc_id"])
    return figures, [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]


def ours(model, tokenizer, rows: list[dict], batch_size: int):
    """Our figures, and our log-likelihoods row by row."""
    examples = [
        Example(
            task="parity",
            group="",
            id=str(index),
            prompt=f"Question: {row['question']}\nAnswer:",
            completion=" " + row["choices"][row["answer"]],
            choices=tuple(" " + choice for choice in row["choices"]),
            answer=row["answer"],
        )
        for index, row in enumerate(rows)
    ]
    wanted = {"parity": ["choice_accuracy", "choice_accuracy_norm"]}
    section = EvaluationSection(batch_size=batch_size)
    system = measure(model, tokenizer, {"parity": examples}, section, metrics_by_task=wanted)
    figures = {name: measured.value for name, measured in system.cells[0].metrics.items()}
    return figures, [answer.log_likelihoods for answer in system.answers["parity"]]


def main() -> int:
    """Print and optionally save the comparison; 1 where a figure differs in three decimals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with validation.jsonl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", type=Path, help="run or adapter folder, put on its own base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--csv", type=Path, help="also write the comparison here")
    arguments = parser.parse_args()
    with (arguments.data / "validation.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for _, line in zip(range(arguments.rows), stream, strict=False)]
    scored = "base"
    if arguments.adapter is None:
        loaded = load_model(ModelSection(name=arguments.model, dtype=arguments.dtype))
    else:
        override = [f"model.dtype={arguments.dtype}"]
        loaded = load_target(find_target(arguments.adapter, overrides=override, needs_data=False))
        scored = loaded.model.peft_config["default"].peft_type.value
    our_figures, our_values = ours(loaded.model, loaded.tokenizer, rows, arguments.batch_size)
    its_figures, its_values = harness(loaded.model, loaded.tokenizer, rows, arguments.batch_size)
    differences = [
        float(np.abs(np.subtract(ours_row, its_row)).max())
        for ours_row, its_row in zip(our_values, its_values, strict=True)
    ]
    lines = [["set", "rows", "ours", "value", "harness", "value", "equal to three decimals"]]
    for name, its_name in PAIRS:
        equal = round(our_figures[name], 3) == round(its_figures[its_name], 3)
        values = [name, f"{our_figures[name]:.4f}", its_name, f"{its_figures[its_name]:.4f}"]
        lines.append([arguments.data.name, len(rows), *values, equal])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    comment = (
        f"# {platform.machine()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, lm-eval {version('lm_eval')}, "
        f"model {arguments.model} {arguments.dtype}, {scored}; "
        f"largest difference of a log-likelihood {max(differences):.2e}\n"
    )
    sys.stdout.write(comment + buffer.getvalue())
    if arguments.csv:
        atomic_write_text(arguments.csv, comment + buffer.getvalue())
    return int(not all(line[-1] for line in lines[1:3]))


if __name__ == "__main__":
    raise SystemExit(main())
