"""Which files a task's `files` names: files, folders, patterns and archives, by split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryDirectory

from rotmole.config.schema import SPLITS, DataSection, Split, TaskSection
from rotmole.data.readers import read_bytes
from rotmole.errors import DataError, did_you_mean

FILE_SOURCES = ("files", "jsonl", "json", "csv", "parquet", "arrow")
ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".tab": "csv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
ALIKE = {"jsonl": ("jsonl", "json"), "json": ("jsonl", "json")}  # one reader reads both
ARCHIVES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
MAGIC = (
    b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04",
    b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07",
)  # fmt: skip
# of folders that the datasets library or a hub made; they hold no rows
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
WORDS: dict[str, Split] = {  # in the name of a file or folder, as the datasets library has them
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def resolve(data: DataSection, file: str) -> Path:
    """Return the path of a file: relative to `data.root`, with ~ as the home folder."""
    return Path(data.root).expanduser() / Path(file).expanduser()


def file_type(path: Path) -> str | None:
    """Return the source that the ending of a name stands for, as of `rows.csv.gz`."""
    name = path.name.lower()
    while name.endswith(ARCHIVES):
        name = name.rpartition(".")[0]
    return ENDINGS.get(Path(name).suffix)


def task_files(data: DataSection, task: TaskSection) -> tuple[dict[Split, list[Path]], list[str]]:
    """Return the files of each split, and one sentence for each name that is wrong.

    A single name, or a list of them, means the train split; but of a single folder the names of
    its files and folders say the split, such as `train.csv` and `test/1.csv`, if they say one.
    """
    if isinstance(task.files, str) and resolve(data, task.files).is_dir():
        return _folder_splits(data, task, resolve(data, task.files))
    named = task.files if isinstance(task.files, dict) else {"train": task.files}
    files: dict[Split, list[Path]] = {}
    problems = []
    for split in (split for split in SPLITS if split in named):
        where = f"files.{split}" if isinstance(task.files, dict) else "files"
        given = named[split]
        names = [given] if isinstance(given, str) else given
        files[split] = []
        if not names:
            problems.append(f"{where} is empty; name at least one file or remove it")
        for name in names:
            expanded = _expanded(data, task, name)
            if isinstance(expanded, str):
                problems.append(f"{where}: {expanded}")
            else:
                files[split] += expanded
    return files, problems


def _expanded(data: DataSection, task: TaskSection, name: str) -> list[Path] | str:
    """Return the files that one name stands for, or what is wrong with it."""
    path = resolve(data, name)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        return _data_files(path, task.source) or _none_there(path, task.source)
    elif has_magic(name):
        root = Path(data.root).expanduser()
        inside = Path(name).expanduser()
        parts = inside.relative_to(inside.anchor).parts if inside.is_absolute() else inside.parts
        start = Path(inside.anchor) if inside.is_absolute() else root
        files = sorted(
            p
            for p in start.glob("/".join(parts))
            if p.is_file() and p.name not in NO_ROWS and not _hidden(p)
        )
        if not files:
            return f"no file matches {path} (data.root is {data.root})"
    else:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        web = "; download it first, or use source: hub" if "://" in name else ""
        return (
            f"there is no file {path} (data.root is {data.root}; in a run file it is relative to "
            f"the file){web}{did_you_mean(path.name, names)}"
        )
    return next((p for p in map(_type_problem, files) if p), files) if _any(task) else files


def _any(task: TaskSection) -> bool:
    return task.source == "files"


def _type_problem(path: Path) -> str | None:
    if file_type(path) or path.name.lower().endswith((".zip", ".tar", ".tgz", ".7z", ".rar")):
        return None
    if file_type(path) is None and any(path.name.lower().endswith(f".tar{a}") for a in ARCHIVES):
        return None
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        return f"{path} is a workbook; save its sheet as CSV UTF-8"
    return (
        f"the ending of {path} is none of {', '.join(ENDINGS)}; set source to one of "
        f"{', '.join(FILE_SOURCES[1:])}"
    )


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "__"))


def _data_files(folder: Path, source: str) -> list[Path]:
    """Return the files below a folder that the source reads, sorted; hidden ones are left out."""
    types = ENDINGS.values() if source == "files" else ALIKE.get(source, (source,))
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and file_type(path) in types
        and path.name not in NO_ROWS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def _none_there(folder: Path | str, source: str, kind: str = "folder") -> str:
    types = ENDINGS.values() if source == "files" else ALIKE.get(source, (source,))
    endings = ", ".join(ending for ending, kind in ENDINGS.items() if kind in types)
    return f"the {kind} {folder} has no file that ends in {endings}"


def _folder_splits(
    data: DataSection, task: TaskSection, folder: Path
) -> tuple[dict[Split, list[Path]], list[str]]:
    files = _data_files(folder, task.source)
    if not files:
        return {}, [f"files: {_none_there(folder, task.source)}"]
    splits: dict[Split, list[Path]] = {}
    without = []
    for path in files:
        split = _split_of(path.relative_to(folder))
        if split:
            splits.setdefault(split, []).append(path)
        else:
            without.append(path)
    if not splits:
        return {"train": files}, []
    if without:
        return splits, [
            f"files: the folder {folder} has files of the split {' and '.join(splits)}, but the "
            f"name of {without[0].relative_to(folder)} says none; rename it, or write "
            "files: {train: ..., test: ...}"
        ]
    return {split: splits[split] for split in SPLITS if split in splits}, []


def _split_of(path: Path) -> Split | None:
    """Return the split that a name says, else that of the folders above it."""
    for part in reversed(path.parts):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in WORDS:
                return WORDS[word]
    return None


def contents(path: Path, source: str, name: str = "") -> Iterator[tuple[str, bytes, str]]:
    """Yield name, content and source of a file, or of each file in an archive.

    Compressed files and archives are known by their content, and extracted by the datasets
    library.

    Args:
        path: the file.
        source: as in the run file; "files" goes by the ending.
        name: that messages give it; "" means its path.

    Raises:
        DataError: the file cannot be read, or its archive holds nothing that `source` reads.
    """
    name = name or str(path)
    raw = read_bytes(path)
    if not raw.startswith(MAGIC) and raw[257:262] != b"ustar":
        kind = file_type(path) if source == "files" else source
        if kind is None:
            raise DataError(f"{name}: its ending says no type; set source", source=name)
        yield name, raw, kind
        return
    with TemporaryDirectory() as folder:
        named = path.name.lower().endswith(ARCHIVES)
        out = Path(folder) / "out" / (path.stem if named else path.name)
        _extract(path, out, name)
        if out.is_file():
            yield from contents(out, source, name)
            return
        if (out / "[Content_Types].xml").exists():
            raise DataError(f"{name}: this is a workbook; save it as CSV UTF-8", source=name)
        files = _data_files(out, source)
        if not files:
            raise DataError(_none_there(name, source, "archive"), source=name)
        for file in files:
            yield from contents(file, source, f"{name}/{file.relative_to(out)}")


def _extract(path: Path, out: Path, name: str) -> None:
    try:
        from datasets.utils.extract import Extractor

        Extractor.extract(path, out, str(Extractor.infer_extractor_format(path)))
    except Exception as error:  # each format's package has errors of its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{name}: cannot be decompressed: {reason}", source=name) from error
