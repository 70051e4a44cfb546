"""Locale tasks: real multilingual data made offline from Babel (CLDR) and num2words.

Every row asks for one value in one language and has exactly one right answer. The split goes by
a hash of the value, the same in all languages, so a test value is new in every language.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rotmole.config.schema import Split, TaskSection
from rotmole.data.locale_kinds import KINDS
from rotmole.data.sources import Row
from rotmole.errors import ConfigError, did_you_mean

POOL = 5000  # values of a kind, before the split
LIBRARIES = {"babel": "Babel", "num2words": "num2words"}  # module -> distribution


def locale_problems(kind: str | None, languages: Sequence[str] | None) -> list[str]:
    """Return what is wrong with a kind and its languages, one sentence each."""
    if kind is None:
        return [f"source locale needs `kind`, one of {', '.join(KINDS)}"]
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        return [f"kind '{kind}' is not known, use one of {', '.join(KINDS)}{hint}"]
    available = KINDS[kind].languages
    if languages is not None and not languages:
        return ["languages is empty; name at least one or leave it out for all"]
    return [
        f"language '{language}' is not available for {kind}, use any of {', '.join(available)}"
        for language in languages or ()
        if language not in available
    ]


def missing_libraries(kind: str | None) -> list[str]:
    """Return one sentence for each library that the kind needs and that is not installed."""
    needed = ("babel", "num2words") if kind == "numbers" else ("babel",)
    return [
        f'source locale needs {LIBRARIES[module]}; install it with: pip install "rotmole[demo]"'
        for module in needed
        if not _is_importable(module)
    ]


def _is_importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries whose tables are the data."""
    versions = {}
    for module, distribution in LIBRARIES.items():
        try:
            versions[module] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def split_of(kind: str, value: str) -> Split:
    """Return the split that a value's hash gives it: 80 % train, 10 % validation, 10 % test."""
    digest = hashlib.sha256(f"{kind}|{value}".encode()).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    if tenth < 8:
        return "train"
    return "validation" if tenth == 8 else "test"


@lru_cache(maxsize=64)
def values(kind: str, split: Split) -> tuple[str, ...]:
    """Return all values of a kind in a split; they do not depend on the machine or the seed."""
    rng = random.Random(f"rotmole locale {kind}")
    pool: dict[str, None] = {}
    while len(pool) < POOL:
        pool[KINDS[kind].draw(rng)] = None
    return tuple(value for value in pool if split_of(kind, value) == split)


def locale_rows(task: TaskSection, split: Split, *, seed: int) -> list[Row]:
    """Return the rows of one locale task, the same number in every language.

    The columns of a row are prompt, completion, question, value, kind, language (code),
    language_name and id. `limit` is the number of rows of each language; without it, every
    language has as many rows as the language for which the fewest can be made.

    Args:
        task: its kind, languages (None means all) and limit are used.
        seed: of the choice and order of values.

    Raises:
        ConfigError: the kind or a language is unknown, or Babel or num2words is not installed.
    """
    problems = locale_problems(task.kind, task.languages) or missing_libraries(task.kind)
    if problems or task.kind is None:
        raise ConfigError(problems)
    languages = list(dict.fromkeys(task.languages or KINDS[task.kind].languages))
    cells = [
        _cell(task.kind, language, split, task.limit.get(split), seed) for language in languages
    ]
    size = min(len(cell) for cell in cells)
    return [row for cell in cells for row in cell[:size]]


def _cell(kind: str, language: str, split: Split, limit: int | None, seed: int) -> list[Row]:
    order = list(values(kind, split))
    random.Random(f"{seed}|{kind}|{language}|{split}").shuffle(order)
    rows: list[Row] = []
    for value in order:
        if limit is not None and len(rows) >= limit:
            break
        columns = _columns(kind, value, language)
        if columns is not None:
            rows.append(Row(f"locale {kind} {language} {split}", len(rows) + 1, columns))
    return rows


def _columns(kind: str, value: str, language: str) -> dict[str, Any] | None:
    item = KINDS[kind].ask(value, language)
    if item is None:
        return None
    name = language_name(language)
    prompt = KINDS[kind].prompt.format(language=name, question=item.question)
    return {
        "prompt": prompt,
        "completion": item.answer,
        "question": item.question,
        "value": value,
        "kind": kind,
        "language": language,
        "language_name": name,
        "id": f"{language}|{value}",
    }


@lru_cache(maxsize=64)
def language_name(language: str) -> str:
    """Return the English name of a language, such as "German"."""
    from babel import Locale

    name = Locale.parse(language).get_language_name("en") or language
    return name.removesuffix(" Bokmål")  # the only written Norwegian here; the question is ASCII
