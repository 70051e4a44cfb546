"""Adapter names: PEFT writes a folder of that name, so a name must not lead anywhere else."""

from __future__ import annotations

from rotmole.errors import AdapterError

_LONGEST = 200


def check_adapter_name(name: object) -> None:
    """Refuse names that are no plain folder name.

    Args:
        name: what the user calls the adapter.

    Raises:
        AdapterError: it is empty, a path, or holds characters that no file name may have.

    Source: our choice; torch itself forbids the dot, file systems the rest.
    """
    rule = (
        "an adapter's name is one folder name: no slash, backslash, colon, dot or control "
        f"character, not blank at an end, at most {_LONGEST} bytes"
    )
    if not isinstance(name, str):
        raise AdapterError(f"adapter name {name!r} is no text; {rule}.")
    encoded = name.encode("utf-8", "surrogatepass")
    plain = name.isprintable() and not set(name) & set('/\\:.*?"<>|')
    if not (plain and 0 < len(encoded) <= _LONGEST and name == name.strip()):
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise AdapterError(f"adapter name {shown!r} cannot be used; {rule}.")
