from __future__ import annotations

from rotmole.cli import screen


def test_lines_begin_at_once_and_say_what_is_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    with screen.progress() as show:
        for seconds, done in ((0, 0), (5, 1), (40, 2), (45, 3), (600, 10)):
            clock[0] = 100.0 + seconds
            show("rows", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "rows 0/10", "rows 2/10, about 2 min 40 s left", "rows 10/10",
    ]  # fmt: skip


def test_what_was_done_before_says_nothing_about_the_speed(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    with screen.progress() as show:
        show("rows", 90, 100)
        clock[0] = 20.0
        show("rows", 91, 100)
    assert capsys.readouterr().err.splitlines() == ["rows 90/100", "rows 91/100, about 3 min left"]
