"""``rotmole chat``: a conversation with a trained adapter or a base model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from rotmole.cli.generate.command import Sampling, streams_whole
from rotmole.cli.screen import note
from rotmole.data.chat import chat_prompt
from rotmole.errors import InputError, RotMoleError, StorageError, did_you_mean
from rotmole.evaluation.generation import continuation, prompt_tokens
from rotmole.evaluation.target import find_target, load_target
from rotmole.files import atomic_write_text
from rotmole.models.limits import window_of

HELP = """\
/reset         begin a new conversation
/system TEXT   set the system message, or remove it without TEXT; begins a new conversation
/adapter off   answer with the base model alone; /adapter on takes the adapter again
/save FILE     write the conversation to a new jsonl file, as a row of the format messages
/help          show this list
/exit          leave; so does the end of the input (Ctrl-D)
A line that begins with // is sent with one of them."""


def chat(
    target: Path,
    *,
    system: str | None = None,
    sampling: Sampling | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Answer each line of standard input, in the light of those before it.

    Args:
        target: a run folder, a run file or an adapter folder.
        system: text of a system message.
        sampling: None is greedy.

    Raises:
        InputError: the model has no chat template; or, if the input is no terminal, a command is
            wrong or the conversation is longer than the model can read.
    """
    place = find_target(target, needs_data=False)
    loaded = load_target(place, say=note, trust_remote_code=trust_remote_code)
    talk = Conversation(
        loaded.model, loaded.tokenizer, sampling or Sampling(max_new_tokens=512),
        system=system, date=place.date, adapted=place.adapter is not None,
    )  # fmt: skip
    talk.prompt("hi")  # raises if there is no chat template, or no system message in it
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        note("/help lists the commands")
    for line in _lines(at_terminal):
        try:
            if not _take(talk, line):
                return 0
        except RotMoleError as error:
            if not at_terminal:
                raise
            note(str(error))
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            note("\nstopped; the message and what was answered are left out")
    return 0


@dataclass
class Conversation:
    """The messages so far, and what answers the next one.

    Attributes:
        model: with its adapter, or a base model.
        tokenizer: with a chat template.
        sampling: how tokens are chosen.
        system: text of the system message, None for none.
        date: ISO date that the chat template sees as today's.
        adapted: whether there is an adapter.
        adapter_on: whether it is used.
        messages: those of the user and of the model.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    system: str | None = None
    date: str | None = None
    adapted: bool = True
    adapter_on: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the conversation with another message of the user.

        Raises:
            InputError: it is longer than the model can read, or the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        chat = chat_prompt(self.tokenizer, messages, system=self.system, date=self.date)
        return prompt_tokens(chat, self.tokenizer)

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Answer a message, which is kept with its answer when that is complete.

        Args:
            write: gets the answer piece by piece.

        Raises:
            InputError: the conversation is longer than the model can read.
        """
        tokens, window = self.prompt(text), window_of(self.model)
        left = self.sampling.max_new_tokens if window is None else window.positions - len(tokens)
        if left < 1:
            raise InputError(
                f"the conversation has {len(tokens)} tokens, and the model reads "
                f"{window.positions if window else 0}; /reset begins a new one."
            )
        # the answer may be shorter than asked for, but must fit
        most = min(self.sampling.max_new_tokens, left)
        options = vars(replace(self.sampling, max_new_tokens=most))
        streams = streams_whole(self.model, self.tokenizer)
        streamer = _Writer(self.tokenizer, write) if streams else None
        with self._adapter():
            result = continuation(
                self.model, self.tokenizer, tokens, streamer=streamer, **options
            ).text
        write("\n" if streamer else result + "\n")
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": result},
        ]
        return result

    def _adapter(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.adapter_on else self.model.disable_adapter()

    def reset(self) -> None:
        """Forget the messages; the system message stays."""
        self.messages.clear()

    def switch(self, word: str) -> None:
        """Turn the adapter off or on.

        Raises:
            InputError: there is none, or the word is neither.
        """
        if word not in ("off", "on"):
            raise InputError(f"/adapter {word}: write /adapter off or /adapter on.")
        if not self.adapted:
            raise InputError("there is no adapter: this is a base model.")
        self.adapter_on = word == "on"

    def save(self, file: Path) -> Path:
        """Write the conversation as one row of jsonl.

        Raises:
            InputError: there is nothing to write, or the file exists.
            StorageError: the file cannot be written.
        """
        if not self.messages:
            raise InputError("there is no message yet, so nothing was saved.")
        if file.exists():
            raise InputError(f"{file} exists already; give another name.")
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        row = {"messages": [*first, *self.messages]}
        return atomic_write_text(file, json.dumps(row, ensure_ascii=False) + "\n")


def _take(talk: Conversation, line: str) -> bool:
    """Do what a line says; returns False if it ends the conversation."""
    if not line.strip():
        return True
    if line.startswith("//"):
        line = line[1:]
    elif line.startswith("/"):
        return _command(talk, line)
    talk.answer(line, _print)
    return True


def _command(talk: Conversation, line: str) -> bool:
    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    commands: dict[str, Callable[[], None]] = {
        "/reset": lambda: _reset(talk),
        "/system": lambda: _set_system(talk, rest),
        "/adapter": lambda: _switch(talk, rest),
        "/save": lambda: _save(talk, rest),
        "/help": lambda: note(HELP),
    }
    if word in ("/exit", "/quit"):
        return False
    if word not in commands:
        hint = did_you_mean(word, commands) or "; /help lists the commands"
        raise InputError(f"there is no command {word}{hint}. // sends a line that begins with /.")
    commands[word]()
    return True


def _reset(talk: Conversation) -> None:
    talk.reset()
    note("a new conversation")


def _set_system(talk: Conversation, text: str) -> None:
    before = talk.system, list(talk.messages)
    talk.system = text or None
    talk.reset()
    try:
        talk.prompt("hi")
    except InputError:
        talk.system, talk.messages = before
        raise
    note(f"a new conversation {'with this' if text else 'without a'} system message")


def _switch(talk: Conversation, word: str) -> None:
    talk.switch(word)
    note("answers of the adapter" if talk.adapter_on else "answers of the base model alone")


def _save(talk: Conversation, name: str) -> None:
    if not name:
        raise InputError("/save needs the name of a file, such as /save chat.jsonl.")
    try:
        note(f"written: {talk.save(Path(name).expanduser())}")
    except StorageError as error:
        raise StorageError(f"{error} The conversation goes on.") from error


def _lines(at_terminal: bool) -> Iterator[str]:
    """Yield the lines of standard input; at a terminal they can be edited and recalled."""
    if not at_terminal:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):  # Windows' terminal does that itself
        import readline  # noqa: F401 - input() edits lines and recalls earlier ones with it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _print(text: str) -> None:
    print(text, end="", flush=True)


class _Writer(TextStreamer):  # type: ignore[misc] # transformers is not typed
    """Hands the text of an answer on as it is generated, in whole words but for the end."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece of text."""
        self._write(text)
