"""Check the keys of a section and the types of its values against the class that receives them."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from rotmole.errors import did_you_mean, one_of

Suggest = Callable[[str, str], str]
"""(an unknown key, its section) -> a hint where it belongs, or the empty string."""


def no_hint(key: str, section: str) -> str:
    """Return the empty string: a Suggest that knows nothing."""
    return ""


def check_fields(
    values: Mapping[str, Any],
    hints: Mapping[str, Any],
    refused: Mapping[str, str],
    section: str,
    suggest: Suggest = no_hint,
    *,
    owner: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Check every key and the type of every value; collect all problems.

    Args:
        values: the section as parsed from YAML.
        hints: field name -> type, of the class that receives the values.
        refused: field name -> why a run file may not set it.
        section: name of the section in messages.
        suggest: knows settings of other sections and other tools' names.
        owner: the class that has the keys, for messages.

    Returns:
        The values that passed, converted (if the type is a number, "1e-4" becomes one), and one
        sentence per problem.
    """
    passed: dict[str, Any] = {}
    problems: list[str] = []
    allowed = [name for name in hints if name not in refused]
    for key, value in values.items():
        name = f"{section}.{key}"
        if key in refused:
            problems.append(f"{name} cannot be set here: {refused[key]}.")
        elif key not in hints:
            hint = suggest(key, section) or did_you_mean(key, allowed)
            hint = hint or f"; the keys are those of {owner or section}."
            problems.append(f"{name}: there is no such setting{hint}")
        else:
            converted, problem = convert(value, hints[key], name)
            if problem:
                problems.append(problem)
            else:
                passed[key] = converted
    return passed, problems


def convert(value: Any, hint: Any, name: str) -> tuple[Any, str]:
    """Convert a value, as parsed from YAML, to the type of its field.

    Args:
        value: as parsed from YAML.
        hint: the field's type.
        name: the setting's full name, for messages.

    Returns:
        The converted value and the empty string, or the value as it was and the problem.
    """
    words = _enum_words(hint)
    if words and isinstance(value, str) and value not in words:
        return value, one_of(name, value, words)
    if isinstance(value, bool) and not _accepts(hint, bool):
        return value, f"{name}: {value!r} is not {describe(hint)}."
    try:
        adapter = TypeAdapter(hint)
    except (
        PydanticSchemaGenerationError
    ):  # a type that pydantic does not know; the library that has it checks it
        return value, ""
    try:
        return adapter.validate_python(value), ""
    except ValidationError:
        return value, f"{name}: {value!r} is not {describe(hint)}{as_list(value, hint)}."


def as_list(value: Any, hint: Any) -> str:
    """Show how to write a single value if the field's type is a list.

    Returns:
        "; write [value]", or the empty string.

    >>> as_list("de", list[str] | None)
    '; write [de]'
    """
    if not isinstance(value, str) or list not in [get_origin(part) for part in _parts(hint)]:
        return ""
    return f"; write {yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()}"


def describe(hint: Any) -> str:
    """Name a type in words that can follow "is not".

    >>> describe(int | None), describe(list[str] | str)
    ('a whole number or null', 'a list of text or text')
    """
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        dict: "a mapping",
        list: "a list",
    }
    parts = _parts(hint)
    if len(parts) > 1:
        words = [describe(part) for part in parts]
        words.sort(key=lambda word: word == "null")
        return " or ".join(dict.fromkeys(words))
    origin = get_origin(hint)
    if origin in (list, set, tuple) and get_args(hint):
        entry = describe(get_args(hint)[0])
        return f"a list of {entry.removeprefix('a ')}{'s' if entry.endswith('number') else ''}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if str(origin) == "typing.Literal":
        return "one of " + ", ".join(repr(word) for word in get_args(hint))
    return names.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    parts = _parts(hint)
    return Any in parts or kind in parts or any(get_origin(p) is not None for p in parts)


def _enum_words(hint: Any) -> list[str]:
    enums = [p for p in _parts(hint) if isinstance(p, type) and issubclass(p, enum.Enum)]
    return [str(member.value) for kind in enums for member in kind]
