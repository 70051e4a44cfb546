"""From a study folder to everything that is written of it: study.json, pages, PEFT's layout."""

from __future__ import annotations

from pathlib import Path

from rotmole.comparison.judge import judge
from rotmole.comparison.judgement import Judgement, write_judgement
from rotmole.comparison.pages.method_comparison import write_method_comparison
from rotmole.comparison.pages.page import write_pages
from rotmole.comparison.results import Results

STUDY = "study.json"


def write_report(results: Results, folder: Path, title: str) -> tuple[Judgement, list[Path]]:
    """Judge a study and write its results, study.json first.

    Args:
        results: what the study has measured; cells may be missing.
        folder: of the study.
        title: of the pages.

    Returns:
        The judgement, and the files and folders to name.

    Raises:
        InputError: the baseline has no finished final cell, or a cell's folder has lost a file.
        StorageError: a file cannot be written.
    """
    judgement = judge(results)
    written = [write_judgement(judgement, folder / STUDY)]
    written += write_pages(judgement, folder, title)
    written.append(write_method_comparison(results, judgement, folder))
    return judgement, written
