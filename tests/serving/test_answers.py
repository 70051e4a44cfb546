"""Texts on their way to a client end before the first stop text, however they are cut."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from rotmole.serving.answers import StopQueue

LETTERS = st.text("ab", max_size=2)


def sent(pieces, stops):
    stopped = []
    queue = StopQueue(stops, lambda: stopped.append(1))
    for piece in [*pieces, None]:
        queue.put_nowait(piece)
    parts = []
    while not queue.empty():
        parts.append(queue.get_nowait())
    assert parts.pop() is None
    assert None not in parts
    return "".join(parts), len(stopped)


@given(st.lists(LETTERS), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_text(pieces, stops):
    text = "".join(pieces)
    ends = [at for at in range(len(text) + 1) if any(text[:at].endswith(s) for s in stops)]
    if not ends:
        assert sent(pieces, stops) == (text, 0)
        return
    got, stopped = sent(pieces, stops)
    assert stopped == 1
    assert text.startswith(got)
    assert not any(stop in got for stop in stops)
    assert any(text[len(got) :].startswith(stop) for stop in stops)


def test_what_is_no_text_comes_after_the_text_before_it():
    queue = StopQueue(["stop"], lambda: None)
    for item in ("st", 7, "op", None):
        queue.put_nowait(item)
    assert [queue.get_nowait() for _ in range(4)] == ["st", 7, "op", None]


def test_nothing_comes_after_a_stop_text():
    queue: asyncio.Queue = StopQueue(["x"], lambda: None)
    for item in ("ax", "b", 7, None):
        queue.put_nowait(item)
    assert [queue.get_nowait() for _ in range(queue.qsize())] == ["a", None]
