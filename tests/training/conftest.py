"""The model and the rows that the tests of training share; nobody changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_cases import write_data, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer on disk."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two tasks on disk."""
    return write_data(tmp_path_factory.mktemp("data"))
