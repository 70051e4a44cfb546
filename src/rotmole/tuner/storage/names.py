"""Adapter names: PEFT writes a folder of that name, so a name must be a plain folder name."""

from __future__ import annotations

from rotmole.errors import AdapterError

_LONGEST = 200


def check_adapter_name(name: object) -> None:
    """Refuse an adapter's name that is not a plain folder name.

    torch forbids the dot in names of modules; file systems forbid the other characters.

    Raises:
        AdapterError: it is empty, a path, or holds characters that a file name may not have.
    """
    rule = (
        "an adapter's name is one folder name: no slash, backslash, colon, dot or control "
        f"character, not blank at an end, at most {_LONGEST} bytes"
    )
    if not isinstance(name, str):
        raise AdapterError(f"adapter name {name!r} is not text; {rule}.")
    encoded = name.encode("utf-8", "surrogatepass")
    plain = name.isprintable() and not set(name) & set('/\\:.*?"<>|')
    if not (plain and 0 < len(encoded) <= _LONGEST and name == name.strip()):
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise AdapterError(f"adapter name {shown!r} cannot be used; {rule}.")
