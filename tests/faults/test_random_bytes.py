"""Random bytes in files, settings and names: exit 0 or 2, no traceback, nothing written outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz_targets import TARGETS, Place, new_place

EXAMPLES = {"adapter_config": 60, "weights": 60, "run_file": 40, "data": 60, "names": 40}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with new_place() as made:
        yield made


LANES = {"data": pytest.mark.heavy, "names": pytest.mark.heavy}


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=LANES.get(name, [])) for name in TARGETS],
)
@pytest.mark.slow
def test_nothing_breaks(place: Place, target: str) -> None:
    cases, check = TARGETS[target](place)

    @settings(
        max_examples=EXAMPLES[target],
        phases=[Phase.explicit, Phase.generate],  # shrinking costs minutes; make fuzz does it
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def explore(data: st.DataObject) -> None:
        check(data.draw(cases))

    explore()
