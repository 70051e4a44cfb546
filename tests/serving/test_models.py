"""Names of models, one base for all of them, and the size of the cache."""

from __future__ import annotations

import pytest
import yaml

from rotmole.errors import InputError
from rotmole.serving import memory
from rotmole.serving.engine import OneByOne
from rotmole.serving.limits import Limits
from rotmole.serving.models import load_models, named_targets
from rotmole.serving.server import make_engines
from tiny_folders import write_model


def test_names_are_those_of_folders_or_given(targets):
    folder = targets[0].parent / "red" / "adapter"
    words = [str(targets[0]), str(targets[1]), f"third={folder}", f"a=b={targets[0]}"]
    assert list(named_targets(words[:3])) == ["red", "blue", "third"]
    with pytest.raises(InputError, match="there is no file or folder b="):
        named_targets(words)
    with pytest.raises(InputError, match=r"model of the name 'red' already.*red-2="):
        named_targets([str(folder), str(targets[0])])
    with pytest.raises(InputError, match="no name before the equals sign"):
        named_targets([f"={folder}"])


def test_another_base_is_refused(targets, tmp_path):
    run = yaml.safe_load(targets[1].read_text(encoding="utf-8"))
    run["model"]["name"] = str(write_model(tmp_path / "other"))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(run), encoding="utf-8")
    with pytest.raises(InputError, match="a server has one base model"):
        load_models(named_targets([str(targets[0]), f"other={other}"]))


def test_an_adapter_with_the_name_of_its_base_is_refused(targets):
    with pytest.raises(InputError, match="has the name of its base model, 'base'"):
        load_models(named_targets([f"base={targets[0]}"]))


def test_a_base_alone_is_served(targets, tmp_path):
    run = yaml.safe_load(targets[0].read_text(encoding="utf-8"))
    run["output_dir"] = str(tmp_path / "none")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    served = load_models(named_targets([str(file)]))
    assert [(model.name, model.adapted) for model in served] == [("base", False)]
    engines = make_engines(served, Limits(), batching=False)
    for engine in engines:
        engine.stop()
    assert [type(engine) for engine in engines] == [OneByOne]


def test_the_cache_takes_a_share_of_the_free_memory_and_no_more_than_is_needed(alone, monkeypatch):
    model = alone["base"].model
    # 2 layers, 2 heads of keys and values of 8 numbers of 4 bytes
    assert memory.token_bytes(model) == 2 * 2 * 2 * 8 * 4
    free = 256 * 1000 * memory.BLOCK

    def tokens(**options) -> int:
        return memory.cache_tokens(model, **({"window": 512, "parallel": 4, "models": 1} | options))

    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert tokens() == 4 * 512  # all that can be in use
    assert tokens(parallel=200) == 300 * memory.BLOCK  # 30 % of the memory
    assert tokens(parallel=200, models=3) == 200 * memory.BLOCK  # at least a block for each


def test_a_cache_that_is_too_small_for_an_answer(targets):
    with pytest.raises(InputError, match="--cache-tokens is 300; it must be at least 512"):
        make_engines([], Limits(), tokens=300)
