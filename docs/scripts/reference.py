"""Write docs/reference.md: every key of the run file and of RotMoleConfig.

    python docs/scripts/reference.py [FILE]

Types, defaults, ranges, meanings and examples are those of the code: rotmole.config.schema,
rotmole.config.training and rotmole.tuner.settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rotmole.config import adapter, training
from rotmole.config.fields import describe
from rotmole.config.peft_types import OURS
from rotmole.config.schema import (
    DataSection,
    EvaluationSection,
    ExpertsFromSection,
    ModelSection,
    OptimizerSection,
    RunFile,
    TaskSection,
)
from rotmole.tuner.settings.presets import PRESETS
from rotmole.tuner.settings.ranges import Range
from rotmole.tuner.settings.settings import Settings

DOCUMENT = Path(__file__).parents[1] / "reference.md"
HEAD = ["key", "type", "default", "allowed", "meaning", "example"]
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", ModelSection),
    ("experts_from", ExpertsFromSection),
    ("data", DataSection),
    ("data.tasks.NAME", TaskSection),
    ("optimizer", OptimizerSection),
    ("evaluation", EvaluationSection),
)
INTRODUCTION = """# Every setting

`make pages` writes this page from the code. A run file is one YAML file with the sections below;
`rotmole init` writes one, `rotmole check RUN.yaml` reports every mistake in it, and
`rotmole train RUN.yaml SECTION.KEY=VALUE` replaces a setting for one run. A key without a default
must be given. `null` is YAML's word for None.
"""
ADAPTER = """Keys of the section `adapter:` are the arguments of `rotmole.RotMoleConfig`, with the
same names, defaults and meanings. `null` is None in Python, `true` is True.
[method.md](method.md) has the equations, [family.md](family.md) the presets.

`preset` and `peft_type` are keys of the run file only; in Python a preset is
`RotMoleConfig.preset(NAME, ...)`.
"""
ADAPTER_REFUSED = """These arguments of RotMoleConfig cannot be set in a run file:
"""
TRAINING = """Keys of the section `training:` are the arguments of
[TRL's SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), which has those of
[transformers' TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments);
each of them works, with the meaning and the default described there, but for the refused ones at
the end of this section. For these, rotmole has a default or a range of its own:
"""
TRAINING_REFUSED = """These cannot be set in a run file:
"""


def text() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION, "## Top level\n", _table(_rows(RunFile))]
    for name, section in SECTIONS:
        if name == "optimizer":
            parts += [*_adapter(), *_training()]
        parts += [f"## {name}\n", f"{section.__doc__}\n", _table(_rows(section))]
    return "\n".join(parts)


def _adapter() -> Iterator[str]:
    yield from ("## adapter\n", ADAPTER)
    preset = [
        "`preset`", "text", "", f"one of {', '.join(PRESETS)}",
        "Settings of a published method; other keys of this section replace the preset's.",
        "`goat`",
    ]  # fmt: skip
    peft_type = [
        "`peft_type`", "text", f"`{OURS}`", "a method of the installed PEFT",
        "The method that is trained; with another than ROTMOLE the keys of this section are those "
        "of its configuration ([compare.md](compare.md)).",
        "`LORA`",
    ]  # fmt: skip
    rows, hints = [preset, peft_type], adapter.adapter_hints()
    for entry in fields(Settings):
        default = entry.default if entry.default is not MISSING else {}
        rows.append(
            [
                f"`{entry.name}`", _type(hints[entry.name]), _value(default),
                _words(entry.metadata["range"]), entry.metadata["help"],
                _value(entry.metadata["example"]),
            ]
        )  # fmt: skip
    yield _table(rows)
    yield from (ADAPTER_REFUSED, _reasons(adapter.REFUSED))


def _training() -> Iterator[str]:
    yield from ("## training\n", TRAINING)
    defaults = training.DEFAULTS | training.VALIDATION_DEFAULTS
    rows = []
    for name, (meaning, example) in training.ABOUT.items():
        allowed = training.RANGES.get(name)
        default = _value(defaults[name]) if name in defaults else "TRL's"
        if name == "eval_strategy":
            default += ", `no` if no task has validation rows"
        kind = _type(float if allowed and "a number" in allowed.words else type(example))
        rows.append([f"`{name}`", kind, default, _words(allowed), meaning, _value(example)])
    yield _table(rows)
    yield from (TRAINING_REFUSED, _reasons(training.REFUSED))


def _words(allowed: Range | None) -> str:
    return "" if allowed is None else allowed.words


def _rows(section: type[BaseModel]) -> list[list[str]]:
    return [
        [
            f"`{name}`", _type(field.annotation), _default(field), _bounds(field),
            field.description or "", _value(field.examples[0]) if field.examples else "",
        ]
        for name, field in section.model_fields.items()
    ]  # fmt: skip


def _type(hint: Any) -> str:
    if _is_section(hint):
        return "section"
    if get_origin(hint) is dict and _is_section(get_args(hint)[1]):
        return "mapping of sections"
    if _literals(hint):
        return "text or null" if type(None) in get_args(hint) else "text"
    return describe(hint).replace(" or a ", " or ").removeprefix("a ")


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _literals(hint: Any) -> list[str]:
    """Return the words of a Literal, which may be a part of a union."""
    parts = [hint, *get_args(hint)] if get_origin(hint) is not dict else []
    return [word for part in parts if _is_literal(part) for word in get_args(part)]


def _is_literal(hint: Any) -> bool:
    return str(get_origin(hint)) == "typing.Literal"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return ""
    return _value(default)


def _bounds(field: FieldInfo) -> str:
    """Return the allowed values: the words of a Literal, keys, or the bounds of a number."""
    hint = field.annotation
    if words := _literals(hint):
        return "one of " + ", ".join(words)
    if get_origin(hint) is dict and _is_literal(get_args(hint)[0]):
        return "keys " + ", ".join(get_args(get_args(hint)[0]))
    comparisons = {"ge": "at least", "gt": "above", "lt": "below"}
    bounds = []
    for rule in field.metadata:
        for name, word in comparisons.items():
            bound = getattr(rule, name, None)
            if bound is not None:
                bounds.append(f"{word} {bound}")
        if getattr(rule, "min_length", None):
            bounds.append("not empty")
    return ", ".join(bounds)


def _value(value: Any) -> str:
    """Write a value as YAML in one line."""
    words = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return f"`{words.removesuffix('...' + chr(10)).strip()}`"


def _reasons(refused: Mapping[str, str]) -> str:
    return _table([[f"`{name}`", reason] for name, reason in refused.items()], ["key", "why"])


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENT).write_text(text(), encoding="utf-8")
