"""One answer while it is generated: its tokens, where it ends, and the text that is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any


class StopQueue(asyncio.Queue[Any]):
    """A queue of texts that ends before the first stop text.

    What may be the beginning of a stop text is held back until the next text comes.

    Args:
        stops: texts that end the answer and are not part of it.
        stopped: called once when one was found.
    """

    def __init__(self, stops: Sequence[str], stopped: Callable[[], None]) -> None:
        super().__init__()
        self.found, self.sent = False, ""
        self._stops, self._stopped = list(stops), stopped
        self._held = ""

    def put_nowait(self, item: Any) -> None:
        """Add a text, or anything else, before which held text is added; None ends the queue."""
        if self.found:
            return
        if type(item) is not str or not self._stops:  # reasoning is a subclass, and not searched
            self._release(self._held)
            self._held = ""
            self._release(item) if type(item) is str else super().put_nowait(item)
            return
        text = self._held + item
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self._release(text[: min(places)])
            super().put_nowait(None)
            self.found = True
            self._stopped()
            return
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        self._release(text[: len(text) - kept])

    def _release(self, text: str) -> None:
        if text:
            self.sent += text
            super().put_nowait(text)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """One answer: takes tokens as they are generated and gives texts to a queue.

    Args:
        ends: tokens that end the answer; the one that does is not part of it.
        stops: texts that end the answer.
        writer: makes the object that turns tokens into texts, transformers' streamer, given the
            queue.
        cancel: called when nothing more is to be generated.
        tokenizer: of the model.
        plain: the writer writes the text of the tokens and nothing else.
        failure: put into the queue if the answer could not be generated.
    """

    def __init__(
        self,
        ends: Sequence[int],
        stops: Sequence[str],
        writer: Callable[[StopQueue], Any],
        cancel: Callable[[], None],
        *,
        tokenizer: Any,
        plain: bool = True,
        failure: Any = None,
    ) -> None:
        self.queue = StopQueue(stops, cancel)
        self.writer = writer(self.queue)
        self.tokens: list[int] = []
        self.error: str | None = None
        self.done = asyncio.Event()
        self._ends, self._stops = set(ends), list(stops)
        self._tokenizer, self._plain, self._failure = tokenizer, plain, failure

    def take(self, tokens: Sequence[int]) -> None:
        """Take all tokens of the answer so far."""
        if self.done.is_set():
            return
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        self.tokens = list(tokens[:end])
        self.writer.put(SimpleNamespace(generated_tokens=self.tokens))
        if self.queue.found:
            self.done.set()

    def finish(self, error: str | None = None) -> None:
        """End the answer, with an error if it could not be generated."""
        if self.done.is_set():
            return
        self.error = error
        self.done.set()
        if error is not None:
            self.queue.put_nowait(self._failure)
        elif self._plain and (text := self.text()).startswith(self.queue.sent):
            # the writer keeps the bytes of a letter that is not complete
            self.queue.put_nowait(text[len(self.queue.sent) :])
        self.writer.end()

    def text(self) -> str:
        """Return the text of the tokens, up to the first stop text."""
        text = str(
            self._tokenizer.decode(
                self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        places = [place for place in map(text.find, self._stops) if place >= 0]
        return text[: min(places, default=len(text))]
