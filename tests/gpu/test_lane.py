"""The GPU lane says plainly when there is no card, starts on the CPU, and keeps cards' figures.

What stands for a card is the list of names; the code of every part is that of `make gpu`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).with_name("lane.py")
spec = importlib.util.spec_from_file_location("gpu_lane", FILE)
assert spec is not None
assert spec.loader is not None
lane = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lane)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the parts found and what failed; what each was called with is kept under "calls"."""
    results: dict[str, Any] = {"checks": ({"a": "", "b": ""}, []), "ranks": ({"c": ""}, []),
                             "bench": ([{"value": 1.0}], []), "calls": []}  # fmt: skip

    def part(name: str) -> Any:
        def run(device: str, ranks: int, folder: Path, more: Any) -> Any:
            results["calls"].append((name, device, ranks))
            return results[name]

        return run

    monkeypatch.setattr(lane, "PARTS", {name: part(name) for name in lane.PARTS})
    return results


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "cards", lambda: ["NVIDIA H100 80GB HBM3"] * 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    properties = type("Properties", (), {"total_memory": 80})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_without_a_card_it_says_so_and_does_not_fail(
    planted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert lane.main(["--into", str(tmp_path)]) == 0
    assert "no GPU here: nothing was measured on one" in capsys.readouterr().out
    assert planted["calls"] == []
    assert not list(tmp_path.iterdir())


def test_a_card_keeps_one_file_with_its_name(
    planted: dict[str, Any], two_cards: None, tmp_path: Path
) -> None:
    assert lane.main(["--into", str(tmp_path)]) == 0
    assert planted["calls"] == [(name, "cuda", 2) for name in ("checks", "ranks", "bench")]
    (file,) = tmp_path.iterdir()
    assert file.name == "gpu-nvidia-h100-80gb-hbm3.json"
    kept = json.loads(file.read_text())
    assert kept["cards"] == ["NVIDIA H100 80GB HBM3"] * 2
    assert kept["bench"] == [{"value": 1.0}]
    assert {"torch", "commit", "capability", "memory"} <= kept["made"].keys()


def test_a_dry_run_keeps_nothing(
    planted: dict[str, Any], two_cards: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lane.main(["--dry", "--into", str(tmp_path)]) == 0
    assert planted["calls"] == [(name, "cpu", 2) for name in ("checks", "ranks", "bench")]
    assert "nothing was measured on a GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["checks", "ranks", "bench"])
def test_what_failed_is_named_and_fails_the_lane(
    part: str, planted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    planted[part] = planted[part][0], ["b: differs"]
    assert lane.main(["--dry"]) == 1
    assert "b: differs" in capsys.readouterr().out


def ends_with(status: int, file: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a part's processes write a report, if `content` is not "", and end with a status."""

    def start(command: Any, device: str) -> int:
        if content:
            path = next(Path(word) for word in command if str(word).endswith(file))
            path.write_text(content)
        return status

    monkeypatch.setattr(lane, "start", start)


CHECKS = '<testsuite><testcase name="a"/><testcase name="b">{}</testcase></testsuite>'


@pytest.mark.parametrize(
    ("run", "file", "content", "status", "failed"),
    [("run_checks", "checks.xml", CHECKS.format(""), 0, []),
     ("run_checks", "checks.xml", CHECKS.format('<failure message="differs"/>'), 1, ["b: differs"]),
     ("run_checks", "checks.xml", CHECKS.format("<skipped/>"), 0, ["b: skipped"]),
     ("run_checks", "checks.xml", CHECKS.format(""), 3, ["exit status 3 after 2 checks"]),
     ("run_ranks", "ranks.json", '{"checks": {"c": "hung"}}', 1, ["2 ranks: c: hung"]),
     ("run_ranks", "ranks.json", "", 124, ["exit status 124 after 0 checks"]),
     ("run_bench", "rows.json", '[{"value": 1.0}]', 0, []),
     ("run_bench", "rows.json", '[{"value": 1.0}]', 124,
      ["bench: exit status 124 after 1 figures"]),
     ("run_bench", "rows.json", "", 0, ["bench: no figure"])],
)  # fmt: skip
def test_each_part_says_what_failed(
    run: str, file: str, content: str, status: int, failed: list[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    ends_with(status, file, content, monkeypatch)
    found, said = getattr(lane, run)("cpu", 2, tmp_path, [])
    assert said == failed
    assert bool(found) == bool(content)


@pytest.mark.heavy
def test_the_checks_run_on_a_device(tmp_path: Path) -> None:
    """One of each way to compute, as `make gpu` starts them."""
    chosen = "(dense_is or fused_is or grouped_is) and tangent-bfloat16"
    said, failed = lane.run_checks("cpu", 2, tmp_path, ["-k", chosen])
    ways = {name.partition("[")[0] for name in said}
    assert {"test_dense_is_the_slow_loops", "test_fused_is_the_slow_loops",
            "test_grouped_is_the_slow_loops"} <= ways  # fmt: skip
    assert not failed


@pytest.mark.slow
def test_a_part_whose_processes_fail_has_failed(tmp_path: Path) -> None:
    assert lane.run_checks("cpu", 2, tmp_path, ["--no-such-option"]) == (
        {},
        ["exit status 4 after 0 checks"],
    )


@pytest.mark.heavy  # minutes: everything, small
def test_the_whole_lane_starts_on_the_cpu(tmp_path: Path) -> None:
    assert lane.main(["--dry", "--into", str(tmp_path)]) == 0
