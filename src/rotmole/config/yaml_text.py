"""Read and write YAML: duplicate keys are errors, 1e-4 is a number, `no` is text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from rotmole.errors import ConfigError

_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2 and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own class attribute

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _rule(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_rule("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_rule("null", r"^(?:~|null|Null|NULL|)$", "~nN\0")
_Loader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))
)
_rule("int", r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$", "-+0123456789")
_rule("float", rf"^(?:{_FLOAT}|\.(?:nan|NaN|NAN))$", "-+0123456789.")
_rule("merge", r"^<<$", "<")


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _Loader would read as a number, such as 12e4.

    Text with a line break of Unicode is written with escapes, because SafeDumper folds it.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _first, _rules in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _rules:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def write_yaml(value: Any) -> str:
    """Write YAML text that `parse_yaml` reads back to the same value.

    Text that YAML 1.1 or 1.2 would read as something else is quoted.

    Args:
        value: dicts, lists, strings, numbers, booleans and None; keys keep their order.

    >>> write_yaml({"revision": "12e4", "rate": 1e-4})
    "revision: '12e4'\\nrate: 0.0001\\n"
    """
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text by the core schema of YAML 1.2, except that duplicate keys are refused.

    Args:
        text: YAML.
        where: the text's name in error messages.

    Returns:
        Plain dicts, lists, strings, numbers, booleans and None.

    Raises:
        ConfigError: with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or "cannot be read"
        raise ConfigError(f"not valid YAML{place}: {problem}.", where) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}.", where) from error
