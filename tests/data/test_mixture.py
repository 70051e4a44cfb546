from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotmole.config.schema import DataSection
from rotmole.data import Example, data_fingerprint, fingerprint, mix, repeated
from rotmole.data.mixture import shares


def examples(**sizes: int) -> dict[str, list[Example]]:
    return {
        task: [Example(task, "", str(i), f"{task}{i}", "x") for i in range(size)]
        for task, size in sizes.items()
    }


def data(temperature=None, **weights) -> DataSection:
    tasks = {
        task: {"source": "jsonl", "files": {"train": "x"}, "weight": weight}
        for task, weight in weights.items()
    }
    return DataSection(tasks=tasks, temperature=temperature)


def test_each_row_once_by_default():
    rows = examples(a=30, b=5)
    mixed = mix(rows, data(a=None, b=None), seed=0)
    assert Counter(mixed) == Counter(rows["a"] + rows["b"])
    assert mixed != rows["a"] + rows["b"]
    assert mixed == mix(rows, data(a=None, b=None), seed=0)
    assert mixed != mix(rows, data(a=None, b=None), seed=1)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (data(a=1.0, b=1.0), {"a": 50, "b": 50}),
        (data(a=3.0, b=None), {"a": 75, "b": 25}),
        (data(1.0, a=None, b=None), {"a": 90, "b": 10}),
        (data(2.0, a=None, b=None), {"a": 75, "b": 25}),  # 90^.5 : 10^.5 = 3 : 1
        (data(1e9, a=None, b=None), {"a": 50, "b": 50}),
        (data(2.0, a=1.0, b=3.0), {"a": 50, "b": 50}),
    ],
)
def test_shares(section, expected):
    rows = examples(a=90, b=10)
    assert shares(rows, section) == expected
    counts = Counter(row.task for row in mix(rows, section, seed=0))
    assert counts == expected


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 9)), min_size=1, max_size=4),
    st.none() | st.floats(0.5, 20),
)
def test_an_epoch_is_as_long_as_all_rows_and_repeats_evenly(tasks, temperature):
    rows = examples(**{f"t{i}": size for i, (size, _) in enumerate(tasks)})
    section = data(temperature, **{f"t{i}": weight for i, (_, weight) in enumerate(tasks)})
    mixed = Counter(mix(rows, section, seed=3))
    assert mixed.total() == sum(size for size, _ in tasks)
    for task in rows.values():
        counts = [mixed[row] for row in task]
        assert max(counts) - min(counts) <= 1


def test_fingerprint_knows_content_and_order_but_not_place():
    rows = examples(a=3, b=2)
    before = fingerprint(rows)
    assert before == fingerprint(dict(reversed(rows.items())))
    moved = {"a": [replace(row, origin="/elsewhere: row 1") for row in rows["a"]], "b": rows["b"]}
    assert before == fingerprint(moved)
    for field, value in [
        ("completion", "y"),
        ("score", 1.0),
        ("choices", ("a", "b")),
        ("end", "e"),
    ]:
        changed = {"a": [replace(rows["a"][0], **{field: value}), *rows["a"][1:]], "b": rows["b"]}
        assert before != fingerprint(changed)


def test_rows_of_another_split_are_found_in_any_task():
    train = examples(a=3, b=2)
    rows = {
        "a": [replace(train["b"][1], id="9", origin="elsewhere"), Example("a", "", "1", "a", "0x")],
        "c": [Example("c", "", "0", "a0", "y")],
    }
    assert repeated(rows, train) == {"a": 2}  # the text is what is learnt, wherever it is split
    assert repeated(rows, {}) == {}


def test_data_fingerprint_names_library_versions_only_where_they_matter():
    rows = examples(a=3)
    plain = data_fingerprint(data(a=None), {"train": rows})
    assert plain["splits"]["train"]["a"] == {"rows": 3, "sha256": fingerprint(rows)}
    assert plain["versions"] == {}
    section = DataSection(tasks={"a": {"source": "locale", "kind": "dates"}})
    local = data_fingerprint(section, {"train": rows})
    assert set(local["versions"]) == {"babel", "num2words"}
    assert local["sha256"] != plain["sha256"]
