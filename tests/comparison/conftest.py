"""One tiny study, done once, that tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotmole.comparison.share import Left, fix_machine, work
from rotmole.comparison.study import Study, load_study
from study_cases import write_study


@pytest.fixture(scope="session")
def study_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def done(study_yaml: Path) -> tuple[Study, Left]:
    study = load_study(study_yaml)
    return study, work(study, fix_machine(study))
