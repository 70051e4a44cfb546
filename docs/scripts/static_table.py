"""Write the tables of docs/use.md from experiments/results/static_demo.json.

    python docs/scripts/static_table.py [--new EXPORTED_FOLDER] [--page FILE]

--new first replaces the committed figures by those of a static LoRA that was just exported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "use.md"
EXPORTED = ROOT / "experiments" / "results" / "static_demo.json"


def _rows(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measure(value: dict[str, Any], sign: str = "") -> str:
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def static(exported: dict[str, Any]) -> str:
    """Return the table of shares and divergences."""
    lines = [["tokens of", "tokens", "share", "linear share", "KL", "KL of the base", "same token"]]
    for part, share in exported["shares"].items():
        near = exported["agreement"].get(part)
        far = exported["agreement_of_the_base"].get(part)
        figures = [f"{share['static']:.3f}", f"{share['linear']:.3f}"]
        figures += (
            [f"{near['kl']:.4f}", f"{far['kl']:.2f}", f"{near['same']:.3f}"] if near else [""] * 3
        )
        lines.append([part, f"{share['tokens']:,}", *figures])
    return _rows(lines)


def tasks(exported: dict[str, Any]) -> str:
    """Return the table of exact match, for each task and overall."""
    report = exported["tasks"]
    mixture, lora = (report["systems"][name] for name in ("mixture", "static"))
    change = report["differences"]["static"]
    lines = [["exact match", "rows", "mixture", "static LoRA", "difference"]]
    parts = [
        (n, *(side["tasks"][n]["metrics"] for side in (mixture, lora, change)))
        for n in mixture["tasks"]
    ]
    for name, *sides in [*parts, ("all", mixture["overall"], lora["overall"], change["overall"])]:
        first, second, third = (side["exact_match"] for side in sides)
        figures = [_measure(first), _measure(second), _measure(third, "+")]
        lines.append([name, str(first["n"]), *figures])
    return _rows(lines)


def page(text: str) -> str:
    """Return docs/use.md with the tables of the committed figures."""
    exported = json.loads(EXPORTED.read_text(encoding="utf-8"))
    tables = {"static": static(exported), "tasks": tasks(exported)}
    for mark, table in tables.items():
        before, _, rest = text.partition(f"<!-- {mark} -->")
        _, _, after = rest.partition(f"<!-- end of {mark} -->")
        text = f"{before}<!-- {mark} -->\n{table}\n<!-- end of {mark} -->{after}"
    return text


def main() -> None:
    """Store new figures if there are any, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--new", type=Path, help="folder that rotmole export --lora wrote")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args()
    if options.new is not None:
        exported = json.loads((options.new / "export.json").read_text(encoding="utf-8"))
        del exported["layers"]
        for system in exported["tasks"]["systems"].values():
            del system["seconds"]
        EXPORTED.write_text(json.dumps(exported, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(page(options.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
