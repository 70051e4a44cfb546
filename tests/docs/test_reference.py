"""docs/reference.md is what the code generates, holds every key, and its examples are allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
from peft import LoraConfig
from pydantic import BaseModel, TypeAdapter

from docs_scripts import script
from rotmole import RotMoleConfig
from rotmole.config import adapter, training
from rotmole.config.schema import RunFile
from rotmole.tuner.settings.settings import Settings, range_problems

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("reference")


def sections(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the run file, found through its annotations, with its dotted name."""
    yield name, model
    for key, field in model.model_fields.items():
        hint = field.annotation
        inner = getattr(hint, "__args__", (hint,))[-1]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            many = inner is not hint
            yield from sections(inner, f"{name}.{key}".strip(".") + (".NAME" if many else ""))


def part(page: str, title: str) -> str:
    """The text under one heading."""
    return page.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_the_committed_page_is_what_the_code_generates(reference: ModuleType) -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference.text(), "run `make pages`"


def test_every_key_of_every_section_has_a_row_a_meaning_and_an_example(
    reference: ModuleType,
) -> None:
    page = reference.text()
    for name, section in sections(RunFile):
        text = part(page, name or "Top level")
        for key, field in section.model_fields.items():
            assert f"| `{key}` |" in text, (name, key)
            assert field.description, (name, key)
            hint = field.annotation
            is_section = isinstance(hint, type) and issubclass(hint, BaseModel)
            assert is_section or field.examples or key in ("adapter", "training"), (name, key)


def test_every_setting_of_the_adapter_and_every_key_of_training_with_a_rule_has_a_row(
    reference: ModuleType,
) -> None:
    page = reference.text()
    keys = {entry.name for entry in fields(RotMoleConfig)} | {"preset"}
    assert not [key for key in keys if f"| `{key}` |" not in part(page, "adapter")]
    keys = {*training.DEFAULTS, *training.VALIDATION_DEFAULTS, *training.RANGES, *training.REFUSED}
    assert not [key for key in keys if f"| `{key}` |" not in part(page, "training")]
    assert keys - {*training.REFUSED} <= training.ABOUT.keys()


def test_every_example_is_allowed_and_differs_from_the_default() -> None:
    for entry in fields(Settings):
        example = entry.metadata["example"]
        assert range_problems(replace(Settings(), **{entry.name: example})) == {}, entry.name
        assert example != getattr(Settings(), entry.name), entry.name
    for name, section in sections(RunFile):
        for key, field in section.model_fields.items():
            for example in field.examples or []:
                TypeAdapter(field.rebuild_annotation()).validate_python(example)
                assert field.is_required() or example != field.get_default(
                    call_default_factory=True
                ), (name, key)
    hints = training.training_hints()
    for name, (_, example) in training.ABOUT.items():
        TypeAdapter(hints[name]).validate_python(example)
        if name in training.RANGES:
            assert not [*training.RANGES[name].problems(name, example)]


def test_what_a_run_file_refuses_are_names_that_exist() -> None:
    names = {entry.name for kind in (RotMoleConfig, LoraConfig) for entry in fields(kind)}
    assert adapter.REFUSED.keys() <= names
