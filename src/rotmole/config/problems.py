"""Turn pydantic's error records into sentences about the run file."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from rotmole.config.fields import Suggest, as_list, describe, no_hint
from rotmole.errors import did_you_mean, one_of

Location = tuple[int | str, ...]


def sentences(
    errors: Sequence[Mapping[str, Any]],
    data: Any,
    model: type[BaseModel],
    prefix: str = "",
    suggest: Suggest = no_hint,
) -> list[str]:
    """Write one sentence per wrong setting.

    Args:
        errors: what ``ValidationError.errors()`` returns.
        data: the mapping that was validated.
        model: the class it was validated against.
        prefix: the place of `data` in the run file, such as ``data.``.
        suggest: as of `check_fields`.

    Returns:
        Sentences in the order of the errors; each setting has one.
    """
    seen: dict[Location, str] = {}
    for error in errors:
        place = _place(error, data)
        if any(known[: len(place)] == place for known in seen):
            continue  # another member of a union, after the one that is most like the value
        seen[place] = _sentence(error, place, data, model, prefix, suggest)
    return list(seen.values())


def _place(error: Mapping[str, Any], data: Any) -> Location:
    """Return the location without the names of union members, which pydantic appends."""
    place: list[int | str] = []
    for part in error["loc"]:
        if part == "[key]":
            break
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if str(part).startswith("dict["):
                continue  # the member of a union that is a mapping; its keys follow
            if error["type"] != "missing":
                break
        place.append(part)
    return tuple(place)


def _sentence(
    error: Mapping[str, Any],
    place: Location,
    data: Any,
    model: type[BaseModel],
    prefix: str,
    suggest: Suggest,
) -> str:
    name = prefix + ".".join(str(part) for part in place)
    value, kind, context = error.get("input"), error["type"], error.get("ctx") or {}
    if kind == "missing":
        return f"{name} is missing{_meaning(model, place)}"
    if kind == "extra_forbidden":
        fields = _fields(model, place[:-1])
        hint = suggest(str(place[-1]), name.rpartition(".")[0])
        hint = hint or did_you_mean(str(place[-1]), fields)
        return f"{name}: there is no such setting{hint or '; there are ' + ', '.join(fields)}"
    is_key = bool(error["loc"]) and error["loc"][-1] == "[key]"
    if is_key or kind == "literal_error":
        subject = f"a key of {name.rpartition('.')[0]}" if is_key else name
        return one_of(subject, place[-1] if is_key else value, _words(context))
    bounds = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}
    if kind in bounds:
        limit = context.get("gt", context.get("ge", context.get("lt")))
        return f"{name}: {value!r} must be {bounds[kind]} {limit}."
    if kind in ("too_short", "string_too_short"):
        return f"{name} is empty{_meaning(model, place)}"
    rule = context.get("error") if kind == "value_error" else None
    return f"{name}: {value!r} is not {rule or _wanted(_hint(model, place), place, value)}."


def _wanted(hint: Any, place: Location, value: Any) -> str:
    if hint is not None:
        return describe(hint) + as_list(value, hint)
    named = place == ("model",) and isinstance(value, str)
    return "a mapping of settings" + (f"; write model: {{name: {value}}}" if named else "")


def _words(context: Mapping[str, Any]) -> list[str]:
    expected = str(context.get("expected", "")).replace(" or ", ", ")
    return [word.strip().strip("'") for word in expected.split(",")]


def _hint(model: type[BaseModel], place: Location) -> Any:
    """Return the annotation at a place; None for a section."""
    hint: Any = model
    for part in place:
        section = _section(hint)
        if section is not None:
            field = section.model_fields.get(str(part))
            hint = field.annotation if field else None
        elif get_origin(hint) in (dict, list):
            hint = get_args(hint)[-1]
        else:
            mapping = next((a for a in get_args(hint) if get_origin(a) is dict), None)
            if mapping is None:
                return hint
            hint = get_args(mapping)[-1]
    return None if _section(hint) is not None else hint


def _section(hint: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, also one that may be null; None for other fields."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    members = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, types.UnionType) and len(members) == 1:
        hint = members[0]
    return hint if isinstance(hint, type) and issubclass(hint, BaseModel) else None


def _fields(model: type[BaseModel], place: Location) -> list[str]:
    hint: Any = model
    for part in place:
        section = _section(hint)
        if section is not None:
            hint = section.model_fields[str(part)].annotation
        else:
            hint = get_args(hint)[-1]
    section = _section(hint)
    return list(section.model_fields) if section else []


def _meaning(model: type[BaseModel], place: Location) -> str:
    """Return what a setting means, as it follows its name; a period if it is not described."""
    section: Any = model
    for part in place[:-1]:
        parent = _section(section)
        section = parent.model_fields[str(part)].annotation if parent else get_args(section)[-1]
    parent = _section(section)
    field = parent.model_fields.get(str(place[-1])) if parent else None
    if field is None or not field.description:
        return "."
    return f": {field.description[0].lower()}{field.description[1:]}"
