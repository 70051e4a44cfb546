"""Model cards of what is exported: how it is loaded, what it loses, its scores with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from rotmole import __version__
from rotmole.config.schema import RunFile
from rotmole.config.yaml_text import write_yaml
from rotmole.errors import InputError
from rotmole.evaluation.render import format_measure
from rotmole.evaluation.report import Measure, to_json
from rotmole.export.lora import Verdict
from rotmole.tuner.card import header, hub_id, shown_name

BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"
_SECTIONS = ("seed", "adapter", "optimizer", "training")


def with_scores(card: str, run: RunFile | None, scores: Mapping[str, Any] | None) -> str:
    """Return a card with a part on its run and its scores, which replaces an earlier such part.

    Args:
        card: Markdown.
        run: its settings of adapter, optimizer and training are shown; paths are not.
        scores: eval.json of the adapter.
    """
    before, _, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [*_settings(run), *_scores(scores)]
    if not lines:
        return card
    text = "\n".join([BEGIN, *lines, END])
    return f"{before.rstrip()}\n\n{text}\n{after.lstrip()}"


def _settings(run: RunFile | None) -> Iterator[str]:
    if run is None:
        return
    shown = {name: getattr(run, name) for name in _SECTIONS}
    shown["optimizer"] = run.optimizer.model_dump(exclude_none=True)
    chosen = {name: value for name, value in shown.items() if value not in ({}, None)}
    yield "Trained with `rotmole train run.yaml`, whose run file says, beside model and data:\n"
    yield f"```yaml\n{write_yaml(chosen).rstrip()}\n```\n"


def _scores(scores: Mapping[str, Any] | None) -> Iterator[str]:
    if scores is None:
        return
    split = scores["settings"].get("split")
    yield f"Scores on the split {split}, with 95 % intervals over its rows, by `rotmole eval`:\n"
    yield from scores_table(scores)
    if scores.get("chosen_on_these_rows"):
        yield "\nThe same rows chose the checkpoint, so these scores are a little too good."
    if scores.get("note"):
        yield f"\nBase model: {scores['note']}."


def scores_table(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of an evaluation, as `to_json` returns it."""
    systems = scores["systems"]
    yield f"| task | metric | rows | {' | '.join(systems)} |"
    yield "|---" * (3 + len(systems)) + "|"
    first = next(iter(systems.values()))
    for task, cell in first["tasks"].items():
        for metric in cell["metrics"]:
            measures = [system["tasks"][task]["metrics"][metric] for system in systems.values()]
            figures = [format_measure(metric, _measure(values)) for values in measures]
            yield f"| {task} | {metric} | {measures[0]['n']} | {' | '.join(figures)} |"


def _measure(values: Mapping[str, Any]) -> Measure:
    """Return a figure of eval.json, in which one that is not finite is null."""
    names = ("value", "low", "high")
    ends = [float("nan") if values[name] is None else values[name] for name in names]
    return Measure(ends[0], ends[1], ends[2], values["n"])


def read_scores(file: Path) -> dict[str, Any] | None:
    """Read eval.json; None if there is none.

    Raises:
        InputError: the file is none that `rotmole eval` wrote.
    """
    if not file.is_file():
        return None
    try:
        scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        list(scores_table(scores))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{file} is no file of `rotmole eval`; run that again.") from error
    return scores


def lora_card(base: str | None, verdict: Verdict, *, built_in: str | None = None) -> str:
    """Write the card of a static LoRA: it loads in plain PEFT; what it loses is said.

    Args:
        base: name or path of the base model.
        built_in: name of the built-in model that it was fitted on, if it was one.
    """
    lines = [header(base).replace("- rotmole\n", "- lora\n- rotmole\n")]
    lines.append(f"# Static LoRA for {shown_name(base)}\n")
    if verdict.exact:
        lines.append("It computes what the adapter computes that it was exported from.\n")
    else:
        lines.append(
            f"The LoRA of rank {verdict.rank} that is nearest to a mixture of low-rank experts "
            f"(rotmole {__version__}). The mixture itself adds another map for each token; what "
            "this LoRA loses stands below.\n"
        )
    lines.append(_LOADING.format(base=shown_name(base)))
    if built_in is not None:
        lines.append(
            f"It was fitted on rotmole's built-in {built_in}, whose weights were rounded to 4 "
            "bits.\n"
        )
    lines.append("\n".join(_verdict(verdict)))
    return "\n".join(lines).rstrip() + "\n"


def onnx_card(base: str | None, difference: float) -> str:
    """Write the card of an ONNX graph.

    Args:
        base: name or path of the base model.
        difference: the largest between onnxruntime's logits and torch's.
    """
    data = ModelCardData(
        base_model=hub_id(base), library_name="onnx", pipeline_tag="text-generation",
        tags=["onnx", "rotmole"],
    )  # fmt: skip
    return _ONNX.format(
        header=data.to_yaml(), base=shown_name(base), version=__version__, difference=difference
    )


def _verdict(verdict: Verdict) -> Iterator[str]:
    if verdict.agreements:
        yield "| tokens of | number | KL from the mixture, nats | same likeliest token |"
        yield "|---|---|---|---|"
        for part, value in verdict.agreements.items():
            yield f"| {part} | {value.tokens} | {value.kl:.4f} | {value.same:.3f} |"
        yield ""
    if verdict.report is not None:
        yield f"Tasks, split {verdict.split}, with 95 % intervals over the rows:\n"
        yield from scores_table(to_json(verdict.report))


_LOADING = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
adapter = "path/to/this/folder"  # or its hub id
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
```
"""

_ONNX = """---
{header}
---

# {base} with a mixture of low-rank experts, as an ONNX graph

model.onnx takes input_ids and attention_mask, int64 [batch, length] of any size, and returns
logits, float32 [batch, length, vocabulary]. It has no key-value cache. It was written by rotmole
{version}; onnxruntime's logits differed from PyTorch's by {difference:.1e} at most.
"""
