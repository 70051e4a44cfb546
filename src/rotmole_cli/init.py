"""``rotmole init``: write a run file or a study file from a template, without importing rotmole."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path


class InitError(Exception):
    """The file cannot be written; exit_code is 2 for bad input and 4 for the disk."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def templates() -> dict[str, Path]:
    """Find the shipped templates: run files, study files, files that launch several processes.

    Returns:
        Name -> file, run files first, each kind in alphabetical order.
    """
    # the package is located, not imported: importing it would bring PEFT
    spec = find_spec("rotmole")
    folders = list(spec.submodule_search_locations or []) if spec else []
    kinds = ("config/templates", "config/studies", "config/launch")
    files = [file for f in folders for kind in kinds for file in sorted(Path(f, kind).glob("*.*"))]
    return {file.stem: file for file in files}


def init(path: Path, template: str, *, force: bool = False, show: bool = False) -> int:
    """Write a template to a file.

    Args:
        path: the file to write; in a folder, ``run.yaml``.
        template: a name that `templates` returns.
        force: overwrite an existing file.
        show: list the templates instead of writing one.

    Returns:
        Exit code 0.

    Raises:
        InitError: there is no such template, the file exists, or the disk refuses.
    """
    files = templates()
    if show:
        for name, file in files.items():
            lines = file.read_text(encoding="utf-8").splitlines()
            first = next(line for line in lines if not line.startswith("#!"))
            print(f"{name:<18}{first.lstrip('# ')}")
        return 0
    if template not in files:
        from rotmole.errors import one_of  # importing rotmole takes seconds

        raise InitError(one_of("--template", template, files))
    if path.is_dir():
        path = path / "run.yaml"
    kind = files[template].parent.name
    launches = kind == "launch"
    if kind == "studies" and path.name == "run.yaml":
        path = path.with_name("study.yaml")
    if launches and path.name == "run.yaml":
        path = path.with_name(files[template].name)
    text = files[template].read_text(encoding="utf-8")
    try:
        _write(path, text, force)
    except FileExistsError:
        raise InitError(
            f"{path} exists already; give another name, or --force to overwrite it."
        ) from None
    except OSError as error:
        raise InitError(f"cannot write {path}: {error.strerror}.", 4) from error
    print(f"wrote {path} (template {template})")
    if sys.stdout.isatty():
        launch = f"accelerate launch --config_file {path} -m rotmole_cli train run.yaml"
        launch = f"sbatch {path}" if path.suffix == ".sh" else launch
        verb = "compare" if kind == "studies" else "train"
        check = f"rotmole check {path}, then rotmole {verb} {path}"
        print(f"next: {launch if launches else check}")
    return 0


def _write(path: Path, text: str, force: bool) -> None:
    if path.exists() and not force:
        raise FileExistsError
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
