from __future__ import annotations

import io
import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from rotmole.cli import chat as room
from rotmole.cli.chat import Conversation, chat
from rotmole.cli.generate.command import Sampling, generate
from rotmole.errors import InputError, ModelError
from rotmole_cli import main
from tiny_folders import write_base_model, write_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes the answers of its base, which has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    write_model(folder / "model", initializer_range=0.3)
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def talk(adapter, monkeypatch, capsys):
    """Send lines to the command over a pipe; return its output and its notes."""

    def send(*lines: str, **options) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert chat(adapter, **({"sampling": Sampling(6)} | options)) == 0
        return tuple(capsys.readouterr())

    return send


def answers(file) -> list[str]:
    row = json.loads(file.read_text(encoding="utf-8"))
    return [each["content"] for each in row["messages"] if each["role"] == "assistant"]


def generated(adapter, tmp_path, capsys, messages) -> str:
    """Return what `rotmole generate` answers to a chat."""
    file, written = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    written.unlink(missing_ok=True)
    file.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    generate(adapter, file=file, output=written, sampling=Sampling(6))
    capsys.readouterr()
    return json.loads(written.read_text(encoding="utf-8").splitlines()[-1])["generated_text"]


def test_each_answer_knows_the_turns_before_it(talk, adapter, tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    out, _ = talk("the film", "is it bad", f"/save {file}", system="be brief")
    first, second = answers(file)
    assert out == f"{first}\n{second}\n"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the film"}]
    assert first == generated(adapter, tmp_path, capsys, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "is it bad"}]
    assert second == generated(adapter, tmp_path, capsys, messages)


def test_a_new_conversation_and_another_system_message(talk, tmp_path):
    file = tmp_path / "chat.jsonl"
    out, notes = talk("the film", "/reset", "the film", "/system be brief", "the film",
                      f"/save {file}")  # fmt: skip
    first, second, third = out.splitlines()
    assert first == second
    assert [third] == answers(file)
    assert "a new conversation with this system message" in notes
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][0]["content"] == "be brief"


def test_the_adapter_can_be_turned_off_and_on(talk):
    out, _ = talk("the film", "/adapter off", "/reset", "the film", "/adapter on", "/reset",
                  "the film")  # fmt: skip
    first, off, on = out.splitlines()
    assert first == on != off


def test_sampled_and_empty_lines_and_an_end(talk):
    sampled = Sampling(6, 1.5, seed=3)
    once, _ = talk("the film", "", "   ", "/exit", "never", sampling=sampled)
    again, _ = talk("the film", sampling=sampled)
    assert once == again
    assert once.strip()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/rest", "no command /rest; did you mean '/reset'"),
        ("/adapter", "write /adapter off or /adapter on"),
        ("/save", "/save needs the name of a file"),
        ("/save x.jsonl", "nothing was saved"),
        ("film " * 600, "/reset begins a new one"),
    ],
)
def test_a_wrong_line_of_a_pipe_is_an_error(talk, line, words):
    with pytest.raises(InputError, match=words):
        talk(line)


def test_a_line_that_begins_with_a_slash_can_be_sent(talk, tmp_path):
    file = tmp_path / "chat.jsonl"
    talk("//reset", f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][0]["content"] == "/reset"
    with pytest.raises(InputError, match="exists already"):
        talk("the film", f"/save {file}")


def test_at_a_terminal_a_wrong_line_is_told_and_the_conversation_goes_on(
    adapter, monkeypatch, capsys
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter(["/rest", "the film", "the film"])
    stopped = iter([KeyboardInterrupt, None])
    answer = Conversation.answer

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def interrupted(self, text, write):
        if error := next(stopped):
            raise error
        return answer(self, text, write)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(room.Conversation, "answer", interrupted)
    assert chat(adapter, sampling=Sampling(6)) == 0
    out, notes = capsys.readouterr()
    assert "did you mean '/reset'" in notes
    assert "stopped" in notes
    assert out.strip()


def test_without_a_chat_template_there_is_no_chat(tmp_path, monkeypatch):
    base = write_base_model(tmp_path / "model")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    with pytest.raises(ModelError, match="no chat template"):
        chat(tmp_path / "adapter")


def test_the_command(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\n"))
    assert main(["chat", str(adapter), "--max-new-tokens", "4", "--system", "be brief"]) == 0
    assert capsys.readouterr().out.strip()
