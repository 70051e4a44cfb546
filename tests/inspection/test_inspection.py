"""The record of an inspection: written and read again."""

from __future__ import annotations

from pathlib import Path

from rotmole.inspection.inspection import (
    ALL,
    Affinity,
    Angles,
    Answers,
    Effects,
    Experts,
    Inspection,
    Layer,
    Passage,
    Reach,
    Source,
    StaticShare,
    TokenRouting,
    Usage,
    Verdict,
)


def example() -> Inspection:
    square = ((1.0, 0.5), (0.5, 1.0))
    angles = Angles(
        (-3.0, 0.0, 3.0), ((1.0, 2.0), (0.0, 0.0)), (0.5, None), (0.9, None), (0.4, None),
        {"0.1": (0.7, None)},
    )  # fmt: skip
    usage = Usage(3, (3, 0), (1.0, 0.0), (1.0, None), (1.0, 0.0), 0.2, square, angles)
    reach = Reach((0, 1), ((1.0, 0.0), (0.5, 1.0)), ((0.0, 0.0),), ((1.0, 1.0),), ((1.0, 0.1),) * 2)
    experts = Experts((0.1, 0.2), (0.1, None), *(square,) * 4, router_drift=0.3, reach=reach)
    static = StaticShare((1, 2), (0.5, 0.6), (0.4, 0.5), (0.9, 0.6), (100, 50), (2.0, 1.0))
    layer = Layer(
        "model.layers.3.self_attn.q_proj", "q_proj", 3, 2, 4, 1, "tangent", {ALL: usage},
        {"task": Affinity(0.3, 0.01, 0.7)}, experts, static, {ALL: Effects(0.1, 0.5, None)},
    )  # fmt: skip
    return Inspection(
        Source("runs/a", "tiny", {"rotation": "tangent"}, "validation rows", {"x": 3}),
        (Verdict("dead expert", "s", "r", 0.001, 0.0, "a", layers=(layer.path,), experts=(1,)),),
        (layer,),
        static,
        {ALL: Answers(1.0, 1.1, None, 2.0, 30)},
        Passage(("a",), TokenRouting(((1.0, 0.0),)), {}),
        ("nothing",),
    )


def test_a_record_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    record = example()
    assert Inspection.from_dict(record.to_dict()) == record
    assert Inspection.read(record.write(tmp_path)) == record


def test_affinity_is_measured_between_chance_and_ceiling() -> None:
    assert Affinity(0.5, 0.1, 0.9).share == 0.5
    assert Affinity(0.05, 0.1, 0.9).share == 0.0
    assert Affinity(0.0, 0.0, 0.0).share == 0.0
