"""Look for circles of imports between modules: `python tests/circles.py`, a part of `make imports`.

An import is in a circle if the module imported imports the importer, directly or through others.
Imports under TYPE_CHECKING and inside functions count, and so do imports of a package's
`__init__.py`, which import-linter's contracts between siblings leave out.
"""

from __future__ import annotations

import sys

import grimp


def circles(*packages: str) -> list[str]:
    """Return every import that is part of a circle, as "importer, line N, imports imported"."""
    graph = grimp.build_graph(*packages, cache_dir=None, exclude_type_checking_imports=False)
    imports = [
        details
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if graph.chain_exists(importer=imported, imported=importer)
        for details in graph.get_import_details(importer=importer, imported=imported)
    ]
    return sorted(
        f"{i['importer']}, line {i['line_number']}, imports {i['imported']}" for i in imports
    )


if __name__ == "__main__":
    in_circles = circles("rotmole", "rotmole_cli")
    print("\n".join(in_circles) or "No import is part of a circle.")
    sys.exit(bool(in_circles))
